# SPDX-License-Identifier: Apache-2.0
"""A fixed split into training, validation and test, for corpora that come without one."""

from __future__ import annotations

import hashlib

__all__ = ["split_of"]


def split_of(key: str, *, val: float = 0.05, test: float = 0.1) -> str:
    """Return which set a key belongs to: a function of the key alone, so it never changes.

    Two utterances of the same key are always in the same set. With texts as keys, no tested text
    occurs in training; with speakers as keys, no tested voice does.

    Args:
        key: any string.
        val: part of all keys that goes to validation, in [0, 1).
        test: part of all keys that goes to the test set, in [0, 1); ``val + test < 1``.

    Returns:
        "train", "val" or "test".

    Raises:
        ValueError: the parts are out of range.

    Example:
        >>> [split_of(text) for text in ("goodbye", "please try again", "hello world")]
        ['val', 'train', 'train']
    """
    if not (0 <= val < 1 and 0 <= test < 1 and val + test < 1):
        raise ValueError(
            f"val and test must be in [0, 1) and sum to less than 1, got val={val}, test={test}"
        )
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    position = int.from_bytes(digest, "big") / 2**64
    return "test" if position < test else "val" if position < test + val else "train"
