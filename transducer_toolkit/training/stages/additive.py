# SPDX-License-Identifier: Apache-2.0
"""Loss stages of an additive joiner, logits = am + lm, which never compute all logits."""

from __future__ import annotations

from torch import Tensor

from transducer_toolkit.losses import rnnt_loss_smoothed
from transducer_toolkit.modules.joiner import AdditiveJoiner
from transducer_toolkit.ops import checks
from transducer_toolkit.ops.topology import get_topology
from transducer_toolkit.training.stages.base import (
    LossInput,
    LossStage,
    StageOutput,
    check_scales,
)


class SmoothedLoss(LossStage):
    """Computes :func:`~transducer_toolkit.rnnt_loss_smoothed` of an :class:`AdditiveJoiner`.

    The model is trained, decoded and exported with that joiner: ``logits = am + lm``.

    Args:
        blank: id of blank.
        topology: "regular", "modified" or "constrained".
        lm_only_scale: weight of the log-probabilities of the predictor alone, in [0, 1].
        am_only_scale: weight of the log-probabilities of the encoder alone, in [0, 1]. It helps to
            find the windows of pruned training; use 0 for a model that is to be decoded. In the
            digits recipe, 0.1 spread the symbols over so many frames that greedy search lost half
            of them (WER 58 %, and 5 % with 0).
        delay_penalty: penalty per frame of delay, applied after the warm-up; 0 disables it.

    Example:
        >>> import torch
        >>> from transducer_toolkit import LatticeShape
        >>> shape = LatticeShape.from_lengths([4, 3], [2, 1])
        >>> targets = torch.tensor([[1, 4], [2, -1]])
        >>> encoder_out, predictor_out = torch.randn(2, 4, 8), torch.randn(2, 3, 6)
        >>> batch = LossInput(AdditiveJoiner(8, 6, 5), encoder_out, predictor_out, targets, shape)
        >>> SmoothedLoss()(batch).losses.shape
        torch.Size([2])
    """

    joiner_target = "transducer_toolkit.modules.joiner.AdditiveJoiner"

    def __init__(
        self,
        *,
        blank: int = 0,
        topology: str = "regular",
        lm_only_scale: float = 0.1,
        am_only_scale: float = 0.0,
        delay_penalty: float = 0.0,
    ) -> None:
        super().__init__()
        get_topology(topology, k2=True)
        checks.check_not_negative("delay_penalty", delay_penalty)
        check_scales(lm_only_scale, am_only_scale)
        self.blank = blank
        self.topology = topology
        self.lm_only_scale = lm_only_scale
        self.am_only_scale = am_only_scale
        self.delay_penalty = delay_penalty

    def forward(self, batch: LossInput) -> StageOutput:
        if not isinstance(batch.joiner, AdditiveJoiner):
            raise TypeError(
                f"joiner: expected an AdditiveJoiner for {type(self).__name__}, got "
                f"{type(batch.joiner).__name__}"
            )
        am, lm = batch.joiner.parts(batch.encoder_out, batch.predictor_out)
        losses = rnnt_loss_smoothed(
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
        )
        assert isinstance(losses, Tensor)  # no return_grad
        return StageOutput(losses, {})


class SimpleLoss(SmoothedLoss):
    """Computes :func:`~transducer_toolkit.rnnt_loss_simple` of an :class:`AdditiveJoiner`.

    Args:
        blank: id of blank.
        topology: "regular", "modified" or "constrained".
        delay_penalty: penalty per frame of delay, applied after the warm-up; 0 disables it.

    Example:
        >>> stage = SimpleLoss(topology="constrained")
    """

    def __init__(
        self, *, blank: int = 0, topology: str = "regular", delay_penalty: float = 0.0
    ) -> None:
        super().__init__(
            blank=blank,
            topology=topology,
            lm_only_scale=0.0,
            am_only_scale=0.0,
            delay_penalty=delay_penalty,
        )
