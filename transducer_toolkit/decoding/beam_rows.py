# SPDX-License-Identifier: Apache-2.0
"""Partial hypotheses of a beam search, one in each row of a table, and the paths to them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from transducer_toolkit.decoding.search import Hypothesis


class Rows(NamedTuple):
    """Partial hypotheses of the utterances of a batch, N in any order.

    Attributes:
        utterance: (N,) int64, index of the utterance in the batch.
        frame: (N,) int64, the frame that the hypothesis reads next, from the start of the chunk.
        scores: (N, 2) float64. The first is the logarithm of the summed probability of its paths.
            The second counts only the paths that may end before ``frame``.
        sequence: (N,) int64, hash of the tokens.
        num_tokens: (N,) int64.
        path: (N,) int64, entry of the last token in :class:`Paths`, -1 if there is none.
        unread: (N,) int64, the last token if predictor and language model have not read it yet,
            otherwise -1.
        predictor_out: (N, P), after the tokens that were read; (N, D) if the joiner has projected
            it.
        predictor_state: (N, ...).
        lm_log_probs: (N, V), or None without a language model.
        lm_state: (N, ...), or None without a language model.
    """

    utterance: Tensor
    frame: Tensor
    scores: Tensor
    sequence: Tensor
    num_tokens: Tensor
    path: Tensor
    unread: Tensor
    predictor_out: Tensor
    predictor_state: Tensor
    lm_log_probs: Tensor | None
    lm_state: Tensor | None

    def take(self, index: Tensor) -> Rows:
        """Returns the rows with these indices."""
        return Rows._make(
            field if field is None else field.index_select(0, index) for field in self
        )

    def __add__(self, other: Rows) -> Rows:  # type: ignore[override]
        pairs = zip(self, other, strict=True)
        return Rows._make(None if a is None or b is None else torch.cat((a, b)) for a, b in pairs)


class Paths:
    """The tokens of partial hypotheses, as a tree that grows.

    An entry has a token, its frame, its log-probability and the entry of the token before, or -1.
    """

    def __init__(self, entries: Sequence[tuple[Tensor, Tensor, Tensor, Tensor]] = ()) -> None:
        self._entries = list(entries)
        self._size = sum(len(entry[0]) for entry in self._entries)

    def copy(self) -> Paths:
        """Returns paths that grow independently of these."""
        return Paths(self._entries)

    def add(self, before: Tensor, tokens: Tensor, frames: Tensor, log_probs: Tensor) -> Tensor:
        """Adds entries, from (N,) tensors; returns their indices (N,)."""
        self._entries.append((before, tokens, frames, log_probs))
        self._size += len(before)
        return torch.arange(self._size - len(before), self._size, device=before.device)

    def tolist(self) -> PathLists:
        """Returns the entries as lists."""
        if not self._entries:
            return PathLists([], [], [], [])
        columns = zip(*self._entries, strict=True)
        return PathLists(*(torch.cat(column).tolist() for column in columns))


class PathLists(NamedTuple):
    """The entries of :class:`Paths` as lists."""

    before: list[int]
    tokens: list[int]
    frames: list[int]
    log_probs: list[float]

    def hypothesis(self, entry: int) -> Hypothesis:
        """Returns the tokens that lead to an entry, or none for -1."""
        entries = []
        while entry >= 0:
            entries.append(entry)
            entry = self.before[entry]
        entries.reverse()
        columns = self.tokens, self.frames, self.log_probs
        return Hypothesis(*([column[entry] for entry in entries] for column in columns))  # type: ignore[arg-type]

    def common(self, entries: set[int]) -> int:
        """Returns the last entry that the paths to all these entries share, or -1."""
        shared = set(entries)
        while len(shared) > 1:  # an entry is behind the one before it
            last = max(shared)
            shared.remove(last)
            shared.add(self.before[last])
        return shared.pop() if shared else -1


def settle(rows: Rows, paths: Paths, batch_size: int) -> tuple[list[Hypothesis], Rows, Paths]:
    """Separates the tokens that all hypotheses of an utterance share.

    Returns:
        The shared tokens of each utterance, the rows with the remaining tokens, and the paths of
        these.
    """
    lists = paths.tolist()
    ends = list(zip(rows.utterance.tolist(), rows.path.tolist(), strict=True))
    of_utterance: list[set[int]] = [set() for _ in range(batch_size)]
    for utterance, end in ends:
        of_utterance[utterance].add(end)
    shared = [lists.common(entries) for entries in of_utterance]
    kept: set[int] = set()
    for utterance, entry in ends:
        while entry != shared[utterance] and entry not in kept:
            kept.add(entry)
            entry = lists.before[entry]
    order = sorted(kept)
    renumbered = {entry: index for index, entry in enumerate(order)}
    device = rows.path.device

    def column(values: list[int] | list[float], dtype: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=device)

    remaining = (
        column([renumbered.get(lists.before[entry], -1) for entry in order], torch.int64),
        column([lists.tokens[entry] for entry in order], torch.int64),
        column([lists.frames[entry] for entry in order], torch.int64),
        column([lists.log_probs[entry] for entry in order], torch.float64),
    )
    path = column([renumbered.get(entry, -1) for _, entry in ends], torch.int64)
    found = [lists.hypothesis(entry) for entry in shared]
    return found, rows._replace(path=path), Paths([remaining])


def merge(rows: Rows) -> Rows:
    """Merges rows of the same utterance, frame and tokens.

    Their probabilities are added. The rest is that of the most probable one.
    """
    order = rows.scores[:, 0].argsort(descending=True, stable=True)
    key = append_token(append_token(rows.sequence, rows.utterance), rows.frame)[order]
    key, by_key = key.sort(stable=True)
    is_first = torch.ones_like(key, dtype=torch.bool)
    torch.ne(key[1:], key[:-1], out=is_first[1:])
    first = is_first.nonzero().squeeze(1)
    if len(first) == len(key):
        return rows
    order = order[by_key]
    group = is_first.cumsum(0) - 1
    scores = rows.scores[order]
    highest = scores[first, :1]
    sums = torch.zeros_like(scores[first]).index_add_(0, group, (scores - highest[group]).exp())
    return rows.take(order[first])._replace(scores=highest + sums.log())


def best_of_groups(values: Tensor, group: Tensor, count: int) -> Tensor:
    """Returns the indices of the `count` largest values of each group, by group and value.

    Args:
        values: (N,) float.
        group: (N,) int64.
        count: at least 1.

    Example:
        >>> best_of_groups(torch.tensor([3.0, 1.0, 2.0, 5.0]), torch.tensor([1, 1, 1, 0]), 2)
        tensor([3, 0, 2])
    """
    order = values.argsort(descending=True, stable=True)
    group, by_group = group[order].sort(stable=True)
    position = torch.arange(len(group), device=group.device) - torch.searchsorted(group, group)
    return order[by_group[position < count]]


def append_token(sequence: Tensor, token: Tensor) -> Tensor:
    """Returns the int64 hash of a sequence, given by its hash, and one more token.

    Two different sequences have equal hashes with a probability of about 2^-63.
    """
    mixed = (sequence ^ (token + 1) * _ODD_1) * _ODD_2  # int64 arithmetic wraps around
    return mixed ^ ((mixed >> 32) & 0xFFFFFFFF)


# The odd multipliers of splitmix64 as signed int64.
_ODD_1, _ODD_2 = 0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64
