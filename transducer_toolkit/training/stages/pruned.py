# SPDX-License-Identifier: Apache-2.0
"""Pruned training: a smoothed loss finds a band of symbols, and the joiner runs in the band."""

from __future__ import annotations

from torch import Tensor

from transducer_toolkit.losses import (
    do_rnnt_pruning,
    fused_joiner_loss,
    get_rnnt_prune_ranges,
    rnnt_loss_pruned,
    rnnt_loss_smoothed,
)
from transducer_toolkit.losses.pruning import METHODS
from transducer_toolkit.modules.joiner import AdditiveJoiner, Joiner
from transducer_toolkit.modules.transducer import Transducer
from transducer_toolkit.ops import checks
from transducer_toolkit.ops.join import apply_activation
from transducer_toolkit.ops.options import FusedOptions
from transducer_toolkit.ops.topology import get_topology
from transducer_toolkit.training.stages.base import (
    LossInput,
    LossStage,
    StageOutput,
    check_scales,
    per_frame,
    require_joiner,
    require_plain_output,
)

SIMPLE_SCALES = (1.0, 0.5)  # at the beginning and at the end of the warm-up
PRUNED_SCALES = (0.1, 1.0)


class PrunedLoss(LossStage):
    """Computes the pruned loss together with the smoothed loss that finds its band.

    The smoothed loss of an additive joiner finds a window of ``prune_range`` symbols for each
    frame. The model's joiner and the pruned loss use only the cells in these windows::

        losses = simple_scale * smoothed + pruned_scale * pruned

    During the warm-up (see :class:`LossStage`), ``simple_scale`` falls from 1.0 to 0.5 and
    ``pruned_scale`` rises from 0.1 to 1.0. The metrics are both scales, and both losses per frame.

    Args:
        blank: id of blank.
        topology: "regular", "modified" or "constrained".
        prune_range: R, number of symbols kept for each frame.
        lm_only_scale: as in :func:`~transducer_toolkit.rnnt_loss_smoothed`.
        am_only_scale: as in :func:`~transducer_toolkit.rnnt_loss_smoothed`.
        fastemit_lambda: weight of FastEmit in the pruned loss; 0 disables it.
        delay_penalty: penalty per frame of delay in both losses, applied after the warm-up; 0
            disables it.
        method: "greedy" or "optimal", as in :func:`~transducer_toolkit.get_rnnt_prune_ranges`.
        simple_joiner: the additive joiner of the smoothed loss. If it is None, call :meth:`bind`,
            which creates one, before a state dict is loaded.

    Example:
        >>> import torch
        >>> from transducer_toolkit import LatticeShape
        >>> shape = LatticeShape.from_lengths([4, 3], [2, 1])
        >>> targets = torch.tensor([[1, 4], [2, -1]])
        >>> encoder_out, predictor_out = torch.randn(2, 4, 8), torch.randn(2, 3, 6)
        >>> stage = PrunedLoss(prune_range=2, simple_joiner=AdditiveJoiner(8, 6, 5))
        >>> stage.set_progress(step=0, num_steps=1000)
        >>> batch = LossInput(Joiner(8, 6, 16, 5), encoder_out, predictor_out, targets, shape)
        >>> sorted(stage(batch).metrics)
        ['pruned_loss', 'pruned_scale', 'simple_loss', 'simple_scale']

    Source:
        F. Kuang et al., "Pruned RNN-T for fast, memory-efficient ASR training", 2022.
    """

    def __init__(
        self,
        *,
        blank: int = 0,
        topology: str = "regular",
        prune_range: int = 5,
        lm_only_scale: float = 0.25,
        am_only_scale: float = 0.0,
        fastemit_lambda: float = 0.0,
        delay_penalty: float = 0.0,
        method: str = "greedy",
        simple_joiner: AdditiveJoiner | None = None,
    ) -> None:
        super().__init__()
        get_topology(topology, k2=True)
        checks.check_not_negative("fastemit_lambda", fastemit_lambda)
        checks.check_not_negative("delay_penalty", delay_penalty)
        checks.check_choice(method, "method", METHODS)
        check_scales(lm_only_scale, am_only_scale)
        checks.check_int(prune_range, "prune_range")
        if prune_range < 1:
            raise ValueError(f"prune_range: expected at least 1, got {prune_range}")
        self.blank = blank
        self.topology = topology
        self.prune_range = prune_range
        self.lm_only_scale = lm_only_scale
        self.am_only_scale = am_only_scale
        self.fastemit_lambda = fastemit_lambda
        self.delay_penalty = delay_penalty
        self.method = method
        self.simple_joiner = simple_joiner

    def bind(self, model: Transducer) -> None:
        if self.simple_joiner is None:
            self.simple_joiner = AdditiveJoiner(
                model.encoder.output_dim, model.predictor.output_dim, model.vocab_size
            ).to(next(model.parameters()))

    def scales(self) -> tuple[float, float]:
        """Returns the present weights of the smoothed loss and of the pruned loss."""
        simple, pruned = (
            first + self.warmup_done * (last - first)
            for first, last in (SIMPLE_SCALES, PRUNED_SCALES)
        )
        return simple, pruned

    def forward(self, batch: LossInput) -> StageOutput:
        joiner = require_joiner(batch.joiner, self)
        if self.simple_joiner is None:
            raise ValueError(
                f"simple_joiner: expected an AdditiveJoiner for {type(self).__name__}, got None; "
                "pass one, or call bind(model)"
            )
        am, lm = self.simple_joiner.parts(batch.encoder_out, batch.predictor_out)
        simple, (px_grad, py_grad) = rnnt_loss_smoothed(
            lm,
            am,
            batch.targets,
            self.blank,
            lm_only_scale=self.lm_only_scale,
            am_only_scale=self.am_only_scale,
            boundary=batch.boundary,
            rnnt_type=self.topology,
            delay_penalty=self.current_delay_penalty,
            reduction="none",
            return_grad=True,
        )
        ranges = get_rnnt_prune_ranges(
            px_grad,
            py_grad,
            batch.boundary,
            self.prune_range,
            rnnt_type=self.topology,
            method=self.method,
        )
        pruned, metrics = self.pruned_losses(joiner, batch, ranges)
        metrics["simple_loss"] = per_frame(simple, batch.shape)
        metrics["pruned_loss"] = per_frame(pruned, batch.shape)
        simple_scale, pruned_scale = self.scales()
        metrics["simple_scale"] = simple.new_tensor(simple_scale)
        metrics["pruned_scale"] = simple.new_tensor(pruned_scale)
        return StageOutput(simple_scale * simple + pruned_scale * pruned, metrics)

    def pruned_losses(
        self, joiner: Joiner, batch: LossInput, ranges: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the losses (B,) on the band ``ranges`` (B, T, R), and metrics to log."""
        enc, pred = do_rnnt_pruning(
            joiner.encoder_projection(batch.encoder_out),
            joiner.predictor_projection(batch.predictor_out),
            ranges,
            boundary=batch.boundary,
        )
        losses = rnnt_loss_pruned(
            joiner.output(apply_activation(enc + pred, joiner.activation)),
            batch.targets,
            ranges,
            self.blank,
            batch.boundary,
            self.topology,
            self.current_delay_penalty,
            "none",
            fastemit_lambda=self.fastemit_lambda,
        )
        assert isinstance(losses, Tensor)  # no return_grad
        return losses, {}


class FusedPrunedLoss(PrunedLoss):
    """Computes :class:`PrunedLoss` with :func:`~transducer_toolkit.fused_joiner_loss` in the band.

    The losses are the same, in less time and memory. The metrics ``kept``, ``selected``, ``full``
    and ``low`` are fractions of the band's cells, as in :class:`FusedLoss`.

    Args:
        dropped_mass: occupancy that backward may leave out, as in
            :func:`~transducer_toolkit.fused_joiner_loss`; 0 for exact gradients.
        precision: "auto" or "full", as in :func:`~transducer_toolkit.fused_joiner_loss`.
        options: options of :class:`PrunedLoss`.

    Example:
        >>> stage = FusedPrunedLoss(prune_range=5, simple_joiner=AdditiveJoiner(8, 6, 5))
    """

    def __init__(self, *, dropped_mass: float = 1e-7, precision: str = "auto", **options) -> None:
        super().__init__(**options)
        FusedOptions(blank=0, dropped_mass=dropped_mass, precision=precision)
        self.dropped_mass = dropped_mass
        self.precision = precision

    def pruned_losses(
        self, joiner: Joiner, batch: LossInput, ranges: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        joiner = require_plain_output(joiner, self)
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
            ranges=ranges,
            topology=self.topology,
            reduction="none",
            fastemit_lambda=self.fastemit_lambda,
            delay_penalty=self.current_delay_penalty,
            dropped_mass=self.dropped_mass,
            precision=self.precision,
            shape=batch.shape,
            return_parts=True,
        )
        return losses, parts._asdict()
