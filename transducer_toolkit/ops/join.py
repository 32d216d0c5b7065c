# SPDX-License-Identifier: Apache-2.0
"""The hidden layer and the logits of a joiner, computed for real lattice cells only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from transducer_toolkit.ops import native, stages
from transducer_toolkit.ops.checks import check_output_layer, check_tensor
from transducer_toolkit.ops.joint_tiles import JointTiles, JointWeights, autocast
from transducer_toolkit.ops.lattice import LatticeBatch, LatticeShape, Lengths
from transducer_toolkit.ops.registration import Backward, Derivative, Operator


def join(enc: Tensor, pred: Tensor, shape: LatticeShape, *, activation: str = "tanh") -> Tensor:
    """Computes the hidden layer ``activation(enc[b, t] + pred[b, u])`` of each lattice cell.

    One native call replaces slicing, adding and concatenating for each utterance. Backward is two
    segmented sums with a fixed order of summation, so gradients do not depend on the number of
    threads. Padding of enc and pred is not read, and its gradient is zero.

    Args:
        enc: (B, T, D) float16, bfloat16, float32 or float64; T is at least ``shape.max_frames``.
            If the dtypes of enc and pred differ, autocast casts both.
        pred: (B, U + 1, D), same dtype and device; U is at least ``shape.max_targets``.
        shape: the lattices of the batch.
        activation: "tanh", "relu", "gelu", "silu" or "identity".

    Returns:
        (shape.num_cells, D), packed, with the dtype and the device of enc.

    Raises:
        TypeError: if an argument has the wrong type, or enc and pred do not have the same supported
            dtype.
        ValueError: if shapes or devices do not match, or the activation is unknown.
        RuntimeError: if this build has no stages for the device, or on a second derivative.

    Example:
        >>> shape = LatticeShape.from_lengths([2, 1], [1, 1])
        >>> join(torch.ones(2, 2, 3), torch.ones(2, 2, 3), shape, activation="identity").sum()
        tensor(36.)
    """
    if torch.is_tensor(enc) and torch.is_tensor(pred) and enc.dtype != pred.dtype:
        enc, pred = autocast(enc), autocast(pred)
    _check(enc, pred, shape, activation)
    native.require_supported_device(enc.device)
    inputs = JoinInputs(
        enc.contiguous(), pred.contiguous(), *shape.lengths, shape.index(enc.device)
    )
    return operator(inputs, JoinOptions(activation), JoinPlan(shape.num_cells)).hidden


def joiner_logits(
    enc: Tensor,
    pred: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    shape: LatticeShape,
    *,
    activation: str = "tanh",
) -> Tensor:
    """Computes the packed logits of a joiner without its hidden layer in memory.

    The result equals ``functional.linear(join(enc, pred, shape), weight, bias)``. It is computed in
    tiles. The hidden layer of a tile is discarded after the product, and backward computes it
    again. This saves ``2 * num_cells * D`` numbers (the hidden layer and its gradient). On the CPU
    it also saves time, because a tile stays in the cache.

    Args:
        enc: (B, T, D) float16, bfloat16, float32 or float64; T is at least ``shape.max_frames``.
            Autocast casts enc and pred.
        pred: (B, U + 1, D), same dtype (after autocast) and device; U is at least
            ``shape.max_targets``.
        weight: (V, D) of any floating dtype; cast to the dtype of enc.
        bias: (V,) of any floating dtype, or None; cast to the dtype of enc.
        shape: the lattices of the batch.
        activation: "tanh", "relu", "gelu", "silu" or "identity".

    Returns:
        (shape.num_cells, V), packed, with the dtype of enc after autocast.

    Raises:
        TypeError: if an argument has the wrong type or dtype.
        ValueError: if shapes or devices do not match, or the activation is unknown.
        RuntimeError: if this build has no stages for the device, or on a second derivative.

    Example:
        >>> shape = LatticeShape.from_lengths([2, 1], [1, 1])
        >>> enc = pred = torch.ones(2, 2, 3)
        >>> joiner_logits(enc, pred, torch.ones(7, 3), None, shape).shape
        torch.Size([6, 7])
    """
    if torch.is_tensor(enc) and torch.is_tensor(pred):
        enc, pred = autocast(enc), autocast(pred)
    _check(enc, pred, shape, activation)
    check_output_layer(weight, bias, enc)
    native.require_supported_device(enc.device)
    inputs = LogitsInputs(
        enc.contiguous(),
        pred.contiguous(),
        weight,
        bias,
        *shape.lengths,
        shape.index(enc.device),
    )
    return logits_operator(inputs, JoinOptions(activation), JoinPlan(shape.num_cells)).logits


_ACTIVATIONS = {
    "identity": lambda x: x,
    "tanh": torch.tanh,
    "relu": functional.relu,
    "gelu": functional.gelu,
    "silu": functional.silu,
}


def apply_activation(x: Tensor, activation: str) -> Tensor:
    """Applies one of native.ACTIVATIONS to a tensor of any shape, in plain torch."""
    return _ACTIVATIONS[activation](x)


def check_activation(activation: str) -> None:
    """Raises a ValueError unless `activation` is one of native.ACTIVATIONS."""
    if activation not in native.ACTIVATIONS:
        raise ValueError(f"activation: expected one of {native.ACTIVATIONS}, got {activation!r}")


def _check(enc: Tensor, pred: Tensor, shape: LatticeShape, activation: str) -> None:
    check_activation(activation)
    check_tensor(enc, "enc")
    check_tensor(pred, "pred")
    if not isinstance(shape, LatticeShape):
        raise TypeError(f"shape: expected a LatticeShape, got {type(shape).__name__}")
    if enc.dtype not in native.SUPPORTED_DTYPES or enc.dtype != pred.dtype:
        supported = ", ".join(
            str(dtype).removeprefix("torch.") for dtype in native.SUPPORTED_DTYPES
        )
        raise TypeError(
            f"enc, pred: expected the same dtype, one of {supported}, "
            f"got {enc.dtype} and {pred.dtype}"
        )
    if enc.device != pred.device:
        raise ValueError(f"pred: expected device {enc.device}, that of enc, got {pred.device}")
    for name, tensor, length in (
        ("enc", enc, shape.max_frames),
        ("pred", pred, shape.max_targets + 1),
    ):
        if tensor.dim() != 3 or tensor.size(0) != shape.num_utterances or tensor.size(1) < length:
            raise ValueError(
                f"{name}: expected shape ({shape.num_utterances}, >= {length}, D), "
                f"got {tuple(tensor.shape)}"
            )
    if enc.size(2) != pred.size(2):
        raise ValueError(f"pred: expected width {enc.size(2)}, that of enc, got {pred.size(2)}")


# --- the operators ------------------------------------------------------------------------------


@dataclass(frozen=True)
class JoinOptions:
    """Options of :func:`join` and :func:`joiner_logits`: one of native.ACTIVATIONS."""

    activation: str


class JoinPlan(NamedTuple):
    """The number of cells of all lattices, which is the number of output rows."""

    num_cells: int


class JoinInputs(NamedTuple):
    """Tensors of :func:`join`."""

    enc: Tensor
    pred: Tensor
    logit_lengths: Tensor
    target_lengths: Tensor
    shape_index: Tensor | None


class LogitsInputs(NamedTuple):
    """Tensors of :func:`joiner_logits`."""

    enc: Tensor
    pred: Tensor
    weight: Tensor
    bias: Tensor | None
    logit_lengths: Tensor
    target_lengths: Tensor
    shape_index: Tensor | None


class Hidden(NamedTuple):
    """Result of :func:`join`: (num_cells, D)."""

    hidden: Tensor


class Logits(NamedTuple):
    """Result of :func:`joiner_logits`: (num_cells, V)."""

    logits: Tensor


def _lattice_batch(inputs: JoinInputs | LogitsInputs, plan: JoinPlan) -> LatticeBatch:
    enc, pred = inputs.enc, inputs.pred
    return LatticeBatch(
        Lengths(inputs.logit_lengths, inputs.target_lengths, inputs.shape_index),
        # A join reads only the width of the targets.
        torch.empty(pred.size(0), pred.size(1) - 1, dtype=torch.int64, device=enc.device),
        num_rows=plan.num_cells,
        max_frames=enc.size(1),
        padded=False,
    )


def _hidden(inputs: JoinInputs, options: JoinOptions, plan: JoinPlan) -> Hidden:
    batch = _lattice_batch(inputs, plan)
    hidden = inputs.enc.new_empty(plan.num_cells, inputs.enc.size(-1))
    joint = stages.Joint(inputs.enc, inputs.pred, options.activation)
    stages.join_forward(joint, batch, batch.all_rows(), hidden)
    return Hidden(hidden)


def _hidden_fake(inputs: JoinInputs, options: JoinOptions, plan: JoinPlan) -> Hidden:
    return Hidden(inputs.enc.new_empty(plan.num_cells, inputs.enc.size(-1)))


def _hidden_backward(call: Backward) -> dict[str, Tensor]:
    enc, pred = call.inputs.enc, call.inputs.pred
    batch = _lattice_batch(call.inputs, call.plan)
    dtype = native.compute_dtype(enc.dtype)
    grads = torch.zeros_like(enc, dtype=dtype), torch.zeros_like(pred, dtype=dtype)
    stages.join_backward(
        stages.Joint(enc, pred, call.options.activation),
        batch,
        batch.all_rows(),
        call.outputs.hidden,
        call.grads["hidden"].contiguous(),
        grads,
    )
    return {"enc": grads[0].to(enc.dtype), "pred": grads[1].to(pred.dtype)}


operator = Operator(
    "join",
    (JoinInputs, JoinOptions, JoinPlan, Hidden),
    forward=_hidden,
    fake=_hidden_fake,
    derivative=Derivative(
        backward=_hidden_backward,
        of=("enc", "pred"),
        through=("hidden",),
    ),
    functions="joiner",
)


def _tiles(inputs: LogitsInputs, options: JoinOptions, batch: LatticeBatch) -> JointTiles:
    joint = stages.Joint(inputs.enc, inputs.pred, options.activation)
    return JointTiles(joint, JointWeights(inputs.weight, inputs.bias), batch)


def _logits(inputs: LogitsInputs, options: JoinOptions, plan: JoinPlan) -> Logits:
    enc = inputs.enc
    logits = native.empty(plan.num_cells, inputs.weight.size(0), like=enc)
    with torch.autocast(enc.device.type, enabled=False):
        joint = _tiles(inputs, options, _lattice_batch(inputs, plan))
        for tile in joint.tiles():
            joint.logits(joint.hidden(tile), out=logits[tile.begin : tile.begin + tile.size])
    return Logits(logits)


def _logits_fake(inputs: LogitsInputs, options: JoinOptions, plan: JoinPlan) -> Logits:
    return Logits(inputs.enc.new_empty(plan.num_cells, inputs.weight.size(0)))


def _logits_backward(call: Backward) -> dict[str, Tensor]:
    grad_logits = call.grads["logits"].contiguous()
    with torch.autocast(grad_logits.device.type, enabled=False):
        joint = _tiles(call.inputs, call.options, _lattice_batch(call.inputs, call.plan))
        joint.start_backward(call.wanted)
        for tile in joint.tiles():
            grad_tile = grad_logits[tile.begin : tile.begin + tile.size]
            joint.backward(tile, joint.hidden(tile), grad_tile)
        return joint.gradients()


logits_operator = Operator(
    "joiner_logits",
    (LogitsInputs, JoinOptions, JoinPlan, Logits),
    forward=_logits,
    fake=_logits_fake,
    derivative=Derivative(
        backward=_logits_backward,
        of=("enc", "pred", "weight", "bias"),
        through=("logits",),
        unsaved=("logits",),
    ),
    functions="joiner",
)
