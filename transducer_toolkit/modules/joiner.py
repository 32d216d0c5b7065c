# SPDX-License-Identifier: Apache-2.0
"""Joiners, which compute logits from encoder and predictor outputs."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from transducer_toolkit.ops.checks import check_at_least, check_choice, check_int
from transducer_toolkit.ops.join import (
    apply_activation,
    check_activation,
    join,
    joiner_logits,
)
from transducer_toolkit.ops.lattice import LatticeShape
from transducer_toolkit.ops.options import NORMALIZATIONS

# The methods of a joiner that compute logits, and those that are made from them.
FORMULA = ("forward", "padded", "join_projected", "internal_lm")
STEPS = ("step", "step_projected", "project_encoder", "project_predictor")


def is_plain_linear(module: nn.Module) -> bool:
    """Returns whether `module` is an nn.Linear without subclass, hooks or parametrizations."""
    hooks = (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    )
    parametrized = hasattr(module, "parametrizations")
    return type(module) is nn.Linear and not parametrized and not any(hooks)


class Joiner(nn.Module):
    """Computes ``Linear(activation(Linear(encoder) + Linear(predictor)))`` of each lattice cell.

    Write a class of its own for a joiner of another formula; `docs/own_parts.md` lists its methods.
    A subclass that changes the formula has to override :meth:`forward`, :meth:`padded`,
    :meth:`join_projected` and :meth:`internal_lm`, all of them.

    Args:
        encoder_dim: E, width of the encoder's output.
        predictor_dim: P, width of the predictor's output.
        joiner_dim: D, width of the hidden layer.
        vocab_size: V, including blank.
        activation: "tanh", "relu", "gelu", "silu" or "identity".
        bias: whether the output layer has a bias.
        num_extra: logits behind those of the V symbols: of the durations of a token-and-duration
            transducer, or of the big blanks of a multi-blank transducer whose blank is 0.
        normalization: "softmax", or "hat" for a hybrid autoregressive transducer. It changes what a
            decoder gets from :meth:`step`: log-probabilities then.
        blank: index of blank; read for "hat" only.

    Raises:
        TypeError: if a size is not an int; when a subclass is defined that overrides only a part of
            the formula.
        ValueError: if a size is below 1 or the activation is unknown.

    Example:
        >>> joiner = Joiner(encoder_dim=8, predictor_dim=4, joiner_dim=16, vocab_size=10)
        >>> shape = LatticeShape.from_lengths([3, 2], [1, 2])
        >>> joiner(torch.zeros(2, 3, 8), torch.zeros(2, 3, 4), shape).shape
        torch.Size([12, 10])
    """

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        # A training calls forward or padded, a search join_projected: they must agree.
        changed = {
            name for name in FORMULA + STEPS if getattr(cls, name) is not getattr(Joiner, name)
        }
        missing = [name for name in FORMULA if name not in changed]
        if changed and missing:
            raise TypeError(
                f"{cls.__name__}: expected a subclass of Joiner that overrides "
                f"{', '.join(FORMULA)} or none of them, got one without {', '.join(missing)}, so "
                "that trainings and searches would compute different logits"
            )

    def __init__(
        self,
        encoder_dim: int,
        predictor_dim: int,
        joiner_dim: int,
        vocab_size: int,
        *,
        activation: str = "tanh",
        bias: bool = True,
        num_extra: int = 0,
        normalization: str = "softmax",
        blank: int = 0,
    ) -> None:
        super().__init__()
        check_activation(activation)
        check_at_least(0, num_extra=num_extra)
        sizes = {"encoder_dim": encoder_dim, "predictor_dim": predictor_dim}
        check_at_least(1, **sizes, joiner_dim=joiner_dim, vocab_size=vocab_size)
        self.activation = activation
        self.encoder_projection = nn.Linear(encoder_dim, joiner_dim)
        # Without bias, because the two projections are added and one bias suffices.
        self.predictor_projection = nn.Linear(predictor_dim, joiner_dim, bias=False)
        check_choice(normalization, "normalization", NORMALIZATIONS)
        check_int(blank, "blank")
        self.num_extra = num_extra
        self.normalization, self.blank = normalization, blank
        self.output = nn.Linear(joiner_dim, vocab_size + num_extra, bias=bias)

    @property
    def vocab_size(self) -> int:
        return self.output.out_features - self.num_extra

    @property
    def encoder_dim(self) -> int:
        return self.encoder_projection.in_features

    def forward(self, encoder_out: Tensor, predictor_out: Tensor, shape: LatticeShape) -> Tensor:
        """Computes the packed logits of all lattice cells.

        Args:
            encoder_out: (B, T, E) float.
            predictor_out: (B, U + 1, P) float.
            shape: the lattices of the batch.

        Returns:
            (shape.num_cells, V + num_extra).
        """
        enc = self.encoder_projection(encoder_out)
        pred = self.predictor_projection(predictor_out)
        if is_plain_linear(self.output):
            parts = self.output.weight, self.output.bias
            return joiner_logits(enc, pred, *parts, shape, activation=self.activation)
        return self.output(join(enc, pred, shape, activation=self.activation))

    def padded(self, encoder_out: Tensor, predictor_out: Tensor) -> Tensor:
        """Computes padded logits (B, T, U + 1, V) from (B, T, E) and (B, U + 1, P)."""
        frames = self.project_encoder(encoder_out[:, :, None])
        return self._logits(frames, self.project_predictor(predictor_out[:, None]))

    def step(self, encoder_frames: Tensor, predictor_out: Tensor) -> Tensor:
        """Computes logits (..., V) from (..., E) and (..., P), which broadcast; for decoding."""
        return self.step_projected(self.project_encoder(encoder_frames), predictor_out)

    def project_encoder(self, encoder_out: Tensor) -> Tensor:
        """Computes the part (..., D) of :meth:`step` that depends only on the frames (..., E)."""
        return self.encoder_projection(encoder_out)

    def step_projected(self, projected_frames: Tensor, predictor_out: Tensor) -> Tensor:
        """Computes :meth:`step` from the output of :meth:`project_encoder`."""
        return self.join_projected(projected_frames, self.project_predictor(predictor_out))

    def project_predictor(self, predictor_out: Tensor) -> Tensor:
        """Computes the part (..., D) of :meth:`step` that depends only on the symbols (..., P)."""
        return self.predictor_projection(predictor_out)

    def join_projected(self, projected_frames: Tensor, projected_predictor: Tensor) -> Tensor:
        """Computes :meth:`step` from :meth:`project_encoder` and :meth:`project_predictor`."""
        return self.normalized(self._logits(projected_frames, projected_predictor))

    def _logits(self, projected_frames: Tensor, projected_predictor: Tensor) -> Tensor:
        hidden = apply_activation(projected_frames + projected_predictor, self.activation)
        return self.output(hidden)

    def normalized(self, logits: Tensor) -> Tensor:
        """Returns logits (..., V + num_extra) whose softmax is the distribution of the symbols.

        For "softmax" these are the given ones, for "hat" log-probabilities.
        """
        if self.normalization == "softmax":
            return logits
        symbols, extra = logits.tensor_split([self.vocab_size], -1)
        is_blank = torch.arange(self.vocab_size, device=logits.device) == self.blank
        labels = symbols.masked_fill(is_blank, -torch.inf).log_softmax(-1)
        of_blank = symbols[..., self.blank, None]
        labels = labels + functional.logsigmoid(-of_blank)
        log_probs = torch.where(is_blank, functional.logsigmoid(of_blank), labels)
        return torch.cat([log_probs, extra], -1)

    def internal_lm(self, predictor_out: Tensor, *, blank: int | None = None) -> Tensor:
        """Computes the internal language model: log-probabilities (..., V) of the next label.

        The joiner gets an encoder frame of zeros, and blank is left out. For "hat" this is what the
        model itself says of labels; for "softmax" it is the usual estimate.

        Args:
            predictor_out: (..., P).
            blank: index of blank; None for that of the joiner.

        Source:
            E. Variani et al., "Hybrid Autoregressive Transducer (HAT)", 2020, section 2.3.
        """
        frame = predictor_out.new_zeros(self.encoder_dim)
        logits = self._logits(self.project_encoder(frame), self.project_predictor(predictor_out))
        logits = logits[..., : self.vocab_size]
        blank = self.blank if blank is None else blank
        is_blank = torch.arange(self.vocab_size, device=logits.device) == blank
        return logits.masked_fill(is_blank, -torch.inf).log_softmax(-1)

    def extra_repr(self) -> str:
        extra = f", num_extra={self.num_extra}" if self.num_extra else ""
        if self.normalization != "softmax":
            extra += f", normalization={self.normalization!r}"
        return f"activation={self.activation!r}{extra}"


class AdditiveJoiner(nn.Module):
    """Computes logits ``am + lm = Linear(encoder) + Linear(predictor)``, as in the simple losses.

    It has the interface of :class:`Joiner`, so that a model can use either class.

    Args:
        encoder_dim: E, width of the encoder's output.
        predictor_dim: P, width of the predictor's output.
        vocab_size: V, including blank.

    Raises:
        TypeError: if a size is not an int.
        ValueError: if a size is below 1.

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
        # Without bias, because am and lm are added and one bias suffices.
        self.lm = nn.Linear(predictor_dim, vocab_size, bias=False)

    @property
    def vocab_size(self) -> int:
        return self.am.out_features

    @property
    def encoder_dim(self) -> int:
        return self.am.in_features

    def parts(self, encoder_out: Tensor, predictor_out: Tensor) -> tuple[Tensor, Tensor]:
        """Computes am (B, T, V) from (B, T, E), and lm (B, U + 1, V) from (B, U + 1, P)."""
        return self.am(encoder_out), self.lm(predictor_out)

    def forward(self, encoder_out: Tensor, predictor_out: Tensor, shape: LatticeShape) -> Tensor:
        """Computes the packed logits (shape.num_cells, V); arguments as in :class:`Joiner`."""
        return join(*self.parts(encoder_out, predictor_out), shape, activation="identity")

    def padded(self, encoder_out: Tensor, predictor_out: Tensor) -> Tensor:
        """Computes padded logits (B, T, U + 1, V) from (B, T, E) and (B, U + 1, P)."""
        return self.step(encoder_out[:, :, None], predictor_out[:, None])

    def step(self, encoder_frames: Tensor, predictor_out: Tensor) -> Tensor:
        """Computes logits (..., V) from (..., E) and (..., P), which broadcast; for decoding."""
        return self.step_projected(self.project_encoder(encoder_frames), predictor_out)

    def project_encoder(self, encoder_out: Tensor) -> Tensor:
        """Computes am (..., V), the part of :meth:`step` that depends only on frames (..., E)."""
        return self.am(encoder_out)

    def step_projected(self, projected_frames: Tensor, predictor_out: Tensor) -> Tensor:
        """Computes :meth:`step` from the output of :meth:`project_encoder`."""
        return self.join_projected(projected_frames, self.project_predictor(predictor_out))

    def project_predictor(self, predictor_out: Tensor) -> Tensor:
        """Computes lm (..., V), the part of :meth:`step` that depends only on the symbols."""
        return self.lm(predictor_out)

    def join_projected(self, projected_frames: Tensor, projected_predictor: Tensor) -> Tensor:
        """Computes :meth:`step` from :meth:`project_encoder` and :meth:`project_predictor`."""
        return projected_frames + projected_predictor

    def internal_lm(self, predictor_out: Tensor, *, blank: int = 0) -> Tensor:
        """Computes log-probabilities (..., V) of the next label, as :meth:`Joiner.internal_lm`."""
        logits = self.am.bias + self.lm(predictor_out)
        is_blank = torch.arange(self.vocab_size, device=logits.device) == blank
        return logits.masked_fill(is_blank, -torch.inf).log_softmax(-1)
