# SPDX-License-Identifier: Apache-2.0
"""Batches of Lhotse's cuts, bounded by lattice cells, from lazily read manifests or shards."""

from __future__ import annotations

import itertools
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from lhotse import CutSet
from lhotse.audio import AudioLoadingError
from lhotse.cut import Cut, MultiCut
from lhotse.dataset import DynamicBucketingSampler, make_worker_init_fn
from lhotse.dataset.sampling.base import SamplingConstraint
from lhotse.dataset.sampling.dynamic_bucketing import estimate_duration_buckets
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler

from transducer_toolkit.data.audio import resample, select_channel
from transducer_toolkit.data.dataset import Batch, Example, SpeechDataset, Unreadable, collate
from transducer_toolkit.data.lhotse_sources import LOCAL_SOURCES, check_audio_sources
from transducer_toolkit.data.manifest import Utterance
from transducer_toolkit.data.tokenizer import Tokenizer

__all__ = [
    "CutBatchSampler",
    "CutDataset",
    "CutIndex",
    "LatticeConstraint",
    "ShardBatches",
    "ShardLoader",
    "cut_targets",
    "cut_text",
    "cuts_of_channels",
    "duration_bins",
    "with_targets",
]

MAX_OUTSIDE_S = 0.1  # part of a supervision that rounding may put outside of its cut
_TARGETS = "transducer_target_ids"  # the custom field of a supervision that holds its encoded text


class CutIndex(NamedTuple):
    """The key of one cut, augmented for one epoch."""

    epoch: int
    cut: Cut


def cut_text(cut: Cut) -> str:
    """Return the text of a cut.

    Raises:
        ValueError: the cut does not have exactly one supervision, or the supervision has no text or
            reaches more than 0.1 s beyond the cut. The text may be empty.

    Example:
        >>> cut_text(CutSet.from_file("cuts.jsonl.gz")[0])  # doctest: +SKIP
        'three seven'
    """
    if len(cut.supervisions) != 1:
        raise ValueError(
            f"cut {cut.id!r} must have one supervision, got {len(cut.supervisions)}; "
            "CutSet.trim_to_supervisions makes such cuts"
        )
    supervision = cut.supervisions[0]
    if supervision.text is None:
        raise ValueError(
            f"cut {cut.id!r}: its supervision {supervision.id!r} has no text; add it, or remove "
            "the cut"
        )
    start_s, end_s = supervision.start, supervision.end  # from the start of the cut
    if start_s < -MAX_OUTSIDE_S or end_s > cut.duration + MAX_OUTSIDE_S:
        raise ValueError(
            f"cut {cut.id!r}: its supervision {supervision.id!r} spans {start_s:.2f} to "
            f"{end_s:.2f} s, the cut 0 to {cut.duration:.2f} s; CutSet.trim_to_supervisions makes "
            "cuts that hold their supervisions"
        )
    return supervision.text


def cuts_of_channels(cut: Cut) -> list[Cut]:
    """Return a cut for each channel of a cut that has a supervision; its own if it has one channel.

    Example:
        >>> [part.channel for part in cuts_of_channels(stereo_cut)]  # doctest: +SKIP
        [0, 1]
    """
    if not isinstance(cut, MultiCut):
        return [cut]
    return [part for part in cut.to_mono() if part.supervisions]


def with_targets(cut: Cut, tokenizer: Tokenizer, *, strict: bool = True) -> Cut:
    """Return the cut with its encoded text, which travels with it from the sampler to the batch.

    Args:
        cut: with one supervision.
        tokenizer: text to target symbols.
        strict: False gives a text that the tokenizer cannot encode no targets.

    Raises:
        ValueError: :func:`cut_text` refuses the cut, or the tokenizer cannot encode its text; the
            cut is named.
    """
    text = cut_text(cut)
    try:
        ids = np.array(tokenizer.encode(text), dtype=np.int32)
    except ValueError as error:
        if strict:
            raise ValueError(f"cut {cut.id!r}: {error}") from error
        ids = np.array([], dtype=np.int32)
    return cut.map_supervisions(lambda supervision: supervision.with_custom(_TARGETS, ids))


def cut_targets(cut: Cut) -> np.ndarray:
    """Return the target symbols of a cut, (U,) int32.

    Raises:
        ValueError: the cut does not come from :func:`with_targets`.
    """
    custom = cut.supervisions[0].custom or {}
    if _TARGETS not in custom:
        raise ValueError(f"cut {cut.id!r} has no target symbols yet: use with_targets(cut, ...)")
    return custom[_TARGETS]


@dataclass
class LatticeConstraint(SamplingConstraint):
    """Bounds the lattice cells ``sum_b T_b * (U_b + 1)`` of a batch, for Lhotse's samplers.

    Args:
        num_cells: function that returns the lattice cells of a cut.
        max_cells: bound on their sum; a cut above the bound gets a batch of its own.
        max_utterances: bound on the cuts of a batch.

    Example:
        >>> constraint = LatticeConstraint(lambda cut: 400, max_cells=1000, max_utterances=8)
        >>> sampler = DynamicBucketingSampler(cuts, constraint=constraint)  # doctest: +SKIP
    """

    num_cells: Callable[[Cut], int]
    max_cells: int
    max_utterances: int
    _cells: int = 0
    _utterances: int = 0
    _largest: int = 0

    def add(self, example: Cut) -> None:
        """Count a cut."""
        cells = self.num_cells(example)
        self._cells += cells
        self._utterances += 1
        self._largest = max(self._largest, cells)

    def exceeded(self) -> bool:
        """Return whether the cuts counted are too many for a batch."""
        return self._cells > self.max_cells or self._utterances > self.max_utterances

    def close_to_exceeding(self) -> bool:
        """Return whether one more cut of the largest size would be too many."""
        return (
            self._cells + self._largest > self.max_cells or self._utterances >= self.max_utterances
        )

    def reset(self) -> None:
        """Start the next batch."""
        self._cells = self._utterances = self._largest = 0

    def measure_length(self, example: Cut) -> float:
        """Return the duration in seconds, by which cuts are sorted into buckets."""
        return example.duration


def duration_bins(cuts: CutSet, num_buckets: int) -> list[float]:
    """Return durations, in seconds, that divide cuts into classes of equal total length.

    Args:
        cuts: cuts; the first 10,000 are used.
        num_buckets: number of classes; with fewer than two cuts per class, there is only one.

    Returns:
        ``num_buckets - 1`` durations at most.
    """
    first = list(islice(cuts, 10_000))
    if num_buckets < 2 or len(first) < 2 * num_buckets:
        return []
    # Checkpoints hold plain numbers only, no NumPy scalars.
    return [float(duration_s) for duration_s in estimate_duration_buckets(first, num_buckets)]


class CutBatchSampler(Sampler[list[CutIndex]]):
    """Yields batches of cuts of similar length, with Lhotse's ``DynamicBucketingSampler``.

    The manifest is read line by line in every epoch. The batches of an epoch are a function of
    ``(seed, epoch)``; each rank takes equally many, and no batch goes to two ranks. (If an epoch
    ends with fewer cuts than ranks, Lhotse repeats some under another id.) A
    :class:`~transducer_toolkit.data.loader.ResumableLoader` can resume within an epoch; the audio
    of skipped cuts is not read.

    Args:
        cuts: lazily opened cuts with targets.
        constraint: bounds the batches.
        bins: durations that divide the cuts into classes of similar length, see
            :func:`duration_bins`.
        buffer_size: number of cuts that are held and shuffled together.
        shuffle: whether batches differ from epoch to epoch.
        seed: seed of the shuffling.
        rank: index of this process, in ``[0, world_size)``.
        world_size: number of processes.

    Example:
        >>> sampler = CutBatchSampler(cuts, constraint)  # doctest: +SKIP
        >>> loader = ResumableLoader(dataset, batch_sampler=sampler)  # doctest: +SKIP
    """

    def __init__(
        self,
        cuts: CutSet,
        constraint: LatticeConstraint,
        *,
        bins: Sequence[float] = (),
        buffer_size: int = 20_000,
        shuffle: bool = True,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.cuts = cuts
        self.constraint = constraint
        self._options: dict[str, Any] = {
            "duration_bins": list(bins),
            "buffer_size": buffer_size,
            "shuffle": shuffle,
            "seed": seed,
            "world_size": world_size,
        }
        self.rank = rank
        self.epoch = 0
        self.start = 0  # batches that the next iteration leaves out, at the front
        self._num_batches: int | None = None

    @property
    def sampler(self) -> CutBatchSampler:
        """This object: Lightning calls ``set_epoch`` on a batch sampler's ``sampler``."""
        return self

    @property
    def options(self) -> dict[str, Any]:
        """The values that determine the batches, together with the cuts and the epoch."""
        constraint = self.constraint
        return {
            **self._options,
            "max_cells": constraint.max_cells,
            "max_utterances": constraint.max_utterances,
        }

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch whose batches the next iteration yields."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Return the number of batches of the first epoch; other epochs differ slightly.

        The first call reads the manifest.
        """
        if self._num_batches is None:
            self._num_batches = sum(1 for _ in self._batches(epoch=0))
        return self._num_batches

    def __iter__(self) -> Iterator[list[CutIndex]]:
        epoch = self.epoch
        for batch in islice(self._batches(epoch), self.start, None):
            yield [CutIndex(epoch, cut) for cut in batch]

    def _batches(self, epoch: int) -> Iterator[CutSet]:
        sampler = DynamicBucketingSampler(
            self.cuts, constraint=self.constraint, rank=self.rank, **self._options
        )
        sampler.set_epoch(epoch)
        return iter(sampler)


class CutDataset(Dataset[Example]):
    """Reads cuts of :func:`with_targets` as features and targets.

    Args:
        speech: dataset that makes an example of a waveform and a text.
        audio_sources: allowed types of audio source, see
            :func:`~transducer_toolkit.data.lhotse_sources.check_audio_sources`.
        channel: "mix" averages the channels of a cut, a number selects one. A cut of a single
            channel is read as it is.

    Raises:
        ValueError: (on access) audio cannot be read or is of another type of source (the message
            names the cut), or no cut of a batch can be read.

    Example:
        >>> dataset = CutDataset(SpeechDataset([], tokenizer, Fbank()))  # doctest: +SKIP
        >>> dataset[CutIndex(0, cut)].features.shape  # doctest: +SKIP
        torch.Size([214, 80])
    """

    def __init__(
        self,
        speech: SpeechDataset,
        *,
        audio_sources: Sequence[str] = LOCAL_SOURCES,
        channel: int | str = "mix",
    ) -> None:
        self.speech = speech
        self.channel = channel
        self.audio_sources = tuple(audio_sources)

    def __getitem__(self, index: CutIndex) -> Example:
        epoch, cut = index
        utterance = Utterance(
            id=cut.id,
            audio=cut.id,
            duration_s=cut.duration,
            text=cut_text(cut),
            speaker=cut.supervisions[0].speaker,
        )
        try:
            check_audio_sources(cut, self.audio_sources)
            waveform = torch.from_numpy(self._waveform(cut))
            waveform = resample(waveform, cut.sampling_rate, self.speech.fbank.sample_rate)
            targets = torch.from_numpy(cut_targets(cut)).long()
            return self.speech.example(utterance, waveform, epoch, targets=targets)
        except (ValueError, OSError, AudioLoadingError) as error:
            raise ValueError(f"cut {cut.id!r}: {error}") from error

    def _waveform(self, cut: Cut) -> np.ndarray:
        samples = cut.load_audio()  # (channels, samples)
        channel = self.channel
        if len(samples) == 1:
            channel = "mix"
        elif isinstance(cut, MultiCut) and channel in cut.channel:
            channel = list(cut.channel).index(channel)  # its channels need not begin at 0
        elif isinstance(cut, MultiCut) and isinstance(channel, int):
            raise ValueError(f"it has the channels {cut.channel}: there is no channel={channel}")
        return select_channel("its audio", samples.T, channel)

    def __getitems__(self, indices: Sequence[CutIndex]) -> list[Example | Unreadable]:
        """Read the cuts of a batch; unreadable ones are handled as ``speech.on_bad_audio`` says."""
        if self.speech.on_bad_audio == "raise":
            return [self[index] for index in indices]
        items: list[Example | Unreadable] = []
        for index in indices:
            try:
                items.append(self[index])
            except ValueError as error:
                items.append(Unreadable(index.cut.id, str(error)))
        if all(isinstance(item, Unreadable) for item in items):
            raise ValueError(f"none of the {len(items)} cuts of a batch can be read: {items[-1]}")
        return items


class ShardBatches(IterableDataset[Batch]):
    """An endless stream of batches of Lhotse Shar shards.

    No shard is read by two ranks or workers in the same pass.

    Args:
        open_shards: called in each worker process with the number of a pass; opens the shards that
            the worker reads in this pass.
        dataset: makes examples of cuts.
        constraint: bounds the batches.
        bins: durations that divide the cuts into classes of similar length.
        buffer_size: number of cuts, with their audio, that each worker holds and shuffles.
        seed: seed of the shuffling within the buffer.

    Raises:
        ValueError: (on iteration) there are no shards for this worker.
    """

    def __init__(
        self,
        open_shards: Callable[[int], CutSet],
        dataset: CutDataset,
        constraint: LatticeConstraint,
        *,
        bins: Sequence[float],
        buffer_size: int,
        seed: int,
    ) -> None:
        self.open_shards = open_shards
        self.dataset = dataset
        self.constraint = constraint
        self._options: dict[str, Any] = {
            "duration_bins": list(bins),
            "buffer_size": buffer_size,
            "seed": seed,
        }

    def __iter__(self) -> Iterator[Batch]:
        for number in itertools.count():
            sampler = DynamicBucketingSampler(
                self.open_shards(number),
                constraint=self.constraint,
                shuffle=True,
                rank=0,
                world_size=1,  # each process has its own shards
                **self._options,
            )
            sampler.set_epoch(number)
            empty = True
            for batch in sampler:
                empty = False
                yield collate(self.dataset.__getitems__([CutIndex(number, cut) for cut in batch]))
            if empty:
                raise ValueError(
                    "a data worker has no shard of its own: make at least as many shards as there "
                    "are data workers in all processes together"
                )


class ShardLoader:
    """Divides a stream of batches into epochs of ``steps_per_epoch`` batches on every rank.

    The stream continues from epoch to epoch. A resumed training starts another stream, seeded by
    the epoch, because finding a position in shards again requires reading up to it.

    Args:
        make_batches: called with the first epoch of a stream; returns the stream's batches.
        steps_per_epoch: batches of an epoch.
        rank: index of this process.
        world_size: number of processes.
        num_workers: processes that read and augment; 0 reads in the training process.
        pin_memory: page-lock batches, for faster copies to a GPU.
        seed: seed of the workers' random generators.
    """

    def __init__(
        self,
        make_batches: Callable[[int], ShardBatches],
        *,
        steps_per_epoch: int,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
        pin_memory: bool = False,
        seed: int = 0,
    ) -> None:
        self.make_batches = make_batches
        self.steps_per_epoch = steps_per_epoch
        self.epoch = 0
        self._options: dict[str, Any] = {
            "batch_size": None,
            "num_workers": num_workers,
            "pin_memory": pin_memory,
            "worker_init_fn": _WorkerInit(rank=rank, world_size=world_size, seed=seed),
        }
        self._stream: Iterator[Batch] | None = None

    @property
    def sampler(self) -> ShardLoader:
        """This object: Lightning calls ``set_epoch`` on a loader's ``sampler``."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Set the next epoch, which seeds a stream that has not begun."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.steps_per_epoch

    def __iter__(self) -> Iterator[Batch]:
        if self._stream is None:
            self._stream = iter(DataLoader(self.make_batches(self.epoch), **self._options))
        yield from islice(self._stream, self.steps_per_epoch)


class _WorkerInit:
    """Tells a worker process its rank, by which Lhotse assigns shards; it can be pickled."""

    def __init__(self, *, rank: int, world_size: int, seed: int) -> None:
        self._init = make_worker_init_fn(rank=rank, world_size=world_size, seed=seed)

    def __call__(self, worker_id: int) -> None:
        torch.set_num_threads(1)  # workers and training share the CPUs
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the training needs data for its last step
        self._init(worker_id)
