# SPDX-License-Identifier: Apache-2.0
"""The joiner: from encoder and predictor outputs to logits, packed without padding."""

from torch import Tensor, nn

from transducer_toolkit.ops.checks import check_at_least
from transducer_toolkit.ops.join import (
    apply_activation,
    check_activation,
    join,
    joiner_logits,
)
from transducer_toolkit.ops.lattice import LatticeShape


def is_plain_linear(module: nn.Module) -> bool:
    """Whether `module` is its weight and bias and nothing else: no subclass, hooks, pruning."""
    hooks = (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    )
    parametrized = hasattr(module, "parametrizations")
    return type(module) is nn.Linear and not parametrized and not any(hooks)


class Joiner(nn.Module):
    """``Linear(activation(Linear(encoder) + Linear(predictor)))`` for every cell of the lattice.

    Args:
        encoder_dim: E, width of the encoder's output.
        predictor_dim: P, width of the predictor's output.
        joiner_dim: D, width in which they are added.
        vocab_size: V, blank included.
        activation: "tanh", "relu", "gelu", "silu" or "identity".
        bias: whether the output layer has one.

    Raises:
        ValueError: if a size is below 1 or the activation is unknown.
        TypeError: if a size is no integer.

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
        sizes = {"encoder_dim": encoder_dim, "predictor_dim": predictor_dim}
        check_at_least(1, **sizes, joiner_dim=joiner_dim, vocab_size=vocab_size)
        self.activation = activation
        self.encoder_projection = nn.Linear(encoder_dim, joiner_dim)
        # One bias is enough for the sum of the two.
        self.predictor_projection = nn.Linear(predictor_dim, joiner_dim, bias=False)
        self.output = nn.Linear(joiner_dim, vocab_size, bias=bias)

    @property
    def vocab_size(self) -> int:
        return self.output.out_features

    @property
    def encoder_dim(self) -> int:
        return self.encoder_projection.in_features

    def forward(self, encoder_out: Tensor, predictor_out: Tensor, shape: LatticeShape) -> Tensor:
        """(B, T, E), (B, U + 1, P) -> packed logits (shape.num_cells, V)."""
        enc = self.encoder_projection(encoder_out)
        pred = self.predictor_projection(predictor_out)
        if is_plain_linear(self.output):
            parts = self.output.weight, self.output.bias
            return joiner_logits(enc, pred, *parts, shape, activation=self.activation)
        return self.output(join(enc, pred, shape, activation=self.activation))

    def padded(self, encoder_out: Tensor, predictor_out: Tensor) -> Tensor:
        """(B, T, E), (B, U + 1, P) -> logits (B, T, U + 1, V), padding included."""
        return self.step(encoder_out[:, :, None], predictor_out[:, None])

    def step(self, encoder_frames: Tensor, predictor_out: Tensor) -> Tensor:
        """(..., E), (..., P), broadcast against each other -> logits (..., V); for decoding."""
        return self.step_projected(self.project_encoder(encoder_frames), predictor_out)

    def project_encoder(self, encoder_out: Tensor) -> Tensor:
        """(..., E) -> (..., D): what of a step depends on the frame alone."""
        return self.encoder_projection(encoder_out)

    def step_projected(self, projected_frames: Tensor, predictor_out: Tensor) -> Tensor:
        """As :meth:`step`, of frames that :meth:`project_encoder` has seen."""
        hidden = projected_frames + self.predictor_projection(predictor_out)
        return self.output(apply_activation(hidden, self.activation))

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}"


class AdditiveJoiner(nn.Module):
    """``Linear(encoder) + Linear(predictor)``, am and lm in width V: what simple losses train.

    The interface of :class:`Joiner`, so that a model may have either.

    Args:
        encoder_dim: E, width of the encoder's output.
        predictor_dim: P, width of the predictor's output.
        vocab_size: V, blank included.

    Example:
        >>> joiner = AdditiveJoiner(encoder_dim=8, predictor_dim=4, vocab_size=10)
        >>> am, lm = joiner.parts(torch.zeros(2, 3, 8), torch.zeros(2, 3, 4))
        >>> am.shape, lm.shape
        (torch.Size([2, 3, 10]), torch.Size([2, 3, 10]))
    """

    def __init__(self, encoder_dim: int, predictor_dim: int, vocab_size: int) -> None:
        super().__init__()
        sizes = {"encoder_dim": encoder_dim, "predictor_dim": predictor_dim}
        check_at_least(1, **sizes, vocab_size=vocab_size)
        self.am = nn.Linear(encoder_dim, vocab_size)
        # One bias is enough for the sum of the two.
        self.lm = nn.Linear(predictor_dim, vocab_size, bias=False)

    @property
    def vocab_size(self) -> int:
        return self.am.out_features

    @property
    def encoder_dim(self) -> int:
        return self.am.in_features

    def parts(self, encoder_out: Tensor, predictor_out: Tensor) -> tuple[Tensor, Tensor]:
        """(B, T, E), (B, U + 1, P) -> am (B, T, V), lm (B, U + 1, V)."""
        return self.am(encoder_out), self.lm(predictor_out)

    def forward(self, encoder_out: Tensor, predictor_out: Tensor, shape: LatticeShape) -> Tensor:
        """(B, T, E), (B, U + 1, P) -> packed logits (shape.num_cells, V)."""
        return join(*self.parts(encoder_out, predictor_out), shape, activation="identity")

    def padded(self, encoder_out: Tensor, predictor_out: Tensor) -> Tensor:
        """(B, T, E), (B, U + 1, P) -> logits (B, T, U + 1, V), padding included."""
        return self.step(encoder_out[:, :, None], predictor_out[:, None])

    def step(self, encoder_frames: Tensor, predictor_out: Tensor) -> Tensor:
        """(..., E), (..., P), broadcast against each other -> logits (..., V); for decoding."""
        return self.step_projected(self.project_encoder(encoder_frames), predictor_out)

    def project_encoder(self, encoder_out: Tensor) -> Tensor:
        """(..., E) -> am (..., V): what of a step depends on the frame alone."""
        return self.am(encoder_out)

    def step_projected(self, projected_frames: Tensor, predictor_out: Tensor) -> Tensor:
        """As :meth:`step`, of frames that :meth:`project_encoder` has seen."""
        return projected_frames + self.lm(predictor_out)
