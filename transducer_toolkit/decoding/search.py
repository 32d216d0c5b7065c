# SPDX-License-Identifier: Apache-2.0
"""What a search is to the rest of the toolkit, what it finds, and what searches share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor


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


def check_encoder_lengths(encoder_out: Tensor, encoder_lengths: Tensor) -> None:
    """Raise a ValueError unless ``encoder_lengths`` are those of a batch (B, T, E)."""
    if encoder_out.dim() != 3:
        raise ValueError(f"encoder_out must have shape (B, T, E), got {tuple(encoder_out.shape)}")
    batch_size, max_frames, _ = encoder_out.shape
    if encoder_lengths.shape != (batch_size,):
        raise ValueError(
            f"encoder_lengths must have shape ({batch_size},), got {tuple(encoder_lengths.shape)}"
        )
    if batch_size == 0:
        return
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
