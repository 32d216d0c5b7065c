# SPDX-License-Identifier: Apache-2.0
"""Random ragged batches for the loss tests."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from transducer_toolkit import LatticeShape


@dataclass
class Batch:
    logits: Tensor  # padded (B, T, U + 1, V)
    targets: Tensor  # (B, U), padding holds garbage
    logit_lengths: Tensor
    target_lengths: Tensor
    blank: int

    @property
    def shape(self) -> LatticeShape:
        return LatticeShape.from_lengths(self.logit_lengths, self.target_lengths)

    @property
    def index_arguments(self) -> tuple[Tensor, Tensor, Tensor, int]:
        return self.targets, self.logit_lengths, self.target_lengths, self.blank

    def packed(self) -> Tensor:
        return self.shape.pack(self.logits.detach()).requires_grad_()


def ragged_batch(
    frames: list[int],
    symbols: list[int],
    vocab_size: int,
    *,
    dtype: torch.dtype = torch.float64,
    scale: float = 1.0,
    blank: int = 0,
    padding: float = float("nan"),
) -> Batch:
    """Random logits and labels; `padding` fills the logits' padding, 10**8 that of targets."""
    lengths = torch.tensor(frames), torch.tensor(symbols)
    shape = LatticeShape.from_lengths(*lengths)
    logits = shape.unpack(scale * torch.randn(shape.num_cells, vocab_size, dtype=dtype), padding)
    targets = torch.randint(0, vocab_size - 1, (len(frames), max(symbols)))
    targets += targets >= blank  # anything but blank
    beyond = torch.arange(max(symbols)) >= lengths[1][:, None]
    targets[beyond] = 10**8
    return Batch(logits.requires_grad_(), targets, *lengths, blank)


def zero_padding(batch: Batch, like: Tensor) -> Tensor:
    """`like` (B, T, U + 1, V) with zeros outside of the lattices."""
    return batch.shape.unpack(batch.shape.pack(like))
