# SPDX-License-Identifier: Apache-2.0
"""Loss stages: from encoder and predictor outputs to one loss an utterance.

A stage owns the way from the joiner to the loss, and nothing else: which layout the logits have,
which loss is used, with which options. ``conf/loss/*.yaml`` selects one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

from torch import Tensor, nn

from transducer_toolkit.lattice import LatticeShape
from transducer_toolkit.losses import transducer_loss
from transducer_toolkit.modules.joiner import Joiner


class StageOutput(NamedTuple):
    """What a loss stage gives.

    Attributes:
        losses: (B,) float, the loss of each utterance (nats), to be minimised.
        metrics: further scalars to log, detached, by name; each a mean over the batch.
    """

    losses: Tensor
    metrics: dict[str, Tensor]


class LossStage(nn.Module, ABC):
    """What every loss stage offers. It may own parameters; they are trained with the model.

    Attributes:
        topology: of the lattice, one of :data:`~transducer_toolkit.decoding.TOPOLOGIES`.
            Checkpoints carry it: a model is aligned as it was trained.
    """

    topology: str = "regular"

    @abstractmethod
    def forward(
        self,
        joiner: Joiner,
        encoder_out: Tensor,
        predictor_out: Tensor,
        targets: Tensor,
        shape: LatticeShape,
    ) -> StageOutput:
        """Compute the losses of a batch.

        Args:
            joiner: the model's joiner.
            encoder_out: (B, T, E) float; anything finite in padding.
            predictor_out: (B, U + 1, P) float; anything finite in padding.
            targets: (B, U) integer ids on the device of ``encoder_out``; anything in padding.
            shape: lengths of the batch's lattices, on the CPU.

        Returns:
            The losses, not yet divided by anything, and further metrics.
        """


class PackedLoss(LossStage):
    """The joiner on packed cells and :func:`~transducer_toolkit.losses.transducer_loss`.

    Args:
        blank: id of blank.
        one_sym_per_frame: at most one label a frame.
        fastemit_lambda: weight of FastEmit, 0 is off.
        delay_penalty: penalty per frame of delay, 0 is off.
        clamp: bound on the gradient of each logit, 0 is off.

    Example:
        >>> import torch
        >>> shape = LatticeShape.from_lengths([4, 3], [2, 1])
        >>> targets = torch.tensor([[1, 4], [2, -1]])
        >>> encoder_out, predictor_out = torch.randn(2, 4, 8), torch.randn(2, 3, 6)
        >>> stage = PackedLoss()
        >>> stage(Joiner(8, 6, 16, 5), encoder_out, predictor_out, targets, shape).losses.shape
        torch.Size([2])
    """

    def __init__(
        self,
        *,
        blank: int = 0,
        one_sym_per_frame: bool = False,
        fastemit_lambda: float = 0.0,
        delay_penalty: float = 0.0,
        clamp: float = 0.0,
    ) -> None:
        super().__init__()
        self.blank = blank
        self.one_sym_per_frame = one_sym_per_frame
        self.topology = "one_sym_per_frame" if one_sym_per_frame else "regular"
        self.fastemit_lambda = fastemit_lambda
        self.delay_penalty = delay_penalty
        self.clamp = clamp

    def forward(
        self,
        joiner: Joiner,
        encoder_out: Tensor,
        predictor_out: Tensor,
        targets: Tensor,
        shape: LatticeShape,
    ) -> StageOutput:
        losses = transducer_loss(
            joiner(encoder_out, predictor_out, shape),
            targets,
            shape.logit_lengths,
            shape.target_lengths,
            self.blank,
            one_sym_per_frame=self.one_sym_per_frame,
            reduction="none",
            fastemit_lambda=self.fastemit_lambda,
            delay_penalty=self.delay_penalty,
            clamp=self.clamp,
        )
        return StageOutput(losses, {})


class TorchaudioLoss(LossStage):
    """The joiner on the padded lattice and ``torchaudio.functional.rnnt_loss``: the yardstick.

    Args:
        blank: id of blank.
        clamp: bound on the gradient of each logit, 0 is off.

    Raises:
        ImportError: if torchaudio cannot be imported.

    Example:
        >>> stage = TorchaudioLoss(blank=0)
    """

    def __init__(self, *, blank: int = 0, clamp: float = 0.0) -> None:
        super().__init__()
        try:
            from torchaudio.functional import rnnt_loss
        except (ImportError, OSError) as error:
            raise ImportError(
                "loss=torchaudio needs a torchaudio that fits the installed torch "
                f"({error}); loss=packed needs none"
            ) from error
        self._rnnt_loss = rnnt_loss
        self.blank = blank
        self.clamp = clamp if clamp > 0 else -1.0  # torchaudio's "off"

    def forward(
        self,
        joiner: Joiner,
        encoder_out: Tensor,
        predictor_out: Tensor,
        targets: Tensor,
        shape: LatticeShape,
    ) -> StageOutput:
        # torchaudio insists on the longest lengths being the sizes, and on int32 throughout.
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
