# SPDX-License-Identifier: Apache-2.0
"""Utterance shapes and inputs that every implementation gets alike."""

from __future__ import annotations

from dataclasses import dataclass
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


@dataclass(frozen=True)
class Workload:
    """One batch: its lattices and the sizes of everything around them."""

    frames: tuple[int, ...]
    symbols: tuple[int, ...]
    vocab_size: int
    joiner_dim: int
    seed: int = 0

    @property
    def shape(self) -> LatticeShape:
        return LatticeShape.from_lengths(self.frames, self.symbols)

    def targets(self) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        size = (len(self.symbols), max(self.symbols))
        return torch.randint(1, self.vocab_size, size, generator=generator)

    def logits(self) -> Tensor:
        """Packed (cells, V), as an untrained joiner makes them."""
        generator = torch.Generator().manual_seed(self.seed + 1)
        return torch.randn(self.shape.num_cells, self.vocab_size, generator=generator)

    def joiner_inputs(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """enc (B, T, D), pred (B, U + 1, D), weight (V, D), bias (V,)."""
        generator = torch.Generator().manual_seed(self.seed + 2)
        shape, width = self.shape, self.joiner_dim
        batch = shape.num_utterances
        return (
            torch.randn(batch, shape.max_frames, width, generator=generator),
            torch.randn(batch, shape.max_targets + 1, width, generator=generator),
            torch.randn(self.vocab_size, width, generator=generator) / width**0.5,
            torch.zeros(self.vocab_size),
        )


def utterance_shapes(path: Path | None, count: int = 20_000, seed: int = 0) -> np.ndarray:
    """(N, 2) frames and symbols: the rows of a .npy file, or drawn from the built-in quantiles."""
    if path is not None:
        return np.load(path).astype(np.int64)
    random = np.random.default_rng(seed)
    percentiles = np.linspace(0, 100, len(FRAME_QUANTILES))
    frames = np.interp(random.uniform(0, 100, count), percentiles, FRAME_QUANTILES).astype(np.int64)
    rate = random.normal(TOKENS_PER_FRAME, TOKENS_PER_FRAME_SPREAD, count).clip(0.05, 0.4)
    return np.stack([frames, np.maximum(1, frames * rate).astype(np.int64)], 1)


def sorted_batch(
    shapes: np.ndarray, *, max_frames: int, vocab_size: int, joiner_dim: int
) -> Workload:
    """The middle batch of a corpus sorted by length: at most `max_frames` frames in all."""
    order = np.argsort(shapes[:, 0], kind="stable")
    start = len(order) // 2
    chosen, total = [], 0
    for index in order[start:]:
        total += int(shapes[index, 0])
        if total > max_frames and chosen:
            break
        chosen.append(index)
    frames, symbols = shapes[chosen].T.tolist()
    return Workload(tuple(frames), tuple(symbols), vocab_size, joiner_dim)
