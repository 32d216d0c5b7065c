# SPDX-License-Identifier: Apache-2.0
"""Batches bounded by their lattice cells, and the check that a lattice has a path."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from torch.utils.data import Sampler

from transducer_toolkit.data.keyed_random import keyed_generator

__all__ = ["EpochIndex", "LatticeBatchSampler"]


class EpochIndex(NamedTuple):
    """The key of one utterance, augmented for one epoch.

    The key contains the epoch because data workers hold copies of the dataset: a worker that lives
    for several epochs would not see a counter of the dataset advance.
    """

    epoch: int
    position: int


class LatticeBatchSampler(Sampler[list[EpochIndex]]):
    """Yields batches of utterances of similar length with at most ``max_cells`` lattice cells.

    The memory and the time of a batch grow with its lattice cells, ``sum_b T_b * (U_b + 1)``. An
    utterance that exceeds the bound by itself gets a batch of its own.

    The batches of an epoch are a function of ``(seed, epoch)``, and all ranks compute the same
    ones. Every epoch has the same number of batches. Each rank takes the same number of them, no
    batch goes to two ranks, and the batches of one step have similar sizes. No utterance is dropped
    or repeated: batches are split until their number is right. (If there are too many batches even
    with one utterance each, the smallest are joined.)

    Args:
        num_frames: feature frames of each utterance, the encoder's input.
        num_targets: target symbols of each utterance (U_b).
        num_output_frames: feature frames to encoder frames T_b, such as
            :meth:`transducer_toolkit.modules.Encoder.num_output_frames`.
        max_cells: bound on the cells of a batch.
        max_utterances: bound on the utterances of a batch.
        shuffle: True for new batches in a new order in each epoch; False for batches sorted by
            length, longest first, so that a lack of memory shows at once.
        seed: seed of the shuffling.
        rank: index of this process, in ``[0, world_size)``.
        world_size: number of processes.

    Raises:
        ValueError: an option or a length is out of range, the two sequences differ in length, or
            there are fewer utterances than processes.

    Example:
        >>> sampler = LatticeBatchSampler(
        ...     [400, 80, 100],
        ...     [9, 2, 3],
        ...     num_output_frames=lambda num_frames: -(-num_frames // 4),
        ...     max_cells=1000,
        ...     shuffle=False,
        ... )
        >>> [[index for _, index in batch] for batch in sampler]
        [[0], [2, 1]]
    """

    # Utterances are sorted by length within pools of this many batches: wide enough that batches
    # waste little padding, narrow enough that their composition changes from epoch to epoch.
    POOL_BATCHES = 50

    def __init__(
        self,
        num_frames: Sequence[int],
        num_targets: Sequence[int] | np.ndarray,
        *,
        num_output_frames: Callable[[int], int],
        max_cells: int,
        max_utterances: int = 64,
        shuffle: bool = True,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if len(num_frames) != len(num_targets):
            raise ValueError(
                "num_frames and num_targets must be equally long, got "
                f"{len(num_frames)} and {len(num_targets)}"
            )
        options = {
            "max_cells": max_cells,
            "max_utterances": max_utterances,
            "world_size": world_size,
        }
        for name, value in options.items():
            if value < 1:
                raise ValueError(f"{name} must be positive, got {value}")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must lie in [0, world_size={world_size}), got {rank}")
        if len(num_frames) < world_size:
            raise ValueError(
                f"{len(num_frames)} utterances are too few for world_size={world_size}: "
                "every process needs at least one"
            )
        frames = np.asarray(num_frames, dtype=np.int64)
        targets = np.asarray(num_targets, dtype=np.int64)
        if len(frames) and (frames.min() < 1 or targets.min() < 0):
            raise ValueError("num_frames must be positive and num_targets not negative")
        self._frames = frames
        lengths, which = np.unique(frames, return_inverse=True)
        encoder_frames = np.array([num_output_frames(length) for length in lengths.tolist()])
        # An utterance without a frame, as a test set may have, still takes its place in a batch.
        self._cells = np.maximum(encoder_frames, 1)[which] * (targets + 1)
        self.max_cells = max_cells
        self.max_utterances = max_utterances
        self.shuffle = shuffle
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.epoch = 0
        self.start = 0  # the next iteration skips this many batches
        # Shuffled epochs need slightly different numbers of batches; 2 % more suffices for all.
        needed = len(self._draw(epoch=0, attempt=0))
        steps = -(-(needed + (needed // 50 if shuffle else 0)) // world_size)
        self._num_batches = min(steps, len(frames) // world_size) * world_size

    @property
    def sampler(self) -> LatticeBatchSampler:
        """This object: Lightning calls ``set_epoch`` on a batch sampler's ``sampler``."""
        return self

    @property
    def options(self) -> dict[str, int | bool]:
        """The values that determine the batches, together with the utterances and the epoch."""
        return {
            "num_utterances": len(self._cells),
            "max_cells": self.max_cells,
            "max_utterances": self.max_utterances,
            "shuffle": self.shuffle,
            "seed": self.seed,
            "world_size": self.world_size,
        }

    def num_cells(self, position: int) -> int:
        """Return the number of lattice cells of an utterance."""
        return int(self._cells[position])

    def largest(self, epoch: int) -> dict[str, list[EpochIndex]]:
        """Return this process's batches of an epoch that may need most memory.

        The keys name the measure in which a batch is the largest, such as "most cells".
        """
        batches = self.batches_of_all_ranks(epoch)[self.rank :: self.world_size]
        measures: dict[str, Callable[[list[int]], int]] = {
            "most cells": lambda batch: int(self._cells[batch].sum()),
            "most padded frames": self._padded_frames,
            "most utterances": len,
        }
        found: dict[str, list[int]] = {}
        for what, measure in measures.items():
            batch = max(batches, key=measure)
            if batch not in found.values():
                found[what] = batch
        return {
            what: [EpochIndex(epoch, position) for position in batch]
            for what, batch in found.items()
        }

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch whose batches the next iteration yields."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self._num_batches // self.world_size

    def __iter__(self) -> Iterator[list[EpochIndex]]:
        epoch = self.epoch
        batches = self.batches_of_all_ranks(epoch)[self.rank :: self.world_size]
        for batch in batches[self.start :]:
            yield [EpochIndex(epoch, position) for position in batch]

    def batches_of_all_ranks(self, epoch: int) -> list[list[int]]:
        """Return the positions in each batch; step s of rank r has index ``s * world_size + r``."""
        for attempt in range(3):
            batches = self._draw(epoch=epoch, attempt=attempt)
            if len(batches) <= self._num_batches:
                break
        else:  # too many each time: this draw defined the number and cannot exceed it
            batches = self._draw(epoch=0, attempt=0)
        self._split_or_join(batches)
        if self.world_size > 1:
            # The batches of one step should take equally long on all ranks. Most have about equally
            # many cells and differ in the encoder's work.
            batches.sort(key=self._padded_frames, reverse=True)
        if self.shuffle:
            steps = np.reshape(np.arange(len(batches)), (-1, self.world_size))
            steps = keyed_generator(self.seed, epoch, "steps").permutation(steps)
            batches = [batches[number] for number in steps.ravel()]
        return batches

    def _padded_frames(self, batch: list[int]) -> int:
        return len(batch) * int(self._frames[batch].max())

    def _draw(self, *, epoch: int, attempt: int) -> list[list[int]]:
        """Return as many batches as both bounds require."""
        pools = [np.arange(len(self._cells))]
        if self.shuffle:
            order = keyed_generator(self.seed, epoch, attempt, "batches").permutation(pools[0])
            typical = min(self.max_utterances, max(1, int(self.max_cells / self._cells.mean())))
            pool = typical * self.POOL_BATCHES
            pools = [order[start : start + pool] for start in range(0, len(order), pool)]
        # lexsort sorts by frames, then by cells; ties keep their (random) order.
        return [
            batch
            for pool in pools
            for batch in self._fill(pool[np.lexsort((-self._cells[pool], -self._frames[pool]))])
        ]

    def _fill(self, indices: np.ndarray) -> Iterator[list[int]]:
        batch: list[int] = []
        num_cells = 0
        for index in indices.tolist():
            cells = int(self._cells[index])
            full = len(batch) == self.max_utterances or num_cells + cells > self.max_cells
            if batch and full:
                yield batch
                batch, num_cells = [], 0
            batch.append(index)
            num_cells += cells
        if batch:
            yield batch

    def _split_or_join(self, batches: list[list[int]]) -> None:
        """Bring ``batches`` to their final number, in place."""
        if len(batches) < self._num_batches:  # halve the batches with most utterances
            # The path of halvings breaks ties, and sorting by it restores the order.
            heap: list[tuple[int, tuple[int, ...], list[int]]] = [
                (-len(batch), (index,), batch) for index, batch in enumerate(batches)
            ]
            heapq.heapify(heap)
            while len(heap) < self._num_batches:
                _, path, batch = heap[0]
                middle = len(batch) // 2
                heapq.heapreplace(heap, (-middle, (*path, 0), batch[:middle]))
                heapq.heappush(heap, (middle - len(batch), (*path, 1), batch[middle:]))
            batches[:] = [batch for _, _, batch in sorted(heap, key=lambda entry: entry[1])]
        while len(batches) > self._num_batches:  # only if each batch is a single utterance
            batches.sort(key=lambda batch: int(self._cells[batch].sum()), reverse=True)
            batches[-2:] = [batches[-2] + batches[-1]]
