# SPDX-License-Identifier: Apache-2.0
"""Random numbers that depend on *what* they are for, never on who asks first."""

from __future__ import annotations

import hashlib

import numpy as np

__all__ = ["keyed_generator"]


def keyed_generator(*key: int | str) -> np.random.Generator:
    """Return a generator whose stream is a function of ``key`` alone.

    Augmentation drawn from ``keyed_generator(seed, epoch, utterance_id, "purpose")`` is the same
    for every worker, every rank and every order in which utterances are read.

    Args:
        key: integers and strings; ``1`` and ``"1"`` are different keys.

    Returns:
        A fresh generator, positioned at the start of the key's stream.

    Raises:
        TypeError: a part of the key is neither int nor str.

    Example:
        >>> a, b = keyed_generator(0, 3, "utt-7"), keyed_generator(0, 3, "utt-7")
        >>> a.integers(1000) == b.integers(1000)
        np.True_
    """
    digest = hashlib.blake2b(digest_size=16)
    for part in key:
        if isinstance(part, bool) or not isinstance(part, int | str):
            raise TypeError(f"key parts must be int or str, got {type(part).__name__}: {part!r}")
        # The type and the length make the encoding of a sequence of parts unambiguous.
        text = f"{type(part).__name__}:{part}".encode()
        digest.update(len(text).to_bytes(8, "little"))
        digest.update(text)
    return np.random.default_rng(int.from_bytes(digest.digest(), "little"))
