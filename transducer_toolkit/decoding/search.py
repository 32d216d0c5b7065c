# SPDX-License-Identifier: Apache-2.0
"""What a search is to the rest of the toolkit, what it finds, and what searches share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from transducer_toolkit.ops.checks import INDEX_DTYPES, check_dtype, check_tensor
from transducer_toolkit.ops.native import SUPPORTED_DTYPES


@dataclass(frozen=True)
class Hypothesis:
    """What a search found in one utterance, or in one chunk of it.

    Attributes:
        tokens: symbol ids, without blanks.
        frames: for each token the encoder frame that emitted it.
        log_probs: for each token the log-probability (natural logarithm) that its cell of the
            lattice gave it; its exponential is the token's confidence. Left out of comparisons,
            because float rounding differs between batches.
    """

    tokens: list[int]
    frames: list[int]
    log_probs: list[float] = field(default_factory=list, compare=False)


class Search(Protocol):
    """A search, bound to the predictor and the joiner of a model."""

    def __call__(self, encoder_out: Tensor, encoder_lengths: Tensor) -> list[Hypothesis]:
        """Decode a batch.

        Args:
            encoder_out: (B, T, E) float.
            encoder_lengths: (B,) int64, in encoder frames, on any device.

        Returns:
            The best hypothesis of each utterance.
        """


class NonFiniteScoresError(ValueError):
    """Some utterances have logits that are NaN, +inf or nothing but -inf: there is no best symbol.

    Args:
        utterances: their places in the batch.
        names: of all utterances of the batch, for the message.

    Attributes:
        utterances: the places.
    """

    def __init__(self, utterances: Sequence[int], *, names: Sequence[str] | None = None) -> None:
        self.utterances = list(utterances)
        places = ", ".join(
            f"encoder_out[{b}]" if names is None else names[b] for b in self.utterances[:5]
        )
        more = len(self.utterances) - 5
        super().__init__(
            f"{places}{f' and {more} more' if more > 0 else ''}: the scores of the symbols are NaN "
            "or infinite; look at the audio of the utterance and at the weights of the model"
        )


def refuse_non_finite(is_bad: Tensor) -> None:
    """Raise a NonFiniteScoresError if an entry of ``is_bad`` (B,) is true."""
    if bool(is_bad.any()):
        raise NonFiniteScoresError(is_bad.nonzero().flatten().tolist())


def check_model(predictor: object, joiner: object) -> None:
    """Raise unless both offer what a search calls, for the same number of symbols.

    Raises:
        TypeError: one is no predictor or joiner.
        ValueError: their vocabularies differ.
    """
    for name, module, needed in (
        ("predictor", predictor, ("blank", "vocab_size", "initial_state", "step")),
        ("joiner", joiner, ("step",)),
    ):
        if not all(hasattr(module, attribute) for attribute in needed):
            raise TypeError(
                f"{name}: expected a {name.capitalize()} of transducer_toolkit.modules, or what "
                f"has its {', '.join(needed)}; got {type(module).__name__}"
            )
    sizes = [getattr(module, "vocab_size", None) for module in (predictor, joiner)]
    if None not in sizes and sizes[0] != sizes[1]:
        raise ValueError(
            f"predictor and joiner must have the same vocab_size, got {sizes[0]} and {sizes[1]}"
        )


def check_encoder_out(encoder_out: Tensor, joiner: object) -> None:
    """Raise unless the joiner takes ``encoder_out`` (B, T, E): width, dtype and device."""
    width = getattr(joiner, "encoder_dim", None)
    if width is None:  # a joiner of the user's: it knows what it takes
        return
    if encoder_out.size(2) != width:
        raise ValueError(
            f"encoder_out must have shape (B, T, {width}) for this joiner, "
            f"got {tuple(encoder_out.shape)}"
        )
    weight = next(joiner.parameters())  # type: ignore[attr-defined]
    if encoder_out.device != weight.device:
        raise ValueError(
            f"encoder_out must be on the joiner's device {weight.device}, got {encoder_out.device}"
        )
    if encoder_out.dtype != weight.dtype and not torch.is_autocast_enabled(weight.device.type):
        raise TypeError(
            f"encoder_out must have the joiner's dtype {weight.dtype}, got {encoder_out.dtype}"
        )


def check_encoder_lengths(encoder_out: Tensor, encoder_lengths: Tensor) -> None:
    """Raise unless ``encoder_lengths`` are those of a batch (B, T, E).

    Raises:
        TypeError: one is no dense tensor, or not of floats and integers.
        ValueError: shapes do not fit, or a length is not in [0, T].
    """
    check_tensor(encoder_out, "encoder_out")
    check_tensor(encoder_lengths, "encoder_lengths")
    check_dtype(encoder_out, "encoder_out", SUPPORTED_DTYPES)
    if encoder_out.dim() != 3:
        raise ValueError(f"encoder_out must have shape (B, T, E), got {tuple(encoder_out.shape)}")
    batch_size, max_frames, _ = encoder_out.shape
    if encoder_lengths.shape != (batch_size,):
        raise ValueError(
            f"encoder_lengths must have shape ({batch_size},), got {tuple(encoder_lengths.shape)}"
        )
    if batch_size == 0:
        return
    check_dtype(encoder_lengths, "encoder_lengths", INDEX_DTYPES)
    if encoder_lengths.device.type == "meta":
        raise ValueError("encoder_lengths: expected numbers, got a tensor on device meta")
    shortest, longest = (int(bound) for bound in encoder_lengths.aminmax())
    if not 0 <= shortest <= longest <= max_frames:
        raise ValueError(
            f"encoder_lengths must lie in [0, {max_frames}], got values from {shortest} to "
            f"{longest}"
        )


def step_where(
    emits: Tensor,
    step: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    tokens: Tensor,
    out: Tensor,
    state: Tensor,
) -> tuple[Tensor, Tensor]:
    """Let a predictor or language model consume the tokens of those rows that emit one.

    Args:
        emits: (N,) bool.
        step: of the predictor or language model.
        tokens: (N,) int64, any valid id where nothing is emitted.
        out: (N, ...) its last output.
        state: (N, ...) its state.

    Returns:
        Output and state, the old ones in rows that emit nothing.
    """

    def select(new: Tensor, old: Tensor) -> Tensor:
        return torch.where(emits.view(-1, *[1] * (new.dim() - 1)), new, old)

    next_out, next_state = step(tokens, state)
    return select(next_out, out), select(next_state, state)


def collect_hypotheses(
    steps: Sequence[tuple[Tensor, Tensor, Tensor]], num_hypotheses: int, blank: int
) -> list[Hypothesis]:
    """Gather what the steps of a search emitted into one hypothesis a row.

    Args:
        steps: tokens, frames and log-probabilities of each step, all (N,); blank where a row
            emitted nothing.
        num_hypotheses: N.
        blank: id of blank.

    Example:
        >>> step = torch.tensor([0, 3]), torch.tensor([5, 5]), torch.tensor([0.0, -0.5])
        >>> collect_hypotheses([step], 2, blank=0)[1]
        Hypothesis(tokens=[3], frames=[5], log_probs=[-0.5])
    """
    hypotheses = [Hypothesis([], [], []) for _ in range(num_hypotheses)]
    if steps:
        # Each (N, steps): row by row, in the order of emission.
        tokens, frames, log_probs = (
            torch.stack(column, dim=1).cpu() for column in zip(*steps, strict=True)
        )
        emitted = tokens != blank
        columns = (emitted.nonzero()[:, 0], tokens[emitted], frames[emitted], log_probs[emitted])
        for row, token, frame, log_prob in zip(*(c.tolist() for c in columns), strict=True):
            hypotheses[row].tokens.append(token)
            hypotheses[row].frames.append(frame)
            hypotheses[row].log_probs.append(log_prob)
    return hypotheses
