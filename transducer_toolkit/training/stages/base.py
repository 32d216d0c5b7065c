# SPDX-License-Identifier: Apache-2.0
"""The base class of the loss stages, their input and their output."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from transducer_toolkit.modules.joiner import AdditiveJoiner, Joiner, is_plain_linear
from transducer_toolkit.modules.transducer import Transducer
from transducer_toolkit.ops.checks import check_probability
from transducer_toolkit.ops.lattice import LatticeShape
from transducer_toolkit.ops.options import LossOptions
from transducer_toolkit.ops.topology import get_topology

# As in icefall. The warm-up exists because a band of symbols or a delay penalty is harmful before
# the model has begun to align.
MAX_WARMUP_STEPS = 2000
WARMUP_PART = 0.2


class LossInput(NamedTuple):
    """Input of a loss stage: the joiner, and the encoder and predictor outputs of a batch.

    Attributes:
        joiner: the model's joiner, or a module with the methods of either joiner class.
        encoder_out: (B, T, E) float. Padding may hold any finite value.
        predictor_out: (B, U + 1, P) float. Padding may hold any finite value.
        targets: (B, U) integer ids on the device of ``encoder_out``. Padding may hold any value.
        shape: the lattices of the batch.
        alignment: (B, U) int64 on the CPU, the encoder frame of each target in an alignment.
            Padding may hold any value. None: there is no alignment.
    """

    joiner: Joiner | AdditiveJoiner
    encoder_out: Tensor
    predictor_out: Tensor
    targets: Tensor
    shape: LatticeShape
    alignment: Tensor | None = None

    @property
    def boundary(self) -> Tensor:
        """The boundary argument of the k2-compatible losses.

        It is (B, 4) int64 on the CPU, with rows [0, 0, U_b, T_b].
        """
        frames, symbols = self.shape.logit_lengths, self.shape.target_lengths
        zeros = torch.zeros_like(frames)
        return torch.stack([zeros, zeros, symbols, frames], 1)


class StageOutput(NamedTuple):
    """Output of a loss stage.

    Attributes:
        losses: (B,) float, the loss of each utterance in nats.
        metrics: detached scalars to log, by name. Each is a mean over the batch.
    """

    losses: Tensor
    metrics: dict[str, Tensor]


class LossStage(nn.Module, ABC):
    """Base class of the loss stages.

    A training makes a stage from its config, with ``blank`` as one more keyword argument. The
    other attributes have defaults, which the ``__init__`` of a stage replaces. A stage may have
    parameters, which are trained together with the model.

    The warm-up of a stage lasts for 2000 steps, but at most for 20 % of all steps. Without a call
    of :meth:`set_progress`, the warm-up counts as complete.

    Attributes:
        topology: topology of the lattice, one of
            :data:`~transducer_toolkit.decoding.TOPOLOGIES`. Checkpoints contain it, so that a
            model is aligned and decoded in the topology it was trained with.
        normalization: how the joiner's logits become probabilities, "softmax" or "hat". Checkpoints
            contain it, as an option of the joiner.
        joiner_target: dotted path of the joiner class that replaces the model's :class:`Joiner`,
            or None to keep the model's joiner. A joiner class of the user's own is an error then.
        blank: id of blank.
        delay_penalty: penalty per frame of delay, applied after the warm-up. During the warm-up,
            the model has not aligned the symbols yet, and the penalty would misplace them.
        warmup_done: completed fraction of the warm-up, in [0, 1].
    """

    topology: str = "regular"
    normalization: str = "softmax"
    joiner_target: str | None = None
    blank: int = 0
    delay_penalty: float = 0.0
    warmup_done: float = 1.0

    @property
    def joiner_options(self) -> dict[str, Any]:
        """Options of the joiner that the loss needs; those with their default are left out."""
        options: dict[str, Any] = {}
        if self.num_extra:
            options["num_extra"] = self.num_extra
        if self.normalization != "softmax":
            options["normalization"] = self.normalization
            options["blank"] = self.blank
        return options

    @property
    def num_extra(self) -> int:
        """Logits that the joiner needs beside those of the symbols: of durations, big blanks."""
        return get_topology(self.topology).num_extra

    @property
    def current_delay_penalty(self) -> float:
        """``delay_penalty`` after the warm-up, 0 during the warm-up."""
        return self.delay_penalty if self.warmup_done >= 1.0 else 0.0

    @abstractmethod
    def forward(self, batch: LossInput) -> StageOutput:
        """Computes the loss of each utterance, without any reduction, and the metrics to log."""

    def bind(self, model: Transducer) -> None:
        """Creates submodules that depend on the model's sizes. Call it once, before training."""

    def set_progress(self, step: int, num_steps: int) -> None:
        """Sets ``warmup_done``. Call it before each step.

        Args:
            step: number of completed optimizer steps.
            num_steps: number of optimizer steps in the whole training.
        """
        self.warmup_done = min(1.0, step / max(1.0, min(MAX_WARMUP_STEPS, WARMUP_PART * num_steps)))


def require_joiner(joiner: nn.Module, stage: LossStage) -> Joiner:
    """Returns the joiner if it computes the formula of :class:`Joiner`, from whose layers a stage
    computes the logits.

    Raises:
        TypeError: if it is another module, or a subclass with another formula.
    """
    # A subclass that changes the formula overrides forward, too: Joiner makes sure of it.
    if not isinstance(joiner, Joiner) or type(joiner).forward is not Joiner.forward:
        raise TypeError(
            f"joiner: expected a Joiner with unmodified forward for {type(stage).__name__}, which "
            f"computes its logits from its layers, got {type(joiner).__name__}; loss=packed and "
            "loss=full accept any joiner"
        )
    return joiner


def require_plain_output(joiner: nn.Module, stage: LossStage) -> Joiner:
    """Returns the joiner if its output layer also is nothing but its weight and bias.

    Raises:
        TypeError: as :func:`require_joiner`, and if the output layer is not a plain ``nn.Linear``
            (a subclass, hooks, pruning, weight norm).
    """
    plain = require_joiner(joiner, stage)
    if not is_plain_linear(plain.output):
        raise TypeError(
            f"joiner: expected a Joiner with a plain nn.Linear as output for "
            f"{type(stage).__name__}, which multiplies by its weight, got an output layer "
            f"{type(plain.output).__name__} with code of its own; loss=packed and loss=full accept "
            "any joiner"
        )
    return plain


def check_scales(lm_only_scale: float, am_only_scale: float) -> None:
    """Raises a TypeError or ValueError unless both are numbers in [0, 1].

    The loss has the same condition, but checks it only when the first batch arrives.
    """
    check_probability(lm_only_scale, "lm_only_scale")
    check_probability(am_only_scale, "am_only_scale")


def check_blank_of_big_blanks(options: LossOptions) -> None:
    """Raises a ValueError unless the blank is 0 for a multi-blank transducer.

    The joiner appends the logits of big blanks to those of the symbols, and they have to be the
    symbols before blank. Behind 0 comes the last symbol.
    """
    if options.arcs.num_big_blanks and options.blank != 0:
        raise ValueError(f"blank: expected 0 with {options.topology!r}, got {options.blank}")


def check_omega(omega: float, options: LossOptions) -> None:
    """Raises a TypeError or ValueError unless omega is a number in [0, 1], and 0 without TDT."""
    check_probability(omega, "omega")
    if omega > 0 and not options.arcs.predicts_durations:
        raise ValueError(f"omega: expected 0 with topology {options.topology!r}, got {omega}")


def takes_regular_loss(omega: float) -> bool:
    """Returns True with probability omega, from torch's generator of the CPU."""
    return omega > 0 and bool(torch.rand(()) < omega)


def per_frame(losses: Tensor, shape: LatticeShape) -> Tensor:
    """Returns the detached sum of the losses (B,), divided by the frames of the batch."""
    return losses.detach().sum() / shape.num_frames
