# SPDX-License-Identifier: Apache-2.0
"""The joiner: from encoder and predictor outputs to logits, packed without padding."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from transducer_toolkit.lattice import LatticeShape
from transducer_toolkit.modules.joint import check_activation, join, joiner_logits

_ACTIVATIONS = {
    "identity": lambda x: x,
    "tanh": torch.tanh,
    "relu": functional.relu,
    "gelu": functional.gelu,
    "silu": functional.silu,
}


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
        output = self.output
        if type(output) is nn.Linear and not output._forward_hooks:
            parts = output.weight, output.bias
            return joiner_logits(enc, pred, *parts, shape, activation=self.activation)
        return output(join(enc, pred, shape, activation=self.activation))

    def padded(self, encoder_out: Tensor, predictor_out: Tensor) -> Tensor:
        """(B, T, E), (B, U + 1, P) -> logits (B, T, U + 1, V), padding included."""
        return self.step(encoder_out[:, :, None], predictor_out[:, None])

    def step(self, encoder_frames: Tensor, predictor_out: Tensor) -> Tensor:
        """(..., E), (..., P), broadcast against each other -> logits (..., V); for decoding."""
        hidden = self.encoder_projection(encoder_frames) + self.predictor_projection(predictor_out)
        return self.output(_ACTIVATIONS[self.activation](hidden))

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}"
