# SPDX-License-Identifier: Apache-2.0
"""Batches bounded by the number of lattice cells, and which utterances have a lattice at all."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from torch.utils.data import Sampler

from transducer_toolkit.data.keyed_random import keyed_generator

__all__ = ["EpochIndex", "LatticeBatchSampler"]


class EpochIndex(NamedTuple):
    """What the sampler asks of a dataset: one utterance, as augmented in one epoch.

    The epoch travels with the index because data workers hold copies of the dataset: a worker that
    outlives an epoch would not see a counter advance.
    """

    epoch: int
    position: int


class LatticeBatchSampler(Sampler[list[EpochIndex]]):
    """Batches of similar length whose lattices hold at most ``max_cells`` cells together.

    A batch's memory and time are those of its lattice, ``sum_b T_b * (U_b + 1)`` cells, so that is
    what is bounded. An utterance that alone exceeds the bound gets a batch of its own.

    Each epoch's batches are a function of ``(seed, epoch)``, computed alike on all ranks. Every
    epoch has the same number of batches, ranks take disjoint ones, equally many, and those of one
    step are of similar size. No utterance is dropped or repeated: batches are split until their
    number is right. (Where even single utterances are too many for that, the smallest are joined.)

    Args:
        num_frames: feature frames of each utterance, the encoder's input.
        num_targets: target symbols of each utterance (U_b).
        num_output_frames: feature frames to encoder frames T_b, such as
            :meth:`transducer_toolkit.modules.Encoder.num_output_frames`.
        max_cells: bound on the cells of a batch.
        max_utterances: bound on the utterances of a batch.
        shuffle: new batches in a new order each epoch; otherwise by length, longest first (so that
            running out of memory happens at once).
        seed: of the shuffling.
        rank: this process, in ``[0, world_size)``.
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
        self.start = 0  # batches that the next iteration leaves out, at the front
        # Shuffled epochs differ by a few batches; with 2 % in reserve all can have equally many.
        needed = len(self._draw(epoch=0, attempt=0))
        steps = -(-(needed + (needed // 50 if shuffle else 0)) // world_size)
        self._num_batches = min(steps, len(frames) // world_size) * world_size

    @property
    def sampler(self) -> LatticeBatchSampler:
        """Itself: Lightning calls ``set_epoch`` on a batch sampler's ``sampler``."""
        return self

    @property
    def options(self) -> dict[str, int | bool]:
        """What, beside the utterances and the epoch, decides the batches of all processes."""
        return {
            "num_utterances": len(self._cells),
            "max_cells": self.max_cells,
            "max_utterances": self.max_utterances,
            "shuffle": self.shuffle,
            "seed": self.seed,
            "world_size": self.world_size,
        }

    def num_cells(self, position: int) -> int:
        """Lattice cells of an utterance."""
        return int(self._cells[position])

    def largest(self, epoch: int) -> dict[str, list[EpochIndex]]:
        """This process's batches of an epoch that need most memory, by what they have most of."""
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
        """Choose the epoch whose batches the next iteration gives."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self._num_batches // self.world_size

    def __iter__(self) -> Iterator[list[EpochIndex]]:
        epoch = self.epoch
        batches = self.batches_of_all_ranks(epoch)[self.rank :: self.world_size]
        for batch in batches[self.start :]:
            yield [EpochIndex(epoch, position) for position in batch]

    def batches_of_all_ranks(self, epoch: int) -> list[list[int]]:
        """Return positions: the batch of step ``s`` and rank ``r`` is ``s * world_size + r``."""
        for attempt in range(3):
            batches = self._draw(epoch=epoch, attempt=attempt)
            if len(batches) <= self._num_batches:
                break
        else:  # too many each time: what defined the number has the right one
            batches = self._draw(epoch=0, attempt=0)
        self._split_or_join(batches)
        if self.world_size > 1:
            # The batches of one step should take equally long on all ranks. Most are filled up with
            # cells, and differ in what the encoder has to do.
            batches.sort(key=self._padded_frames, reverse=True)
        if self.shuffle:
            steps = np.reshape(np.arange(len(batches)), (-1, self.world_size))
            steps = keyed_generator(self.seed, epoch, "steps").permutation(steps)
            batches = [batches[number] for number in steps.ravel()]
        return batches

    def _padded_frames(self, batch: list[int]) -> int:
        return len(batch) * int(self._frames[batch].max())

    def _draw(self, *, epoch: int, attempt: int) -> list[list[int]]:
        """Batches within both bounds, as many as it takes."""
        pools = [np.arange(len(self._cells))]
        if self.shuffle:
            order = keyed_generator(self.seed, epoch, attempt, "batches").permutation(pools[0])
            typical = min(self.max_utterances, max(1, int(self.max_cells / self._cells.mean())))
            pool = typical * self.POOL_BATCHES
            pools = [order[start : start + pool] for start in range(0, len(order), pool)]
        # lexsort: the frames decide, then the cells; ties keep the (random) order.
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
        if len(batches) < self._num_batches:  # halve those with most utterances
            # The path of halvings decides among equals, and keeps the order.
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
        while len(batches) > self._num_batches:  # only when all are single utterances
            batches.sort(key=lambda batch: int(self._cells[batch].sum()), reverse=True)
            batches[-2:] = [batches[-2] + batches[-1]]
