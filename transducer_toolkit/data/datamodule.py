# SPDX-License-Identifier: Apache-2.0
"""The Lightning data module: makes batches of a corpus."""

from __future__ import annotations

import dataclasses
import logging
import math
import os
import signal
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import lightning
import torch

from transducer_toolkit.data.alignments import Alignments
from transducer_toolkit.data.audio import check_channel
from transducer_toolkit.data.augment import SpecAugment, WaveformPerturbation
from transducer_toolkit.data.batching import LatticeBatchSampler
from transducer_toolkit.data.corpus import Corpus
from transducer_toolkit.data.dataset import SpeechDataset, check_on_bad_audio, collate
from transducer_toolkit.data.encoder_frames import EncoderFrames, min_samples, too_short
from transducer_toolkit.data.features import Fbank
from transducer_toolkit.data.loader import ResumableLoader
from transducer_toolkit.data.manifest import Utterance, read_manifest
from transducer_toolkit.data.target_ids import TargetIds
from transducer_toolkit.data.text import normalize_utterances
from transducer_toolkit.data.tokenizer import (
    UNKNOWN_SYMBOL,
    CharTokenizer,
    Tokenizer,
    TokenizerFactory,
    check_tokenizer,
    unknown_characters,
    unknown_ids,
)
from transducer_toolkit.ops.checks import check_at_least, check_int, check_number
from transducer_toolkit.ops.topology import get_topology, is_feasible

__all__ = ["TransducerDataModule"]

logger = logging.getLogger(__name__)


class TransducerDataModule(lightning.LightningDataModule):
    """Makes batches for training, validation and any number of named test sets.

    The trainer needs ``use_distributed_sampler=False``: the batches are already distributed.
    Utterances without a path through their lattice are dropped from training and validation, and
    the log says how many. Test sets are never shortened.

    Args:
        corpus: the corpus; one process per node prepares it, all processes read it.
        fbank: waveform to features; None is ``Fbank()``.
        tokenizer: a tokenizer, or a function that makes one of the training texts, such as
            ``CharTokenizer.from_texts``, the default.
        text: normalizes the texts of all sets before anything else reads them, such as a
            :class:`~transducer_toolkit.data.text.TextNormalizer`; None keeps them.
        channel: channel of utterances whose manifest does not name one: "mix" averages the channels
            of the file, a number selects one, from 0, and "each" makes an utterance of each
            channel, with ``#`` and the number added to its id.
        waveform_perturbation: augments the waveforms of the training set; None for none.
        spec_augment: augments the features of the training set; None for none.
        num_output_frames: feature frames to encoder frames, the encoder's method of this name. It
            may be set later, as the attribute, but is needed before ``setup("fit")`` and before any
            loader is made.
        max_cells: bound on the lattice cells ``sum_b T_b * (U_b + 1)`` of a batch, T in encoder
            frames.
        max_utterances: bound on the utterances of a batch.
        topology: topology of the loss, which decides whether an utterance has a path; see
            :func:`~transducer_toolkit.data.batching.is_feasible`.
        num_workers: processes per loader that read and augment; 0 reads in the training process.
        on_bad_audio: ``"raise"`` ends the training at audio that cannot be read. ``"skip"`` leaves
            it out, and :class:`~transducer_toolkit.training.callbacks.CountUnreadable` counts it.
            Validation and test always raise.
        max_duration_s: longer utterances are dropped from training and validation; the log says how
            many. None for no bound.
        pin_memory: whether batches are page-locked, for faster copies to a GPU; None means yes if
            CUDA is available.
        seed: seed of shuffling and augmentation.
        alignment_dir: folder with an alignment of each utterance of the training set, such as the
            ``--output-dir`` of ``transducer-align``; see
            :class:`~transducer_toolkit.data.alignments.Alignments`. None for none.

    Attributes:
        tokenizer: the tokenizer; None before :meth:`made_tokenizer` has made it.

    Raises:
        TypeError: an option is of another type, such as the name of a tokenizer.
        ValueError: a number is out of range, ``topology`` or ``on_bad_audio`` is unknown; (by
            ``setup``) no utterance is left, a text has unknown characters, or
            ``num_output_frames`` is missing.

    Example:
        >>> corpus = ManifestCorpus(train="train.jsonl", val="dev.jsonl")  # doctest: +SKIP
        >>> data = TransducerDataModule(corpus=corpus, max_cells=40_000)  # doctest: +SKIP
        >>> data.prepare_data()  # doctest: +SKIP
        >>> model = make_model(data.made_tokenizer().vocab_size)  # doctest: +SKIP
        >>> data.num_output_frames = model.encoder.num_output_frames  # doctest: +SKIP
    """

    def __init__(
        self,
        *,
        corpus: Corpus,
        fbank: Fbank | None = None,
        tokenizer: Tokenizer | TokenizerFactory = CharTokenizer.from_texts,
        text: Callable[[str], str] | None = None,
        channel: int | str = "mix",
        waveform_perturbation: WaveformPerturbation | None = None,
        spec_augment: SpecAugment | None = None,
        num_output_frames: Callable[[int], int] | None = None,
        max_cells: int,
        max_utterances: int = 64,
        topology: str = "regular",
        num_workers: int = 0,
        on_bad_audio: str = "raise",
        max_duration_s: float | None = None,
        pin_memory: bool | None = None,
        seed: int = 0,
        alignment_dir: str | os.PathLike[str] | None = None,
    ) -> None:
        super().__init__()
        check_at_least(1, max_cells=max_cells, max_utterances=max_utterances)
        check_at_least(0, num_workers=num_workers)
        get_topology(topology)
        check_on_bad_audio(on_bad_audio)
        check_channel(channel)
        if max_duration_s is not None:
            check_number(max_duration_s, "max_duration_s")
            if not max_duration_s > 0:
                raise ValueError(f"max_duration_s must be positive or None, got {max_duration_s}")
        check_int(seed, "seed")
        check_tokenizer(tokenizer)
        self.corpus = corpus
        self.fbank = Fbank() if fbank is None else fbank
        self.tokenizer: Tokenizer | None = None
        if callable(tokenizer):
            self._make_tokenizer = tokenizer
        else:
            self.tokenizer = tokenizer
        self.text = text
        self.channel = channel
        self.waveform_perturbation = waveform_perturbation
        self.spec_augment = spec_augment
        self.max_cells = max_cells
        self.max_utterances = max_utterances
        self.topology = topology
        self.num_workers = num_workers
        self.on_bad_audio = on_bad_audio
        self.max_duration_s = max_duration_s
        self.pin_memory = torch.cuda.is_available() if pin_memory is None else pin_memory
        self.seed = seed
        self.alignments = None if alignment_dir is None else Alignments(alignment_dir)
        self._utterances: dict[str, list[Utterance]] = {}
        self._targets: dict[str, TargetIds] = {}
        self._train_position: dict[str, Any] | None = None  # of a checkpoint
        self._encoder_frames: EncoderFrames | None = None
        if num_output_frames is not None:
            self.num_output_frames = num_output_frames

    @property
    def num_output_frames(self) -> Callable[[int], int]:
        """Feature frames to encoder frames, as the encoder has it.

        Raises:
            ValueError: it was not set yet.
        """
        if self._encoder_frames is None:
            raise ValueError(
                "num_output_frames: expected the encoder's method, got None: the encoder decides "
                "which utterances have a path and how large their lattices are; set "
                "data.num_output_frames = model.encoder.num_output_frames"
            )
        return self._encoder_frames

    @num_output_frames.setter
    def num_output_frames(self, num_output_frames: Callable[[int], int]) -> None:
        self._encoder_frames = EncoderFrames(num_output_frames)
        # Sets that were read for another encoder may lack utterances, or have too many.
        self._utterances.clear()
        self._targets.clear()

    def prepare_data(self) -> None:
        """Prepare the corpus (Lightning calls this in one process per node)."""
        self.corpus.prepare()

    def setup(self, stage: str | None = None) -> None:
        """Read the manifests of a stage: "fit", "validate", "test", or None for all.

        Lightning calls this before each stage; every manifest is read once.
        """
        manifests = self.corpus.manifests()
        self.made_tokenizer()
        if stage in (None, "fit"):
            self._read_feasible("train", manifests.path("train"))
        if stage in (None, "fit", "validate") and self.validates:
            self._read_feasible("val", manifests.path("val"))
        if stage in (None, "test"):
            for name, path in manifests.test.items():
                if f"test/{name}" not in self._utterances:
                    utterances = self._read(path)
                    _check_not_empty(name, path, utterances)
                    self._utterances[f"test/{name}"] = utterances

    @property
    def validates(self) -> bool:
        """Whether the corpus has a manifest for validation."""
        return self.corpus.manifests().val is not None

    @property
    def test_names(self) -> list[str]:
        """Names of the test sets, in the order of ``test_dataloader``."""
        return list(self.corpus.manifests().test)

    def train_dataloader(self) -> ResumableLoader:
        """Return shuffled, augmented batches; after a resume, those that the checkpoint lacks."""
        loader = self._loader("train", training=True)
        if self._train_position is not None:
            loader.load_state_dict(self._train_position)
        return loader

    def state_dict(self) -> dict[str, Any]:
        """Return the position of the training in its epoch, for Lightning's checkpoints."""
        # Lightning restores a loader itself only if the loader is made after the checkpoint is
        # read. A schedule that asks for the number of steps makes the loader earlier.
        loader = None if self.trainer is None else self.trainer.train_dataloader
        return {"train": loader.state_dict()} if isinstance(loader, ResumableLoader) else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Make the next training loader continue at the position of a checkpoint."""
        self._train_position = state_dict.get("train")

    def val_dataloader(self) -> ResumableLoader:
        """Return batches sorted by length, longest first."""
        return self._loader("val")

    def test_dataloader(self) -> list[ResumableLoader]:
        """Return one loader per test set, in the order of ``test_names``."""
        return [self._loader(f"test/{name}") for name in self.test_names]

    def made_tokenizer(self) -> Tokenizer:
        """Return the tokenizer; if none was given, the first call makes one of the training texts.

        The corpus must be prepared (:meth:`prepare_data`).
        """
        if self.tokenizer is None:
            self.tokenizer = self._make_tokenizer(self._training_texts())
        return self.tokenizer

    def _training_texts(self) -> Iterable[str]:
        train = self.corpus.manifests().path("train")
        return (utterance.text for utterance in self._read(train))

    def _read(self, path: Path) -> list[Utterance]:
        """Read a manifest, with normalized texts and the channels of this module."""
        utterances = read_manifest(path, channel=self.channel)
        return utterances if self.text is None else normalize_utterances(utterances, self.text)

    def dataset(self, name: str, *, training: bool = False) -> SpeechDataset:
        """Return the dataset "train", "val" or "test/<name>"; ``training`` augments it."""
        if name not in self._utterances:
            raise ValueError(f"no set {name!r} is set up, only {sorted(self._utterances)}")
        targets = self._targets.get(name)
        return self._speech(self._utterances[name], targets, training=training)

    def use_features(self, features: Any) -> None:
        """Compute the features of an encoder that has its own, instead of ``fbank``.

        Args:
            features: an object with the interface of ``Fbank``.

        Raises:
            ValueError: frames of samples would be augmented as if they were spectra.
        """
        if getattr(features, "is_waveform", False) and self.spec_augment is not None:
            raise ValueError(
                "data.spec_augment: expected null, because the encoder reads waveforms; set "
                "data.spec_augment=null and data.waveform_perturbation"
            )
        self.fbank = features

    def _speech(
        self, utterances: list[Utterance], targets: TargetIds | None = None, *, training: bool
    ) -> SpeechDataset:
        return SpeechDataset(
            utterances,
            self.made_tokenizer(),
            self.fbank,
            targets=targets,
            waveform_perturbation=self.waveform_perturbation if training else None,
            spec_augment=self.spec_augment if training else None,
            seed=self.seed,
            on_bad_audio=self.on_bad_audio if training else "raise",
            alignments=self.alignments if training else None,
        )

    def _loader(self, name: str, *, training: bool = False) -> ResumableLoader:
        if name in self._utterances and name not in self._targets:  # of a test set
            self._encode_tests(name)
        dataset = self.dataset(name, training=training)
        trainer = self.trainer
        sampler = LatticeBatchSampler(
            [self._num_frames(utterance) for utterance in dataset.utterances],
            self._targets[name].lengths,
            num_output_frames=self.num_output_frames,
            max_cells=self.max_cells,
            max_utterances=self.max_utterances,
            shuffle=training,
            seed=self.seed,
            rank=0 if trainer is None else trainer.global_rank,
            world_size=1 if trainer is None else trainer.world_size,
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

    def _num_frames(self, utterance: Utterance, *, speed: float = 1.0) -> int:
        num_samples = round(utterance.duration_s * self.fbank.sample_rate / speed)
        return self.fbank.num_frames(num_samples)

    def _read_feasible(self, name: str, path: Path) -> None:
        """Read the utterances that have a path even at the highest speed of the augmentation."""
        if name in self._utterances:
            return
        perturbation = self.waveform_perturbation if name == "train" else None
        speed = 1.0 if perturbation is None else perturbation.max_speed
        targets = TargetIds(self.made_tokenizer().vocab_size)
        num_output_frames = self.num_output_frames
        kept: list[Utterance] = []
        dropped: list[Utterance] = []
        without_frames: list[Utterance] = []
        unwritable: list[Utterance] = []
        unknown = unknown_ids(self.made_tokenizer())
        for utterance in self._not_too_long(name, self._read(path)):
            num_frames = num_output_frames(self._num_frames(utterance, speed=speed))
            ids = self._encode(utterance)
            if not unknown.isdisjoint(ids):
                unwritable.append(utterance)
            if is_feasible(num_frames, len(ids), topology=self.topology):
                kept.append(utterance)
                targets.append(ids)
            elif num_frames < 1:
                without_frames.append(utterance)
            else:
                dropped.append(utterance)
        least = speed * min_samples(self.fbank, num_output_frames)
        for utterances, reason in (
            (without_frames, too_short(least, self.fbank.sample_rate)),
            (dropped, f"too short for their text (topology {self.topology})"),
        ):
            if utterances:
                logger.warning(
                    "%s: dropped %d of %d utterances that are %s, e.g. %s",
                    name,
                    len(utterances),
                    len(kept) + len(dropped) + len(without_frames),
                    reason,
                    ", ".join(utterance.id for utterance in utterances[:3]),
                )
        if unwritable:
            self._warn_of_unknown(name, unwritable)
        _check_not_empty(name, path, kept)
        if name == "train" and self.alignments is not None:
            self.alignments.require([utterance.id for utterance in kept])
        self._utterances[name] = kept
        self._targets[name] = targets

    def _warn_of_unknown(self, name: str, utterances: list[Utterance]) -> None:
        """Log how many texts have characters that are ``<unk>``, and which characters."""
        found: Counter[str] = Counter()
        for utterance in utterances:
            found.update(unknown_characters(self.made_tokenizer(), utterance.text))
        shown = ", ".join(repr(character) for character, _ in found.most_common(20))
        logger.warning(
            "%s: %d texts have characters that the model cannot write and learns as %s, e.g. %s: "
            "%s%s; data.text can change texts, another tokenizer has other symbols",
            name,
            len(utterances),
            UNKNOWN_SYMBOL,
            utterances[0].id,
            shown,
            " and others" if len(found) > 20 else "",
        )

    def _not_too_long(self, name: str, utterances: list[Utterance]) -> list[Utterance]:
        limit_s = math.inf if self.max_duration_s is None else self.max_duration_s
        kept = [utterance for utterance in utterances if utterance.duration_s <= limit_s]
        if len(kept) < len(utterances):
            longest = max(utterances, key=lambda utterance: utterance.duration_s)
            logger.warning(
                "%s: dropped %d of %d utterances longer than %g s, the longest is %s with %.0f s",
                name,
                len(utterances) - len(kept),
                len(utterances),
                limit_s,
                longest.id,
                longest.duration_s,
            )
        return kept

    def _encode_tests(self, name: str) -> None:
        """Encode the texts of a test set; the targets only decide batches and symbol delays.

        A text that the tokenizer cannot encode stays a reference, without targets and word times.
        """
        tokenizer, utterances = self.made_tokenizer(), self._utterances[name]
        least, rate = min_samples(self.fbank, self.num_output_frames), self.fbank.sample_rate
        self._targets[name] = TargetIds(tokenizer.vocab_size)
        for position, utterance in enumerate(utterances):
            if round(utterance.duration_s * rate) < least:
                raise ValueError(
                    f"utterance {utterance.id!r} of {name} is {too_short(least, rate)}, got "
                    f"{utterance.duration_s:.4g} s"
                )
            try:
                ids = tokenizer.encode(utterance.text)
            except ValueError:
                ids = []
                utterances[position] = dataclasses.replace(utterance, word_starts_s=None)
            self._targets[name].append(ids)

    def _encode(self, utterance: Utterance) -> list[int]:
        try:
            return self.made_tokenizer().encode(utterance.text)
        except ValueError as error:
            raise ValueError(f"utterance {utterance.id!r}: {error}") from error


def _check_not_empty(name: str, path: Path, utterances: list[Utterance]) -> None:
    if not utterances:
        raise ValueError(f"set {name!r} has no usable utterances in {path}")


def _init_worker(worker_id: int) -> None:
    # A terminal sends Ctrl-C to all processes, but the training still needs data for its last step.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Workers and training share the CPUs; with more threads, features were a hundred times slower.
    torch.set_num_threads(1)
