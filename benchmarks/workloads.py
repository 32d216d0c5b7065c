# SPDX-License-Identifier: Apache-2.0
"""Utterance shapes and inputs that every implementation gets alike."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from transducer_toolkit import LatticeShape

# Frames after 4x subsampling of LibriSpeech train-clean-100, at percentiles 0, 5, ..., 100; a
# transcript has about 0.215 BPE-500 tokens a frame, with a spread of 0.04.
FRAME_QUANTILES = (31, 105, 160, 214, 256, 284, 302, 315, 326, 335, 343, 350, 357, 365, 373, 382,
                   391, 402, 416, 432, 680)  # fmt: skip
TOKENS_PER_FRAME, TOKENS_PER_FRAME_SPREAD = 0.215, 0.04
# The output layer's weights, and logits that are given, are multiplied by this: an untrained
# model's lattice, where every path counts, or lattices on which few do.
LATTICE_SCALES = {"initial": 1.0, "x3": 3.0, "peaky": 12.0}
# The joiner of a model that knows where each symbol is spoken (known_alignment).
TRAINED = "trained"
LATTICES = (*LATTICE_SCALES, TRAINED)
NOISE = 0.5  # standard deviation of the encoder's output; that of the predictor's is 1
LABEL_GAIN, BLANK_BIAS = 60.0, 12.0  # a spoken label's logit is about 25, other labels' about 3
SCALING_FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)
MEMORY_FACTORS = (1.0, 2.0, 4.0, 6.0, 8.0, 10.0)
SCALING_UTTERANCES = 4
SERIES = ("cells", "V", "D", "T")  # what grows, T at fixed U
BEAM = 4  # hypotheses of the beam searches


@dataclass(frozen=True)
class Workload:
    """One batch: its lattices, the sizes of everything around them, and where it lives."""

    frames: tuple[int, ...]
    symbols: tuple[int, ...]
    vocab_size: int
    joiner_dim: int
    lattice: str = "initial"
    device: str = "cpu"
    band_width: int = 5  # R, of the pruned losses
    logits_scale: float = 1.0
    seed: int = 0

    @property
    def shape(self) -> LatticeShape:
        return LatticeShape.from_lengths(self.frames, self.symbols)

    @property
    def band_cells(self) -> int:
        """Cells of the band of the pruned losses, as they are stored: padded."""
        return len(self.frames) * max(self.frames) * min(self.band_width, max(self.symbols) + 1)

    def targets(self) -> Tensor:
        """(B, U) int64; padding is a legal label, which some peers need."""
        generator = torch.Generator().manual_seed(self.seed)
        size = (len(self.symbols), max(self.symbols))
        return torch.randint(1, self.vocab_size, size, generator=generator).to(self.device)

    def logits(self) -> Tensor:
        """Packed (cells, V). There is no trained lattice without a joiner."""
        generator = torch.Generator().manual_seed(self.seed + 1)
        logits = torch.randn(self.shape.num_cells, self.vocab_size, generator=generator)
        return (LATTICE_SCALES[self.lattice] * self.logits_scale * logits).to(self.device)

    def joiner_inputs(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """enc (B, T, D), pred (B, U + 1, D), weight (V, D), bias (V,)."""
        generator = torch.Generator().manual_seed(self.seed + 2)
        shape, width = self.shape, self.joiner_dim
        batch = shape.num_utterances
        if self.lattice == TRAINED:
            inputs = known_alignment(self, generator)
            return tuple(tensor.to(self.device) for tensor in inputs)  # type: ignore[return-value]
        scale = LATTICE_SCALES[self.lattice] / width**0.5
        inputs = (
            torch.randn(batch, shape.max_frames, width, generator=generator),
            torch.randn(batch, shape.max_targets + 1, width, generator=generator),
            torch.randn(self.vocab_size, width, generator=generator) * scale,
            torch.zeros(self.vocab_size),
        )
        return tuple(tensor.to(self.device) for tensor in inputs)  # type: ignore[return-value]

    def simple_projections(self) -> tuple[Tensor, Tensor]:
        """(V, D) each: from enc and from pred to the addends of the simple joiner's logits."""
        generator = torch.Generator().manual_seed(self.seed + 3)
        size = (2, self.vocab_size, self.joiner_dim)
        if self.lattice == TRAINED:  # the same weight finds the same alignment
            weight = self.joiner_inputs()[2]
            return weight, weight.clone()
        scale = LATTICE_SCALES[self.lattice] / self.joiner_dim**0.5
        am, lm = (torch.randn(size, generator=generator) * scale).to(self.device)
        return am, lm


def known_alignment(
    workload: Workload, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The inputs of a joiner that knows where each symbol is spoken.

    The predictor's output d(y) after symbol y is random. Where y is spoken, the encoder's output is
    -d(y) and noise, elsewhere only noise. The output layer's row of y is a multiple of -d(y), and
    blank has a bias. So y leads where it is spoken, and blank leads everywhere else, also on that
    frame after y, when the two cancel.
    """
    width, vocab_size, targets = workload.joiner_dim, workload.vocab_size, workload.targets().cpu()
    after = torch.randn(vocab_size, width, generator=generator)  # d(y)
    after -= after.mean(0)
    size = len(workload.frames), max(workload.frames), width
    enc = NOISE * torch.randn(size, generator=generator)
    for b, (frames, symbols) in enumerate(zip(workload.frames, workload.symbols, strict=True)):
        order = torch.randperm(frames, generator=generator)
        spoken = order.repeat(-(-symbols // frames))[:symbols].sort().values
        enc[b].index_add_(0, spoken, after[targets[b, :symbols]], alpha=-1)
    pred = torch.cat([torch.zeros(size[0], 1, width), after[targets]], 1)
    weight = -LABEL_GAIN / width * after
    weight[0] = 0
    bias = torch.zeros(vocab_size)
    bias[0] = BLANK_BIAS
    return enc, pred, weight, bias


def utterance_shapes(path: Path | None, count: int = 20_000, seed: int = 0) -> np.ndarray:
    """(N, 2) frames and symbols: the rows of a .npy file, or drawn from the built-in quantiles."""
    if path is not None:
        shapes = np.load(path).astype(np.int64)
        if shapes.ndim != 2 or shapes.shape[1] != 2:
            raise ValueError(f"shapes: expected (N, 2) frames and symbols, got {shapes.shape}")
        return shapes
    random = np.random.default_rng(seed)
    percentiles = np.linspace(0, 100, len(FRAME_QUANTILES))
    frames = np.interp(random.uniform(0, 100, count), percentiles, FRAME_QUANTILES).astype(np.int64)
    rate = random.normal(TOKENS_PER_FRAME, TOKENS_PER_FRAME_SPREAD, count).clip(0.05, 0.4)
    return np.stack([frames, np.maximum(1, frames * rate).astype(np.int64)], 1)


def choose_batch(shapes: np.ndarray, *, max_frames: int, batch: str) -> np.ndarray:
    """(B, 2): at most `max_frames` frames in all, but at least one utterance.

    "sorted": neighbours from the middle of the corpus sorted by length, so that there is little
    padding; "unsorted": utterances drawn at random (30 of them are about 10,000 frames).
    """
    if batch == "sorted":
        order = np.argsort(shapes[:, 0], kind="stable")[len(shapes) // 2 :]
    else:
        order = np.random.default_rng(0).permutation(len(shapes))
    within = np.cumsum(shapes[order, 0]) <= max_frames
    return shapes[order[: max(1, int(within.sum()))]]


def memory_workloads(
    base: Workload, max_frames: int, factors: tuple[float, ...]
) -> Iterator[tuple[str, int, Workload]]:
    """("V", V, workload): one utterance of `max_frames` frames while the vocabulary grows."""
    symbols = max(1, round(max_frames * TOKENS_PER_FRAME))
    for factor in factors:
        vocab_size = max(2, round(base.vocab_size * factor))
        yield (
            "V",
            vocab_size,
            replace(base, frames=(max_frames,), symbols=(symbols,), vocab_size=vocab_size),
        )


def scaling_workloads(
    base: Workload,
    max_frames: int,
    factors: tuple[float, ...],
    series: Sequence[str] = SERIES,
) -> Iterator[tuple[str, int, Workload]]:
    """(variable, its value, workload): one of the variables in `series` grows, the others stay.

    At factor 1, each series is at four utterances of equal length, `max_frames` frames in all, with
    V and D as in `base`. Cells grow by adding utterances; T grows at fixed U.
    """
    frames = max(4, max_frames // SCALING_UTTERANCES)
    symbols = max(1, round(frames * TOKENS_PER_FRAME))

    def grown(variable: str, factor: float) -> tuple[int, Workload]:
        def times(variable_of_size: str, size: int, least: int = 1) -> int:
            return max(least, round(size * factor)) if variable == variable_of_size else size

        lengths = (times("T", frames),) * times("cells", SCALING_UTTERANCES)
        workload = replace(
            base,
            frames=lengths,
            symbols=(symbols,) * len(lengths),
            vocab_size=times("V", base.vocab_size, least=2),
            joiner_dim=times("D", base.joiner_dim),
        )
        values = {
            "cells": workload.shape.num_cells,
            "V": workload.vocab_size,
            "D": workload.joiner_dim,
            "T": lengths[0],
        }
        return values[variable], workload

    for variable in series:
        for factor in factors:
            yield variable, *grown(variable, factor)
