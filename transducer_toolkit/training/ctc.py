# SPDX-License-Identifier: Apache-2.0
"""The auxiliary CTC loss on the encoder's output, used in training only."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from transducer_toolkit.ops.lattice import LatticeShape


class CtcLoss(nn.Module):
    """CTC loss of a linear layer on the encoder frames, to be added to a transducer loss.

    ``-log sum_paths prod_t softmax(W enc_t + b)[path_t]`` over the paths that collapse to the
    targets (Graves et al., 2006). CTC finds an alignment in fewer steps than a transducer loss, so
    it speeds up the training of the encoder. Decoding does not use the layer.

    Args:
        encoder_dim: E, width of the encoder's output.
        vocab_size: V, blank included.
        weight: factor of this loss in the sum, above 0.
        blank: id of blank.

    Raises:
        ValueError: if ``weight`` is not positive and finite, or ``blank`` is not in [0, V).

    Example:
        >>> import torch
        >>> shape = LatticeShape.from_lengths([4, 3], [2, 1])
        >>> targets = torch.tensor([[1, 4], [2, -1]])
        >>> CtcLoss(8, 5, weight=0.3)(torch.randn(2, 4, 8), targets, shape).shape
        torch.Size([2])
    """

    def __init__(self, encoder_dim: int, vocab_size: int, *, weight: float, blank: int = 0) -> None:
        super().__init__()
        if not (weight > 0 and math.isfinite(weight)):
            raise ValueError(f"weight: expected a positive and finite number, got {weight}")
        if not 0 <= blank < vocab_size:
            raise ValueError(f"blank: expected an id in [0, {vocab_size}), got {blank}")
        self.weight = weight
        self.blank = blank
        self.output = nn.Linear(encoder_dim, vocab_size)

    def forward(self, encoder_out: Tensor, targets: Tensor, shape: LatticeShape) -> Tensor:
        """Computes the loss of each utterance; ``weight`` is not applied.

        Args:
            encoder_out: (B, T, E) float. Padding may hold any finite value.
            targets: (B, U) integer ids other than blank. Padding may hold any value.
            shape: the lattices of the batch.

        Returns:
            (B,) losses in nats, float32, or float64 for float64 input. If an utterance has fewer
            frames than symbols plus adjacent repetitions, it has no path; its loss and its gradient
            are 0.
        """
        logits = self.output(encoder_out)
        dtype = torch.promote_types(logits.dtype, torch.float32)
        return functional.ctc_loss(
            logits.log_softmax(-1, dtype=dtype).transpose(0, 1),  # (T, B, V)
            targets,
            shape.logit_lengths,
            shape.target_lengths,
            blank=self.blank,
            reduction="none",
            zero_infinity=True,
        )

    def extra_repr(self) -> str:
        return f"weight={self.weight}, blank={self.blank}"
