# SPDX-License-Identifier: Apache-2.0
"""The loss stage that computes logits by tiles of cells, never for the whole batch."""

from __future__ import annotations

from typing import Any

from transducer_toolkit.losses import fused_joiner_loss
from transducer_toolkit.ops.options import FusedOptions
from transducer_toolkit.training.stages.base import (
    LossInput,
    LossStage,
    StageOutput,
    require_plain_output,
)


class FusedLoss(LossStage):
    """Computes :func:`~transducer_toolkit.fused_joiner_loss`.

    The losses equal those of :class:`PackedLoss`. The metrics are fractions of the cells:
    ``kept`` of those that backward visits, ``selected`` of those that forward computes in full
    precision, ``full`` and ``low`` of those that backward computes in full and in low precision.

    Args:
        blank: id of blank.
        topology: "regular", "modified", "constrained" or "one_sym_per_frame".
        fastemit_lambda: weight of FastEmit; 0 disables it.
        delay_penalty: penalty per frame of delay, applied after the warm-up; 0 disables it.
        clamp: bound on the gradient of each logit; 0 disables it.
        dropped_mass: occupancy that backward may leave out, as in
            :func:`~transducer_toolkit.fused_joiner_loss`; 0 for exact gradients.
        precision: "auto" or "full", as in :func:`~transducer_toolkit.fused_joiner_loss`.

    Example:
        >>> import torch
        >>> from transducer_toolkit import Joiner, LatticeShape
        >>> shape = LatticeShape.from_lengths([4, 3], [2, 1])
        >>> targets = torch.tensor([[1, 4], [2, -1]])
        >>> encoder_out, predictor_out = torch.randn(2, 4, 8), torch.randn(2, 3, 6)
        >>> batch = LossInput(Joiner(8, 6, 16, 5), encoder_out, predictor_out, targets, shape)
        >>> sorted(FusedLoss()(batch).metrics)
        ['full', 'kept', 'low', 'selected']
    """

    def __init__(
        self,
        *,
        blank: int = 0,
        topology: str = "regular",
        fastemit_lambda: float = 0.0,
        delay_penalty: float = 0.0,
        clamp: float = 0.0,
        dropped_mass: float = 1e-7,
        precision: str = "auto",
    ) -> None:
        super().__init__()
        options = FusedOptions(
            blank=blank,
            topology=topology,
            fastemit_lambda=fastemit_lambda,
            delay_penalty=delay_penalty,
            clamp=clamp,
            dropped_mass=dropped_mass,
            precision=precision,
        )
        self.blank = options.blank
        self.topology = topology
        self.delay_penalty = delay_penalty
        self.options: dict[str, Any] = {
            "fastemit_lambda": fastemit_lambda,
            "clamp": clamp,
            "dropped_mass": dropped_mass,
            "precision": precision,
        }

    def forward(self, batch: LossInput) -> StageOutput:
        joiner = require_plain_output(batch.joiner, self)
        losses, parts = fused_joiner_loss(
            joiner.encoder_projection(batch.encoder_out),
            joiner.predictor_projection(batch.predictor_out),
            joiner.output.weight,
            joiner.output.bias,
            batch.targets,
            batch.shape.logit_lengths,
            batch.shape.target_lengths,
            self.blank,
            activation=joiner.activation,
            topology=self.topology,
            reduction="none",
            shape=batch.shape,
            return_parts=True,
            delay_penalty=self.current_delay_penalty,
            **self.options,
        )
        return StageOutput(losses, parts._asdict())
