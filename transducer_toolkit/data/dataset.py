# SPDX-License-Identifier: Apache-2.0
"""The dataset: reads manifest rows as features and targets and collates them to batches."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from transducer_toolkit.data.alignments import Alignments
from transducer_toolkit.data.audio import read_audio
from transducer_toolkit.data.augment import SpecAugment, WaveformPerturbation
from transducer_toolkit.data.batching import EpochIndex
from transducer_toolkit.data.features import Fbank
from transducer_toolkit.data.keyed_random import keyed_generator
from transducer_toolkit.data.manifest import Utterance
from transducer_toolkit.data.target_ids import TargetIds
from transducer_toolkit.data.tokenizer import Tokenizer

__all__ = ["TARGET_PADDING", "Batch", "Example", "SpeechDataset", "collate"]

TARGET_PADDING = -1


@dataclass(frozen=True)
class Example:
    """One utterance: features ``(T_in, F)`` float32 and targets ``(U,)`` int64.

    ``token_times_s`` are the times of the targets in the features, or None.
    """

    utterance: Utterance
    features: Tensor
    targets: Tensor
    token_times_s: list[float] | None = None


@dataclass(frozen=True)
class Unreadable:
    """Stands for an utterance that cannot be read, and says why."""

    utterance_id: str
    reason: str


@dataclass  # not frozen: Lightning's true half and double precision convert batches in place
class Batch:
    """A batch of padded utterances.

    The lengths stay on the CPU, where the shape of the lattices is computed.

    Attributes:
        utterance_ids: ids in the manifest, B of them.
        texts: references.
        features: float32 ``(B, T_in, F)``, zero in the padding.
        feature_lengths: int64 ``(B,)``, CPU, in input frames.
        targets: int64 ``(B, U)``, -1 in the padding.
        target_lengths: int64 ``(B,)``, CPU.
        word_starts_s: start of each word of each text, in seconds, as the manifest gives it (a
            speed perturbation does not change it); None for utterances without word times.
        unreadable: ids of the utterances that were left out, with the reasons; see
            :class:`SpeechDataset`.
        token_times_s: time of each target of each utterance in its alignment, in seconds of the
            features (after a speed perturbation); empty without alignments.
    """

    utterance_ids: list[str]
    texts: list[str]
    features: Tensor
    feature_lengths: Tensor
    targets: Tensor
    target_lengths: Tensor
    word_starts_s: list[Sequence[float] | None] = field(default_factory=list)
    unreadable: dict[str, str] = field(default_factory=dict)
    token_times_s: list[list[float]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.utterance_ids)

    def to(self, device: torch.device | str | int, *, non_blocking: bool = True) -> Batch:
        """Return the batch with features and targets on ``device``; lengths stay on the CPU.

        If the batch is pinned, the copy to a GPU runs while the CPU continues.
        """
        return dataclasses.replace(
            self,
            features=self.features.to(device, non_blocking=non_blocking),
            targets=self.targets.to(device, non_blocking=non_blocking),
        )

    def pin_memory(self) -> Batch:
        """Return the batch with features and targets in page-locked memory."""
        return dataclasses.replace(
            self, features=self.features.pin_memory(), targets=self.targets.pin_memory()
        )


def check_on_bad_audio(on_bad_audio: str) -> None:
    """Raise a ValueError unless ``on_bad_audio`` is "raise" or "skip"."""
    if on_bad_audio not in ("raise", "skip"):
        raise ValueError(f"on_bad_audio must be 'raise' or 'skip', got {on_bad_audio!r}")


class SpeechDataset(Dataset[Example]):
    """Utterances of a manifest as features and targets, augmented on request.

    Args:
        utterances: manifest rows with resolved audio paths.
        tokenizer: text to target symbols.
        fbank: waveform to features.
        targets: the encoded texts of ``utterances``; None encodes a text whenever it is read.
        waveform_perturbation: applied to the waveform, or None.
        spec_augment: applied to the features, or None.
        seed: seed of the augmentation, which depends on seed, epoch and utterance id only.
        on_bad_audio: ``"raise"`` raises an error for audio that cannot be read. ``"skip"`` leaves
            such utterances out of the batch and lists them in ``Batch.unreadable``. If no utterance
            of a batch can be read, the next readable one of the manifest replaces them: with
            several processes, each must have a batch in every step.
        alignments: the times of the targets; None for none.

    Raises:
        ValueError: ``on_bad_audio`` is unknown; (on access) audio is missing, unreadable, too
            short or not finite, or the tokenizer lacks a character of a text. The message names
            the utterance.

    Example:
        >>> dataset = SpeechDataset(read_manifest("train.jsonl"), tokenizer, Fbank())
        ... # doctest: +SKIP
        >>> dataset[EpochIndex(epoch=0, position=3)].features.shape  # doctest: +SKIP
        torch.Size([214, 80])
    """

    def __init__(
        self,
        utterances: Sequence[Utterance],
        tokenizer: Tokenizer,
        fbank: Fbank,
        *,
        targets: TargetIds | None = None,
        waveform_perturbation: WaveformPerturbation | None = None,
        spec_augment: SpecAugment | None = None,
        seed: int = 0,
        on_bad_audio: str = "raise",
        alignments: Alignments | None = None,
    ) -> None:
        check_on_bad_audio(on_bad_audio)
        self.utterances = list(utterances)
        self.tokenizer = tokenizer
        self.fbank = fbank
        self.targets = targets
        self.waveform_perturbation = waveform_perturbation
        self.spec_augment = spec_augment
        self.seed = seed
        self.on_bad_audio = on_bad_audio
        self.alignments = alignments

    def __len__(self) -> int:
        return len(self.utterances)

    def __getitem__(self, key: EpochIndex | int) -> Example:
        epoch, position = key if isinstance(key, tuple) else (0, key)
        utterance = self.utterances[position]
        try:
            waveform = read_audio(
                utterance.audio,
                offset_s=utterance.offset_s,
                duration_s=utterance.duration_s,
                sample_rate=self.fbank.sample_rate,
                channel=utterance.channel,
            )
            targets = None if self.targets is None else self.targets[position]
            return self.example(utterance, waveform, epoch, targets=targets)
        except (ValueError, OSError) as error:
            raise ValueError(f"utterance {utterance.id!r}: {error}") from error

    def __getitems__(self, keys: Sequence[EpochIndex]) -> list[Example | Unreadable]:
        """Read the utterances of a batch (called by DataLoader)."""
        if self.on_bad_audio == "raise":
            return [self[key] for key in keys]
        examples: list[Example | Unreadable] = [self._try(key) for key in keys]
        position = keys[-1].position
        for _ in range(len(self)):
            if any(isinstance(example, Example) for example in examples):
                return examples
            position = (position + 1) % len(self)
            examples.append(self._try(EpochIndex(keys[-1].epoch, position)))
        raise ValueError(f"none of {len(self)} utterances can be read, the last: {examples[-1]}")

    def _try(self, key: EpochIndex) -> Example | Unreadable:
        try:
            return self[key]
        except ValueError as error:
            return Unreadable(self.utterances[key.position].id, str(error))

    def example(
        self,
        utterance: Utterance,
        waveform: Tensor,
        epoch: int,
        *,
        targets: Tensor | None = None,
    ) -> Example:
        """Augment a waveform for an epoch and turn it into features.

        Args:
            utterance: the utterance; its id seeds the augmentation.
            waveform: float32 ``(num_samples,)`` at ``fbank.sample_rate``.
            epoch: epoch of the training.
            targets: the encoded text, (U,) int64; None encodes it here.
        """
        num_samples = len(waveform)
        if self.waveform_perturbation is not None:
            rng = keyed_generator(self.seed, epoch, utterance.id, "waveform")
            waveform = self.waveform_perturbation(waveform, rng)
        features = self.fbank(waveform)
        if not bool(torch.isfinite(features).all()):
            raise ValueError(f"{utterance.audio} holds samples that are NaN, infinite or huge")
        if self.spec_augment is not None:
            rng = keyed_generator(self.seed, epoch, utterance.id, "features")
            features = self.spec_augment(features, rng)
        if targets is None:
            targets = torch.tensor(self.tokenizer.encode(utterance.text), dtype=torch.int64)
        if self.alignments is None:
            return Example(utterance, features, targets)
        symbols = [self.tokenizer.symbols[token] for token in targets.tolist()]
        duration_s = num_samples / self.fbank.sample_rate
        times_s = self.alignments.times_s(utterance.id, symbols, duration_s)
        stretch = len(waveform) / num_samples  # by a speed perturbation
        return Example(utterance, features, targets, [time_s * stretch for time_s in times_s])


def collate(items: Sequence[Example | Unreadable]) -> Batch:
    """Pad examples into one batch.

    Raises:
        ValueError: there are no examples.
    """
    examples = [item for item in items if isinstance(item, Example)]
    if not examples:
        raise ValueError("examples must not be empty")
    features = [example.features for example in examples]
    targets = [example.targets for example in examples]
    return Batch(
        utterance_ids=[example.utterance.id for example in examples],
        texts=[example.utterance.text for example in examples],
        features=pad_sequence(features, batch_first=True),
        feature_lengths=torch.tensor([len(f) for f in features], dtype=torch.int64),
        targets=pad_sequence(targets, batch_first=True, padding_value=TARGET_PADDING),
        target_lengths=torch.tensor([len(t) for t in targets], dtype=torch.int64),
        word_starts_s=[example.utterance.word_starts_s for example in examples],
        unreadable={
            item.utterance_id: item.reason for item in items if isinstance(item, Unreadable)
        },
        token_times_s=[it.token_times_s for it in examples if it.token_times_s is not None],
    )
