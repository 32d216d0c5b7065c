# SPDX-License-Identifier: Apache-2.0
"""Every frame with every symbol, for real lattice cells only: packed joiner inputs and logits."""

import torch
from torch import Tensor
from torch.nn import functional

from transducer_toolkit.ops import native, stages
from transducer_toolkit.ops.checks import check_tensor
from transducer_toolkit.ops.joint_tiles import JointTiles, autocast
from transducer_toolkit.ops.lattice import LatticeBatch, LatticeShape


def join(enc: Tensor, pred: Tensor, shape: LatticeShape, *, activation: str = "tanh") -> Tensor:
    """Adds every frame to every symbol and applies the activation, for real cells only.

    Row (b, t, u) of the result is ``activation(enc[b, t] + pred[b, u])``. One native call instead
    of slicing, adding and concatenating per utterance; backward is two segmented sums whose order
    of summation is fixed, so gradients do not depend on the number of threads. Padding of enc and
    pred is never read and gets zero gradient.

    Args:
        enc: (B, T, D) float16, bfloat16, float32 or float64; T at least the longest logit length.
        pred: (B, U + 1, D), same dtype and device; U at least the longest target length.
        shape: the lattices.
        activation: "tanh", "relu", "gelu", "silu" or "identity".

    Returns:
        (shape.num_cells, D), packed.

    Raises:
        TypeError: enc and pred are not of one supported dtype.
        ValueError: sizes that do not fit shape, or an unknown activation.

    Example:
        >>> shape = LatticeShape.from_lengths([2, 1], [1, 1])
        >>> join(torch.ones(2, 2, 3), torch.ones(2, 2, 3), shape, activation="identity").sum()
        tensor(36.)
    """
    _check(enc, pred, shape, activation)
    native.require_supported_device(enc.device)
    return torch.ops.transducer_toolkit.join(
        enc.contiguous(),
        pred.contiguous(),
        *shape.lengths,
        shape.index(enc.device),
        shape.num_cells,
        activation,
    )


def joiner_logits(
    enc: Tensor,
    pred: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    shape: LatticeShape,
    *,
    activation: str = "tanh",
) -> Tensor:
    """The output layer on top of :func:`join`: packed logits, without the hidden layer in memory.

    ``functional.linear(join(enc, pred, shape), weight, bias)``, by tiles: the hidden layer of a
    tile is made, multiplied and forgotten; backward makes it again. That saves ``2 * cells * D``
    numbers (the hidden layer and its gradient), and time as well: tiles stay in cache.

    Args:
        enc: (B, T, D) float16, bfloat16, float32 or float64; T at least the longest logit length.
            Under autocast it is cast to autocast's dtype.
        pred: (B, U + 1, D), same dtype and device; U at least the longest target length.
        weight: (V, D), of any floating dtype; cast to that of enc.
        bias: (V,) likewise, or None.
        shape: the lattices.
        activation: "tanh", "relu", "gelu", "silu" or "identity".

    Returns:
        (shape.num_cells, V), packed, dtype of enc.

    Raises:
        TypeError: a wrong dtype.
        ValueError: sizes that do not fit, or an unknown activation.

    Example:
        >>> shape = LatticeShape.from_lengths([2, 1], [1, 1])
        >>> enc = pred = torch.ones(2, 2, 3)
        >>> joiner_logits(enc, pred, torch.ones(7, 3), None, shape).shape
        torch.Size([6, 7])
    """
    _check(enc, pred, shape, activation)
    check_tensor(weight, "weight")
    if bias is not None:
        check_tensor(bias, "bias")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and not tensor.is_floating_point():
            raise TypeError(f"{name}: expected a floating dtype, got {tensor.dtype}")
        if tensor is not None and tensor.device != enc.device:
            raise ValueError(
                f"{name}: expected device {enc.device}, that of enc, got {tensor.device}"
            )
    if weight.dim() != 2 or weight.size(1) != enc.size(2):
        raise ValueError(
            f"weight: expected shape (V, {enc.size(2)}), D from enc, got {tuple(weight.shape)}"
        )
    if bias is not None and tuple(bias.shape) != (weight.size(0),):
        raise ValueError(
            f"bias: expected shape ({weight.size(0)},), V from weight, got {tuple(bias.shape)}"
        )
    native.require_supported_device(enc.device)
    enc, pred = autocast(enc), autocast(pred)
    return torch.ops.transducer_toolkit.joiner_logits(
        enc.contiguous(),
        pred.contiguous(),
        weight,
        bias,
        *shape.lengths,
        shape.index(enc.device),
        shape.num_cells,
        activation,
    )


_ACTIVATIONS = {
    "identity": lambda x: x,
    "tanh": torch.tanh,
    "relu": functional.relu,
    "gelu": functional.gelu,
    "silu": functional.silu,
}


def apply_activation(x: Tensor, activation: str) -> Tensor:
    """The activation of one of native.ACTIVATIONS in plain torch, any shape."""
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
            f"enc, pred: expected one dtype of {supported}, got {enc.dtype} and {pred.dtype}"
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


# --- the operator -------------------------------------------------------------------------------


def _lattice_batch(
    enc: Tensor,
    pred: Tensor,
    logit_lengths: Tensor,
    target_lengths: Tensor,
    index: Tensor | None,
    num_cells: int,
) -> LatticeBatch:
    return LatticeBatch(
        logit_lengths,
        target_lengths,
        # Only the width of the targets matters to a join.
        torch.empty(pred.size(0), pred.size(1) - 1, dtype=torch.int64, device=enc.device),
        num_rows=num_cells,
        max_frames=enc.size(1),
        padded=False,
        device=enc.device,
        index=index,
    )


def _forward(enc, pred, logit_lengths, target_lengths, index, num_cells, activation):
    batch = _lattice_batch(enc, pred, logit_lengths, target_lengths, index, num_cells)
    hidden = enc.new_empty(num_cells, enc.size(-1))
    stages.join_forward(enc, pred, batch, batch.all_rows(), activation=activation, out=hidden)
    return hidden


def _backward(grad_hidden, hidden, enc, pred, logit_lengths, target_lengths, index, activation):
    batch = _lattice_batch(enc, pred, logit_lengths, target_lengths, index, hidden.size(0))
    dtype = native.compute_dtype(enc.dtype)
    grads = torch.zeros_like(enc, dtype=dtype), torch.zeros_like(pred, dtype=dtype)
    stages.join_backward(
        grad_hidden.contiguous(),
        hidden,
        enc,
        pred,
        batch,
        batch.all_rows(),
        activation=activation,
        grad_enc=grads[0],
        grad_pred=grads[1],
    )
    return grads[0].to(enc.dtype), grads[1].to(pred.dtype)


torch.library.custom_op(
    "transducer_toolkit::join",
    _forward,
    mutates_args=(),
    schema="(Tensor enc, Tensor pred, Tensor logit_lengths, Tensor target_lengths, Tensor? index, "
    "SymInt num_cells, str activation) -> Tensor",
)
torch.library.custom_op(
    "transducer_toolkit::join_backward",
    _backward,
    mutates_args=(),
    schema="(Tensor grad_hidden, Tensor hidden, Tensor enc, Tensor pred, Tensor logit_lengths, "
    "Tensor target_lengths, Tensor? index, str activation) -> (Tensor, Tensor)",
)


@torch.library.register_fake("transducer_toolkit::join")
def _forward_fake(enc, pred, logit_lengths, target_lengths, index, num_cells, activation):
    return enc.new_empty(num_cells, enc.size(-1))


@torch.library.register_fake("transducer_toolkit::join_backward")
def _backward_fake(grad_hidden, hidden, enc, pred, *_):
    return torch.empty_like(enc), torch.empty_like(pred)


def _setup_context(ctx, inputs, output):
    *tensors, _, ctx.activation = inputs
    ctx.save_for_backward(output, *tensors)


def _differentiate(ctx, grad_hidden):
    grads = torch.ops.transducer_toolkit.join_backward(
        grad_hidden, *ctx.saved_tensors, ctx.activation
    )
    return *grads, None, None, None, None, None


torch.library.register_autograd(
    "transducer_toolkit::join", _differentiate, setup_context=_setup_context
)


def _refuse_second_derivative(ctx, *grads):
    raise RuntimeError(
        "joiner: the gradient of the gradient (create_graph=True) is not implemented"
    )


torch.library.register_autograd("transducer_toolkit::join_backward", _refuse_second_derivative)

# --- the same with the output layer on top --------------------------------------------------------


def _logits_forward(
    enc, pred, weight, bias, logit_lengths, target_lengths, index, num_cells, activation
):
    batch = _lattice_batch(enc, pred, logit_lengths, target_lengths, index, num_cells)
    logits = native.empty(num_cells, weight.size(0), like=enc)
    with torch.autocast(enc.device.type, enabled=False):
        joint = JointTiles(enc, pred, weight, bias, batch, activation=activation)
        for tile in joint.tiles():
            joint.logits(joint.hidden(tile), out=logits[tile.begin : tile.begin + tile.size])
    return logits


def _logits_backward(
    grad_logits, enc, pred, weight, bias, logit_lengths, target_lengths, index, activation, wanted
):
    grad_logits = grad_logits.contiguous()
    batch = _lattice_batch(enc, pred, logit_lengths, target_lengths, index, grad_logits.size(0))
    with torch.autocast(enc.device.type, enabled=False):
        joint = JointTiles(enc, pred, weight, bias, batch, activation=activation)
        joint.start_backward(tuple(wanted))
        for tile in joint.tiles():
            grad_tile = grad_logits[tile.begin : tile.begin + tile.size]
            joint.backward(tile, joint.hidden(tile), grad_tile)
        grads = joint.gradients()
    return tuple(enc.new_empty(0) if grad is None else grad for grad in grads)


_TENSORS = (
    "Tensor enc, Tensor pred, Tensor weight, Tensor? bias, Tensor logit_lengths, "
    "Tensor target_lengths, Tensor? index"
)
torch.library.custom_op(
    "transducer_toolkit::joiner_logits",
    _logits_forward,
    mutates_args=(),
    schema=f"({_TENSORS}, SymInt num_cells, str activation) -> Tensor",
)
torch.library.custom_op(
    "transducer_toolkit::joiner_logits_backward",
    _logits_backward,
    mutates_args=(),
    schema=f"(Tensor grad_logits, {_TENSORS}, str activation, bool[] wanted) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
)


@torch.library.register_fake("transducer_toolkit::joiner_logits")
def _logits_fake(enc, pred, weight, bias, logit_lengths, target_lengths, index, num_cells, _):
    return enc.new_empty(num_cells, weight.size(0))


@torch.library.register_fake("transducer_toolkit::joiner_logits_backward")
def _logits_backward_fake(grad_logits, enc, pred, weight, bias, *arguments):
    return tuple(
        torch.empty_like(tensor) if is_wanted else enc.new_empty(0)
        for tensor, is_wanted in zip((enc, pred, weight, bias), arguments[-1], strict=True)
    )


def _logits_setup_context(ctx, inputs, output):
    *tensors, _, ctx.activation = inputs
    ctx.save_for_backward(*tensors)


def _logits_differentiate(ctx, grad_logits):
    wanted = [bool(needed) for needed in ctx.needs_input_grad[:4]]
    grads = torch.ops.transducer_toolkit.joiner_logits_backward(
        grad_logits, *ctx.saved_tensors, ctx.activation, wanted
    )
    inputs = (grad if is_wanted else None for grad, is_wanted in zip(grads, wanted, strict=True))
    return *inputs, None, None, None, None, None


torch.library.register_autograd(
    "transducer_toolkit::joiner_logits",
    _logits_differentiate,
    setup_context=_logits_setup_context,
)
torch.library.register_autograd(
    "transducer_toolkit::joiner_logits_backward", _refuse_second_derivative
)
