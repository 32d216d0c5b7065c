# SPDX-License-Identifier: Apache-2.0
"""Errors about an utterance of a batch name its id: the index says nothing to a user."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from transducer_toolkit.decoding.search import NonFiniteScoresError

# "utterance 3", and "logit_lengths[3]" or "targets[3, 7]" at the start of a message
_INDEX = re.compile(r"\butterance (\d+)\b|^\w+\[(\d+)[\],]")


@contextmanager
def naming_utterances(ids: Sequence[str]) -> Iterator[None]:
    """Replace the index of an utterance in a ValueError by its id.

    Args:
        ids: ids of the utterances of the batch.

    Example:
        >>> with naming_utterances(["a1", "b2"]):
        ...     raise ValueError("targets[1, 7] (utterance 1): expected a label, got -1")
        Traceback (most recent call last):
        ValueError: utterance 'b2': targets[7]: expected a label, got -1
    """
    try:
        yield
    except NonFiniteScoresError as error:
        raise NonFiniteScoresError(error.utterances, names=ids) from error
    except ValueError as error:
        text = str(error)
        found = _INDEX.search(text)
        index = int(found[1] or found[2]) if found else len(ids)
        if index >= len(ids):
            raise
        text = re.sub(rf" ?\(utterance {index}\)|^utterance {index}: ", "", text)
        text = re.sub(rf"^(\w+)\[{index}\]", r"\1", text)
        text = re.sub(rf"^(\w+)\[{index}, ", r"\1[", text)
        raise ValueError(f"utterance {ids[index]!r}: {text}") from error
