# SPDX-License-Identifier: Apache-2.0
"""Loss stages that compute the logits of all cells: packed, padded, and torchaudio's loss."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from transducer_toolkit.losses import rnnt_loss
from transducer_toolkit.ops import checks
from transducer_toolkit.ops.logits_loss import LogitsInputs, logits_loss
from transducer_toolkit.ops.options import LossOptions
from transducer_toolkit.ops.topology import get_topology
from transducer_toolkit.optional import import_torchaudio
from transducer_toolkit.training.stages.base import (
    LossInput,
    LossStage,
    StageOutput,
    check_blank_of_big_blanks,
    check_omega,
    takes_regular_loss,
)


class PackedLoss(LossStage):
    """Computes :func:`~transducer_toolkit.transducer_loss` of packed logits.

    Args:
        blank: id of blank.
        topology: "regular", "modified", "constrained", "one_sym_per_frame", or with durations, as
            in :class:`FusedLoss`.
        fastemit_lambda: weight of FastEmit; 0 disables it.
        delay_penalty: penalty per frame of delay, applied after the warm-up; 0 disables it.
        clamp: bound on the gradient of each logit; 0 disables it.
        sigma: as in :class:`FusedLoss`.
        omega: as in :class:`FusedLoss`.
        normalization: as in :class:`FusedLoss`.

    Example:
        >>> import torch
        >>> from transducer_toolkit import Joiner, LatticeShape
        >>> shape = LatticeShape.from_lengths([4, 3], [2, 1])
        >>> targets = torch.tensor([[1, 4], [2, -1]])
        >>> encoder_out, predictor_out = torch.randn(2, 4, 8), torch.randn(2, 3, 6)
        >>> batch = LossInput(Joiner(8, 6, 16, 5), encoder_out, predictor_out, targets, shape)
        >>> PackedLoss()(batch).losses.shape
        torch.Size([2])
    """

    def __init__(
        self,
        *,
        blank: int = 0,
        topology: str = "regular",
        fastemit_lambda: float = 0.0,
        delay_penalty: float = 0.0,
        clamp: float = 0.0,
        sigma: float = 0.0,
        omega: float = 0.0,
        normalization: str = "softmax",
    ) -> None:
        super().__init__()
        self.options = LossOptions(
            blank=blank,
            topology=topology,
            fastemit_lambda=fastemit_lambda,
            delay_penalty=delay_penalty,
            clamp=clamp,
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
        shape = batch.shape
        logits = batch.joiner(batch.encoder_out, batch.predictor_out, shape)
        options = replace(self.options, delay_penalty=self.current_delay_penalty)
        if self.training and takes_regular_loss(self.omega):
            logits = logits[:, : options.vocab_size(logits.size(1))]
            options = replace(options, topology="regular", sigma=0.0)
        inputs = LogitsInputs(
            logits, batch.targets, *shape.lengths, shape_index=shape.index(logits.device)
        )
        return StageOutput(logits_loss(inputs, options).losses, {})


class FullLoss(LossStage):
    """Computes :func:`~transducer_toolkit.rnnt_loss` of padded logits.

    The losses equal those of :class:`PackedLoss`, but the padded logits take more memory. This
    stage is the baseline of the pruned losses.

    Args:
        blank: id of blank.
        topology: "regular", "modified" or "constrained".
        fastemit_lambda: weight of FastEmit; 0 disables it.
        delay_penalty: penalty per frame of delay, applied after the warm-up; 0 disables it.

    Example:
        >>> stage = FullLoss(blank=0, topology="modified")
    """

    def __init__(
        self,
        *,
        blank: int = 0,
        topology: str = "regular",
        fastemit_lambda: float = 0.0,
        delay_penalty: float = 0.0,
    ) -> None:
        super().__init__()
        get_topology(topology, k2=True)
        checks.check_not_negative("fastemit_lambda", fastemit_lambda)
        checks.check_not_negative("delay_penalty", delay_penalty)
        self.blank = blank
        self.topology = topology
        self.fastemit_lambda = fastemit_lambda
        self.delay_penalty = delay_penalty

    def forward(self, batch: LossInput) -> StageOutput:
        losses = rnnt_loss(
            batch.joiner.padded(batch.encoder_out, batch.predictor_out),
            batch.targets,
            self.blank,
            batch.boundary,
            self.topology,
            self.current_delay_penalty,
            "none",
            fastemit_lambda=self.fastemit_lambda,
        )
        assert isinstance(losses, Tensor)  # no return_grad
        return StageOutput(losses, {})


class TorchaudioLoss(LossStage):
    """Computes ``torchaudio.functional.rnnt_loss`` of padded logits, for comparisons.

    Args:
        blank: id of blank.
        clamp: bound on the gradient of each logit; 0 disables it.

    Raises:
        ImportError: if torchaudio cannot be imported.

    Example:
        >>> stage = TorchaudioLoss(blank=0)
    """

    def __init__(self, *, blank: int = 0, clamp: float = 0.0) -> None:
        super().__init__()
        checks.check_number(clamp, "clamp")
        self._rnnt_loss = import_torchaudio("functional", "loss=torchaudio").rnnt_loss
        self.blank = blank
        self.clamp = clamp if clamp > 0 else -1.0  # torchaudio's "off"

    def forward(self, batch: LossInput) -> StageOutput:
        joiner, encoder_out, predictor_out, targets, shape, _ = batch
        # torchaudio requires that the longest lengths equal the sizes, and int32 everywhere.
        max_frames, max_targets = shape.max_frames, shape.max_targets
        device = encoder_out.device
        losses = self._rnnt_loss(
            joiner.padded(encoder_out[:, :max_frames], predictor_out[:, : max_targets + 1]),
            targets[:, :max_targets].int().contiguous(),
            shape.logit_lengths.int().to(device),
            shape.target_lengths.int().to(device),
            blank=self.blank,
            clamp=self.clamp,
            reduction="none",
        )
        return StageOutput(losses, {})
