# SPDX-License-Identifier: Apache-2.0
"""The loss stage that computes logits by tiles of cells, never for the whole batch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from transducer_toolkit.losses import fused_joiner_loss
from transducer_toolkit.ops.options import FusedOptions
from transducer_toolkit.training.stages.base import (
    LossInput,
    LossStage,
    StageOutput,
    check_blank_of_big_blanks,
    check_omega,
    require_plain_output,
    takes_regular_loss,
)


class FusedLoss(LossStage):
    """Computes :func:`~transducer_toolkit.fused_joiner_loss`.

    The losses equal those of :class:`PackedLoss`. The metrics are fractions of the cells:
    ``kept`` of those that backward visits, ``selected`` of those that forward computes in full
    precision, ``full`` and ``low`` of those that backward computes in full and in low precision.

    Args:
        blank: id of blank.
        topology: "regular", "modified", "constrained", "one_sym_per_frame", or with durations, such
            as "tdt-0-1-2-3-4" (token-and-duration) and "multi_blank-2-4-8". The joiner needs
            :attr:`num_extra` more logits then.
        fastemit_lambda: weight of FastEmit; 0 disables it.
        delay_penalty: penalty per frame of delay, applied after the warm-up; 0 disables it.
        clamp: bound on the gradient of each logit; 0 disables it.
        dropped_mass: occupancy that backward may leave out, as in
            :func:`~transducer_toolkit.fused_joiner_loss`; 0 for exact gradients.
        precision: "auto" or "full", as in :func:`~transducer_toolkit.fused_joiner_loss`.
        sigma: as in :func:`~transducer_toolkit.tdt_loss`; with durations only.
        omega: probability that a training batch takes the regular loss of the tokens, without
            durations and sigma; token-and-duration only.
        normalization: "softmax" or "hat", as in :func:`~transducer_toolkit.transducer_loss`.

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
        sigma: float = 0.0,
        omega: float = 0.0,
        normalization: str = "softmax",
    ) -> None:
        super().__init__()
        self.options = FusedOptions(
            blank=blank,
            topology=topology,
            fastemit_lambda=fastemit_lambda,
            delay_penalty=delay_penalty,
            clamp=clamp,
            dropped_mass=dropped_mass,
            precision=precision,
            sigma=sigma,
            normalization=normalization,
        )
        self.normalization = normalization
        self.blank = blank
        check_blank_of_big_blanks(self.options)
        check_omega(omega, self.options)
        self.omega = omega
        self.topology = topology
        self.delay_penalty = delay_penalty

    def forward(self, batch: LossInput) -> StageOutput:
        joiner = require_plain_output(batch.joiner, self)
        options = replace(
            self.options,
            activation=joiner.activation,
            delay_penalty=self.current_delay_penalty,
        )
        num_columns = joiner.output.out_features
        if self.training and takes_regular_loss(self.omega):
            options = replace(options, topology="regular", sigma=0.0)
            num_columns = joiner.vocab_size
        bias = joiner.output.bias
        losses, parts = fused_joiner_loss(
            joiner.encoder_projection(batch.encoder_out),
            joiner.predictor_projection(batch.predictor_out),
            joiner.output.weight[:num_columns],
            None if bias is None else bias[:num_columns],
            batch.targets,
            batch.shape.logit_lengths,
            batch.shape.target_lengths,
            reduction="none",
            shape=batch.shape,
            return_parts=True,
            **options.arguments(),
            **self.restriction(batch),
        )
        return StageOutput(losses, parts._asdict())

    def restriction(self, batch: LossInput) -> dict[str, Any]:
        """Returns the arguments of the loss that restrict its paths: none."""
        return {}
