# SPDX-License-Identifier: Apache-2.0
"""Reduction of per-utterance losses, the same for every loss."""

from __future__ import annotations

from torch import Tensor

REDUCTIONS = ("none", "mean", "sum")


def check_reduction(reduction: str) -> None:
    """Raises a ValueError unless `reduction` is one of REDUCTIONS."""
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction: expected one of {REDUCTIONS}, got {reduction!r}")


def reduce_losses(losses: Tensor, reduction: str) -> Tensor:
    """(B,) -> (B,) for "none", scalar for "mean" (over utterances) and "sum"."""
    if reduction == "none":
        return losses
    return losses.mean() if reduction == "mean" else losses.sum()
