# SPDX-License-Identifier: Apache-2.0
"""What a search finds, and what every search is to the rest of the toolkit."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

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
