# SPDX-License-Identifier: Apache-2.0
"""The joiner: from encoder and predictor outputs to logits, packed without padding."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from transducer_toolkit import native
from transducer_toolkit.lattice import LatticeShape

_ACTIVATIONS = {
    "identity": lambda x: x,
    "tanh": torch.tanh,
    "relu": functional.relu,
    "gelu": functional.gelu,
    "silu": functional.silu,
}


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
    check_activation(activation)
    for name, value, kind in (
        ("enc", enc, Tensor),
        ("pred", pred, Tensor),
        ("shape", shape, LatticeShape),
    ):
        if not isinstance(value, kind):
            raise TypeError(f"{name}: expected a {kind.__name__}, got {type(value).__name__}")
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
    native.require_supported_device(enc.device)
    return torch.ops.transducer_toolkit.join(
        enc.contiguous(),
        pred.contiguous(),
        shape.logit_lengths,
        shape.target_lengths,
        shape.num_cells,
        activation,
    )


def check_activation(activation: str) -> None:
    """Raises a ValueError unless `activation` is one of native.ACTIVATIONS."""
    if activation not in native.ACTIVATIONS:
        raise ValueError(f"activation: expected one of {native.ACTIVATIONS}, got {activation!r}")


class Joiner(nn.Module):
    """``Linear(activation(Linear(encoder) + Linear(predictor)))`` for every cell of the lattice.

    Args:
        encoder_dim: E, width of the encoder's output.
        predictor_dim: P, width of the predictor's output.
        joiner_dim: D, width in which they are added.
        vocab_size: V, blank included.
        activation: "tanh", "relu", "gelu", "silu" or "identity".
        bias: whether the output layer has one.

    Example:
        >>> joiner = Joiner(encoder_dim=8, predictor_dim=4, joiner_dim=16, vocab_size=10)
        >>> shape = LatticeShape.from_lengths([3, 2], [1, 2])
        >>> joiner(torch.zeros(2, 3, 8), torch.zeros(2, 3, 4), shape).shape
        torch.Size([12, 10])
    """

    def __init__(
        self,
        encoder_dim: int,
        predictor_dim: int,
        joiner_dim: int,
        vocab_size: int,
        *,
        activation: str = "tanh",
        bias: bool = True,
    ) -> None:
        super().__init__()
        check_activation(activation)
        self.activation = activation
        self.encoder_projection = nn.Linear(encoder_dim, joiner_dim)
        # One bias is enough for the sum of the two.
        self.predictor_projection = nn.Linear(predictor_dim, joiner_dim, bias=False)
        self.output = nn.Linear(joiner_dim, vocab_size, bias=bias)

    @property
    def vocab_size(self) -> int:
        return self.output.out_features

    def forward(self, encoder_out: Tensor, predictor_out: Tensor, shape: LatticeShape) -> Tensor:
        """(B, T, E), (B, U + 1, P) -> packed logits (shape.num_cells, V)."""
        enc = self.encoder_projection(encoder_out)
        pred = self.predictor_projection(predictor_out)
        return self.output(join(enc, pred, shape, activation=self.activation))

    def padded(self, encoder_out: Tensor, predictor_out: Tensor) -> Tensor:
        """(B, T, E), (B, U + 1, P) -> logits (B, T, U + 1, V), padding included."""
        return self.step(encoder_out[:, :, None], predictor_out[:, None])

    def step(self, encoder_frames: Tensor, predictor_out: Tensor) -> Tensor:
        """(..., E), (..., P), broadcast against each other -> logits (..., V); for decoding."""
        hidden = self.encoder_projection(encoder_frames) + self.predictor_projection(predictor_out)
        return self.output(_ACTIVATIONS[self.activation](hidden))

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}"


# --- the operator -------------------------------------------------------------------------------


def _lattice_batch(
    enc: Tensor, pred: Tensor, logit_lengths: Tensor, target_lengths: Tensor, num_cells: int
) -> native.LatticeBatch:
    return native.LatticeBatch(
        logit_lengths,
        target_lengths,
        # Only the width of the targets matters to a join.
        torch.empty(pred.size(0), pred.size(1) - 1, dtype=torch.int64, device=enc.device),
        num_rows=num_cells,
        max_frames=enc.size(1),
        padded=False,
        device=enc.device,
    )


def _forward(enc, pred, logit_lengths, target_lengths, num_cells, activation):
    batch = _lattice_batch(enc, pred, logit_lengths, target_lengths, num_cells)
    hidden = enc.new_empty(num_cells, enc.size(-1))
    native.join_forward(enc, pred, batch, batch.all_rows(), activation=activation, out=hidden)
    return hidden


def _backward(grad_hidden, hidden, enc, pred, logit_lengths, target_lengths, activation):
    batch = _lattice_batch(enc, pred, logit_lengths, target_lengths, hidden.size(0))
    dtype = native.compute_dtype(enc.dtype)
    grads = torch.zeros_like(enc, dtype=dtype), torch.zeros_like(pred, dtype=dtype)
    native.join_backward(
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
    schema="(Tensor enc, Tensor pred, Tensor logit_lengths, Tensor target_lengths, "
    "SymInt num_cells, str activation) -> Tensor",
)
torch.library.custom_op(
    "transducer_toolkit::join_backward",
    _backward,
    mutates_args=(),
    schema="(Tensor grad_hidden, Tensor hidden, Tensor enc, Tensor pred, Tensor logit_lengths, "
    "Tensor target_lengths, str activation) -> (Tensor, Tensor)",
)


@torch.library.register_fake("transducer_toolkit::join")
def _forward_fake(enc, pred, logit_lengths, target_lengths, num_cells, activation):
    return enc.new_empty(num_cells, enc.size(-1))


@torch.library.register_fake("transducer_toolkit::join_backward")
def _backward_fake(grad_hidden, hidden, enc, pred, *_):
    return torch.empty_like(enc), torch.empty_like(pred)


def _setup_context(ctx, inputs, output):
    enc, pred, logit_lengths, target_lengths, _, ctx.activation = inputs
    ctx.save_for_backward(output, enc, pred, logit_lengths, target_lengths)


def _differentiate(ctx, grad_hidden):
    grads = torch.ops.transducer_toolkit.join_backward(
        grad_hidden, *ctx.saved_tensors, ctx.activation
    )
    return *grads, None, None, None, None


torch.library.register_autograd(
    "transducer_toolkit::join", _differentiate, setup_context=_setup_context
)


def _refuse_second_derivative(ctx, *grads):
    raise RuntimeError("join: the gradient of the gradient (create_graph=True) is not implemented")


torch.library.register_autograd("transducer_toolkit::join_backward", _refuse_second_derivative)
