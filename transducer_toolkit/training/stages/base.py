# SPDX-License-Identifier: Apache-2.0
"""What every loss stage gets, gives and offers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor, nn

from transducer_toolkit.modules.joiner import AdditiveJoiner, Joiner, is_plain_linear
from transducer_toolkit.modules.transducer import Transducer
from transducer_toolkit.ops.checks import check_probability
from transducer_toolkit.ops.lattice import LatticeShape

# icefall's: a band, or a wish for early symbols, means nothing before a model has learnt a bit.
MAX_WARMUP_STEPS = 2000
WARMUP_PART = 0.2


class LossInput(NamedTuple):
    """A batch between the model and its loss.

    Attributes:
        joiner: the model's joiner, or one of yours with the methods of either class.
        encoder_out: (B, T, E) float; anything finite in padding.
        predictor_out: (B, U + 1, P) float; anything finite in padding.
        targets: (B, U) integer ids on the device of ``encoder_out``; anything in padding.
        shape: lengths of the batch's lattices, on the CPU.
    """

    joiner: Joiner | AdditiveJoiner
    encoder_out: Tensor
    predictor_out: Tensor
    targets: Tensor
    shape: LatticeShape

    @property
    def boundary(self) -> Tensor:
        """(B, 4) int64 rows [0, 0, U_b, T_b] on the CPU, for the losses under k2's names."""
        frames, symbols = self.shape.logit_lengths, self.shape.target_lengths
        zeros = torch.zeros_like(frames)
        return torch.stack([zeros, zeros, symbols, frames], 1)


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

    The warm-up of a stage is the first ``min(2000, 20 %)`` of all steps. A stage that was never
    told where the training stands is past it.

    Attributes:
        topology: of the lattice, one of :data:`~transducer_toolkit.decoding.TOPOLOGIES`.
            Checkpoints carry it: a model is aligned and decoded as it was trained.
        joiner_target: dotted path of the joiner class that this stage trains in place of the
            model's, or None: any.
        delay_penalty: penalty per frame of delay, applied after the warm-up: from the first step
            on, it would pull symbols forward that have not found their place yet.
        warmup_done: part of the warm-up that is over, from 0 to 1.
    """

    topology: str = "regular"
    joiner_target: str | None = None
    delay_penalty: float = 0.0
    warmup_done: float = 1.0

    @property
    def current_delay_penalty(self) -> float:
        """``delay_penalty`` after the warm-up, 0 before its end."""
        return self.delay_penalty if self.warmup_done >= 1.0 else 0.0

    @abstractmethod
    def forward(self, batch: LossInput) -> StageOutput:
        """Compute the losses of a batch, not yet divided by anything, and further metrics."""

    def bind(self, model: Transducer) -> None:
        """Make what depends on the model's sizes; called once, before training."""

    def set_progress(self, step: int, num_steps: int) -> None:
        """Tell the stage where the training stands; called before each step.

        Args:
            step: optimizer steps done.
            num_steps: of the whole training.
        """
        self.warmup_done = min(1.0, step / max(1.0, min(MAX_WARMUP_STEPS, WARMUP_PART * num_steps)))


def require_joiner(joiner: nn.Module, stage: LossStage) -> Joiner:
    """The joiner, if it is one whose parts a stage may use; a TypeError otherwise."""
    if not isinstance(joiner, Joiner):
        raise TypeError(
            f"{type(stage).__name__} works inside of the joiner and needs a Joiner, got "
            f"{type(joiner).__name__}; loss=packed takes any"
        )
    return joiner


def require_plain_output(joiner: nn.Module, stage: LossStage) -> Joiner:
    """The joiner, if its logits are those of its output layer's weight and bias, and of no code.

    Raises:
        TypeError: it is a subclass with a forward or step of its own, or the output layer is not a
            plain nn.Linear (a subclass, hooks, pruning, weight norm).
    """
    plain = require_joiner(joiner, stage)
    kind = type(plain)
    overridden = kind.forward is not Joiner.forward or kind.step is not Joiner.step
    if overridden or not is_plain_linear(plain.output):
        raise TypeError(
            f"{type(stage).__name__} multiplies by the weight of joiner.output itself and needs a "
            f"plain nn.Linear there, in a Joiner whose forward and step are its own, got "
            f"{kind.__name__} with {type(plain.output).__name__}; loss=packed takes any"
        )
    return plain


def check_scales(lm_only_scale: float, am_only_scale: float) -> None:
    """Raises unless both are in [0, 1]: what the loss asks for, before there is a batch."""
    check_probability(lm_only_scale, "lm_only_scale")
    check_probability(am_only_scale, "am_only_scale")


def per_frame(losses: Tensor, shape: LatticeShape) -> Tensor:
    """Detached sum of the losses (B,) over the frames of the batch."""
    return losses.detach().sum() / shape.num_frames
