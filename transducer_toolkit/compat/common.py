# SPDX-License-Identifier: Apache-2.0
"""Shared parts of the adapters: stand-ins for logits, activations, and reductions by labels."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from transducer_toolkit.losses.fused_joiner import fused_joiner_loss
from transducer_toolkit.ops import native
from transducer_toolkit.ops.join import apply_activation

REDUCTION_NAMES = ("mean_volume", "mean_batch", "mean", "sum", "none")


@dataclasses.dataclass(frozen=True, eq=False)
class JointInputs:
    """The inputs of a joint network, in the place of its logits (B, T, U + 1, V).

    A joint network returns this object instead of logits, and the loss calls its method
    :meth:`loss`.

    Attributes:
        enc: (B, T, D) encoder frames in joiner width.
        pred: (B, U + 1, D) predictor outputs in joiner width.
        activation: as in :func:`~transducer_toolkit.fused_joiner_loss`.
        weight: (V, D) of the output layer; None before the output layer.
        bias: (V,) of the output layer or None.
    """

    enc: Tensor
    pred: Tensor
    activation: str
    weight: Tensor | None = None
    bias: Tensor | None = None

    def float(self) -> JointInputs:
        """Returns itself: the loss is computed in float32 anyway."""
        return self

    def loss(self, *args: Any, **options: Any) -> Tensor:
        """Computes :func:`~transducer_toolkit.fused_joiner_loss` from its arguments after bias."""
        if self.weight is None:
            raise ValueError("logits: expected the output of an output layer, got its input")
        parts = self.enc, self.pred, self.weight, self.bias
        return fused_joiner_loss(*parts, *args, activation=self.activation, **options)


def joint_summands(enc: Tensor, pred: Tensor) -> tuple[Tensor, Tensor] | None:
    """Removes the axes of size 1 from the arguments of a joint network.

    Args:
        enc: (B, T, 1, D) in a training step.
        pred: (B, 1, U + 1, D) in a training step.

    Returns:
        Tensors (B, T, D) and (B, U + 1, D), or None if the arguments have other shapes or a single
        cell, as in a search.
    """
    if enc.dim() != 4 or pred.dim() != 4 or enc.size(2) != 1 or pred.size(1) != 1:
        return None
    if enc.size(1) * pred.size(2) == 1:
        return None
    return enc.squeeze(2), pred.squeeze(1)


def activation_of(module: nn.Module, name: str) -> str:
    """Returns the name of the activation that `module` computes.

    Args:
        module: a module of any library; its outputs are compared with those of each activation.
        name: name of the module in the error message.

    Raises:
        ValueError: if it computes no activation of the fused loss.
    """
    values = torch.linspace(-6, 6, 97)
    if not any(True for _ in module.parameters()):
        with torch.no_grad():
            found = module(values.clone())  # ReLU(inplace=True) would overwrite them
        for activation in native.ACTIVATIONS:
            if torch.allclose(found, apply_activation(values, activation), atol=1e-6):
                return activation
    raise ValueError(
        f"{name}: expected one of {', '.join(native.ACTIVATIONS)}, which are those of the fused "
        f"loss, got {module}"
    )


def check_reduction_name(reduction: str) -> None:
    """Raises a ValueError unless `reduction` is one of REDUCTION_NAMES."""
    if reduction not in REDUCTION_NAMES:
        raise ValueError(
            f"reduction: expected one of {', '.join(REDUCTION_NAMES)}, got {reduction!r}"
        )


def reduce_by_labels(losses: Tensor, target_lengths: Tensor, reduction: str) -> Tensor:
    """Reduces losses (B,) as a name of REDUCTION_NAMES says.

    An utterance without labels counts as one with a single label.
    """
    lengths = target_lengths.to(losses)
    if reduction == "mean_volume":
        return losses.sum() / lengths.sum().clamp(min=1)
    if reduction == "mean_batch":
        return losses.mean()
    if reduction == "mean":
        return (losses / lengths.clamp(min=1)).mean()
    return losses.sum() if reduction == "sum" else losses
