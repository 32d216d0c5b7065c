# SPDX-License-Identifier: Apache-2.0
"""The target symbols of all utterances of a set, in one array."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

__all__ = ["TargetIds"]


class TargetIds:
    """Target symbols of many utterances, with one byte a symbol if the vocabulary allows it.

    Each text is encoded once, when the data module reads its set. The sizes of lattices and the
    targets of batches are read from here. A Python list of ints takes about ten times the memory,
    and would be copied by every data worker that reads it.

    Args:
        vocab_size: number of symbols, blank included (V).

    Example:
        >>> targets = TargetIds(30)
        >>> targets.append([5, 6, 4])
        >>> targets.append([])
        >>> targets[0], targets.lengths.tolist()
        (tensor([5, 6, 4]), [3, 0])
    """

    def __init__(self, vocab_size: int) -> None:
        smallest = next(code for code in "BHIQ" if vocab_size <= 256 ** array(code).itemsize)
        self._vocab_size = vocab_size
        self._ids = array(smallest)
        self._ends = array("q", [0])

    def append(self, ids: Sequence[int]) -> None:
        """Add the symbols of the next utterance.

        Raises:
            ValueError: an id is too large for the vocabulary, or negative.
        """
        try:
            self._ids.extend(ids)
        except OverflowError as error:
            raise ValueError(
                f"ids: expected numbers in [0, {self._vocab_size}), got {list(ids)}"
            ) from error
        self._ends.append(len(self._ids))

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, position: int) -> Tensor:
        """Return the symbols of an utterance, (U,) int64."""
        ids = self._ids[self._ends[position] : self._ends[position + 1]]
        return torch.tensor(ids.tolist(), dtype=torch.int64)

    @property
    def lengths(self) -> np.ndarray:
        """Number of symbols of each utterance, int64."""
        return np.diff(np.array(self._ends))
