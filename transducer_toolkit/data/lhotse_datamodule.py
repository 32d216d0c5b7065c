# SPDX-License-Identifier: Apache-2.0
"""The data module for Lhotse's cuts and shards, for corpora that exceed one machine."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from lhotse import CutSet, load_manifest_lazy
from lhotse.cut import Cut
from lhotse.lazy import LazyFlattener, LazyMapper
from lhotse.utils import fastcopy

from transducer_toolkit.data.datamodule import TransducerDataModule, _init_worker
from transducer_toolkit.data.dataset import collate
from transducer_toolkit.data.encoder_frames import min_samples, too_short
from transducer_toolkit.data.lhotse_batching import (
    CutBatchSampler,
    CutDataset,
    LatticeConstraint,
    ShardBatches,
    ShardLoader,
    cut_targets,
    cut_text,
    cuts_of_channels,
    duration_bins,
    with_targets,
)
from transducer_toolkit.data.lhotse_sources import LOCAL_SOURCES, SOURCE_TYPES
from transducer_toolkit.data.loader import ResumableLoader
from transducer_toolkit.data.tokenizer import Tokenizer
from transducer_toolkit.ops.checks import check_at_least
from transducer_toolkit.ops.topology import is_feasible

__all__ = ["LhotseDataModule"]

logger = logging.getLogger(__name__)


class LhotseDataModule(TransducerDataModule):
    """Makes batches of Lhotse's cuts, as :class:`TransducerDataModule` does of manifests.

    Manifests of cuts (``cuts.jsonl.gz``) are read line by line and never held in memory; a resumed
    training continues at the batch where it stopped. Folders hold shards (Lhotse Shar:
    ``cuts.000000.jsonl.gz``, ``recording.000000.tar``, ...). Training reads whole shards
    sequentially, each by one worker of one process, in a new order in each pass; an epoch is
    ``steps_per_epoch`` batches. Validation and test sets may be manifests or folders.

    Each cut has one supervision. Cuts that are longer than ``max_duration_s`` or have no path
    through their lattice are left out of training and validation; the log names the first one
    without a path.

    Args:
        corpus: a corpus whose manifests are manifests of cuts or folders of shards, such as
            ``ManifestCorpus(train="cuts_train.jsonl.gz", val="cuts_dev.jsonl.gz")``.
        num_buckets: number of length classes; a batch is drawn from one class.
        buffer_size: cuts that are held and shuffled together. With shards, each worker holds as
            many, with their audio.
        steps_per_epoch: batches of an epoch of each process; required for shards, an error
            otherwise.
        audio_sources: allowed types of audio source, of "file", "memory", "url" and "command". A
            url is fetched and a command is run by a shell: allow them only for manifests that you
            trust.
        options: the options of :class:`TransducerDataModule`.

    Raises:
        ValueError: shards without ``steps_per_epoch``, or ``steps_per_epoch`` without shards; an
            unknown type of audio source.

    Example:
        >>> corpus = ManifestCorpus(train="shar/train", val="dev.jsonl.gz")  # doctest: +SKIP
        >>> LhotseDataModule(corpus=corpus, max_cells=10**6, steps_per_epoch=5000)  # doctest: +SKIP
    """

    def __init__(
        self,
        *,
        num_buckets: int = 30,
        buffer_size: int = 20_000,
        steps_per_epoch: int | None = None,
        audio_sources: Sequence[str] = LOCAL_SOURCES,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        check_at_least(1, num_buckets=num_buckets, buffer_size=buffer_size)
        if steps_per_epoch is not None:
            check_at_least(1, steps_per_epoch=steps_per_epoch)
        unknown = sorted(set(audio_sources) - set(SOURCE_TYPES))
        if unknown:
            raise ValueError(f"audio_sources must be some of {SOURCE_TYPES}, got {unknown}")
        self.audio_sources = tuple(audio_sources)
        self.num_buckets = num_buckets
        self.buffer_size = buffer_size
        self.steps_per_epoch = steps_per_epoch

    def setup(self, stage: str | None = None) -> None:
        """Make the tokenizer, if none was given, of the training texts."""
        train = self.corpus.manifests().train
        if train is not None and train.is_dir() != (self.steps_per_epoch is not None):
            raise ValueError(
                f"steps_per_epoch is for folders of shards, which need it: got "
                f"{self.steps_per_epoch} for {train}"
            )
        self.made_tokenizer()

    def _training_texts(self) -> Iterable[str]:
        texts = (cut_text(cut) for cut in open_texts(self.corpus.manifests().path("train")))
        return texts if self.text is None else map(self.text, texts)

    def _path(self, name: str) -> Path:
        return self.corpus.manifests().path(name)

    def _loader(self, name: str, *, training: bool = False) -> Any:
        path = self._path(name)
        dataset = CutDataset(
            self._speech([], training=training),
            audio_sources=self.audio_sources,
            channel=self.channel,
        )
        sizes = _LatticeSizes(self, name)
        constraint = LatticeConstraint(
            sizes.num_cells, max_cells=self.max_cells, max_utterances=self.max_utterances
        )
        prepare = _Prepare(
            self.made_tokenizer(),
            # A test set stays whole.
            _Feasible(sizes, name) if name in ("train", "val") else None,
            self.max_duration_s,
            text=self.text,
            each_channel=self.channel == "each",
        )
        bins = duration_bins(open_texts(path), self.num_buckets)
        trainer = self.trainer
        rank = 0 if trainer is None else trainer.global_rank
        world_size = 1 if trainer is None else trainer.world_size
        if training and path.is_dir():
            assert self.steps_per_epoch is not None  # setup checked it

            def stream(first_epoch: int) -> ShardBatches:
                seed = random.Random(f"{self.seed} {first_epoch}").getrandbits(32)
                return ShardBatches(
                    partial(_open_own_shards, path, prepare, seed),
                    dataset,
                    constraint,
                    bins=bins,
                    buffer_size=self.buffer_size,
                    seed=seed,
                )

            return ShardLoader(
                stream,
                steps_per_epoch=self.steps_per_epoch,
                rank=rank,
                world_size=world_size,
                num_workers=self.num_workers,
                pin_memory=self.pin_memory,
                seed=self.seed,
            )
        cuts = CutSet.from_shar(in_dir=path) if path.is_dir() else _open_cuts(path)
        sampler = CutBatchSampler(
            prepare(cuts),
            constraint,
            bins=bins,
            buffer_size=self.buffer_size,
            shuffle=training,
            seed=self.seed,
            rank=rank,
            world_size=world_size,
        )
        return ResumableLoader(
            dataset,
            batch_sampler=sampler,
            collate_fn=collate,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0 and not name.startswith("test/"),
            worker_init_fn=_init_worker,
            pin_memory=self.pin_memory,
        )


def open_texts(path: Path) -> CutSet:
    """Open the metadata of cuts, without their audio.

    Args:
        path: manifest of cuts (``.jsonl`` or ``.jsonl.gz``), or folder of shards.

    Raises:
        ValueError: ``path`` is neither.
    """
    if path.is_dir():
        shards = sorted(map(str, path.glob("cuts.*.jsonl*")))
        if not shards:
            raise ValueError(f"{path} holds no shards of Lhotse's cuts (cuts.*.jsonl.gz)")
        return CutSet.from_shar(fields={"cuts": shards})
    return _open_cuts(path)


def _open_cuts(path: Path) -> CutSet:
    if not path.is_file():  # opening a pipe would wait for a writer
        raise ValueError(f"{path} is no manifest of Lhotse's cuts, nor a file at all")
    try:
        cuts = load_manifest_lazy(path)
    except Exception as error:  # Lhotse raises many types of error for a line it did not write
        raise ValueError(
            f"{path} is no manifest of Lhotse's cuts (.jsonl or .jsonl.gz), as data=lhotse reads: "
            f"{type(error).__name__}: {error}"
        ) from error
    if not isinstance(cuts, CutSet):
        found = "nothing" if cuts is None else f"a {type(cuts).__name__}"
        raise ValueError(f"{path} is no manifest of Lhotse's cuts: it holds {found}")
    return cuts


def _open_own_shards(path: Path, prepare: _Prepare, seed: int, number: int) -> CutSet:
    """Open the shards that this worker of this process reads in pass ``number``."""
    cuts = CutSet.from_shar(
        in_dir=path,
        split_for_dataloading=True,
        shuffle_shards=True,
        stateful_shuffle=False,
        seed=seed + number,
    )
    return prepare(cuts)


class _LatticeSizes:
    """Computes encoder frames and lattice cells of cuts."""

    def __init__(self, data: TransducerDataModule, name: str) -> None:
        perturbation = data.waveform_perturbation if name == "train" else None
        self.max_speed = 1.0 if perturbation is None else perturbation.max_speed
        self.fbank = data.fbank
        self.num_output_frames = data.num_output_frames
        self.topology = data.topology

    def num_frames(self, cut: Cut, *, speed: float = 1.0) -> int:
        num_samples = round(cut.duration * self.fbank.sample_rate / speed)
        return self.num_output_frames(self.fbank.num_frames(num_samples))

    def num_cells(self, cut: Cut) -> int:
        """Return the lattice cells; a cut without an encoder frame, of a test set, is an error."""
        num_frames = self.num_frames(cut)
        if num_frames < 1:
            raise ValueError(f"cut {cut.id} is {self.too_short()}, got {cut.duration:.4g} s")
        return num_frames * (len(cut_targets(cut)) + 1)

    def too_short(self) -> str:
        least = self.max_speed * min_samples(self.fbank, self.num_output_frames)
        return too_short(least, self.fbank.sample_rate)


class _Prepare:
    """Encodes the texts of lazily read cuts, once each, and leaves out what cannot be trained on.

    Args:
        tokenizer: text to target symbols.
        feasible: which cuts stay; None keeps all.
        max_duration_s: with ``feasible``, longer cuts are left out too.
        text: normalizes the texts, or None.
        each_channel: whether each channel of a cut becomes a cut.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        feasible: _Feasible | None,
        max_duration_s: float | None,
        *,
        text: Callable[[str], str] | None,
        each_channel: bool,
    ) -> None:
        self.tokenizer = tokenizer
        self.feasible = feasible
        self.max_duration_s = max_duration_s
        self.text = text
        self.each_channel = each_channel

    def __call__(self, cuts: CutSet) -> CutSet:
        if self.each_channel:
            cuts = CutSet(LazyFlattener(LazyMapper(cuts, cuts_of_channels)))
        if self.feasible is None:
            return cuts.map(self._encode)
        if self.max_duration_s is not None:
            cuts = cuts.filter(self._is_short)
        return cuts.map(self._encode).filter(self.feasible)

    def _is_short(self, cut: Cut) -> bool:
        assert self.max_duration_s is not None
        return cut.duration <= self.max_duration_s

    def _encode(self, cut: Cut) -> Cut:
        if self.text is not None:
            text = self.text(cut_text(cut))
            cut = cut.map_supervisions(lambda supervision: fastcopy(supervision, text=text))
        # The references of a test set may have characters that the tokenizer lacks.
        return with_targets(cut, self.tokenizer, strict=self.feasible is not None)


class _Feasible:
    """Whether a cut keeps a path even at the highest speed of training."""

    def __init__(self, sizes: _LatticeSizes, name: str) -> None:
        self.sizes = sizes
        self.name = name
        self._said = False

    def __call__(self, cut: Cut) -> bool:
        sizes = self.sizes
        num_frames = sizes.num_frames(cut, speed=sizes.max_speed)
        feasible = is_feasible(num_frames, len(cut_targets(cut)), topology=sizes.topology)
        if not feasible and not self._said:
            self._said = True
            reason = f"too short for its text (topology {sizes.topology})"
            logger.warning(
                "%s: cut %s is %s and left out, like others",
                self.name,
                cut.id,
                reason if num_frames > 0 else sizes.too_short(),
            )
        return feasible
