# SPDX-License-Identifier: Apache-2.0
"""Whether an implementation computed the right thing: no time is believed before that.

Gradients live in different processes and layouts and may be gigabytes, so signatures of them are
compared: each row is projected on a few fixed random vectors, and rows are added up with random
signs into a few buckets. The map is linear and keeps lengths on average, so the distance between
two signatures estimates the distance between the gradients.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

PROJECTIONS, BUCKETS = 4, 64
CHUNK_ROWS = 4096
LOSS_TOLERANCE = 1e-3  # of an utterance's loss
GRADIENT_TOLERANCE = 1e-2  # L2 norm of the error, relative to that of the gradient
TOKEN_TOLERANCE = 1e-2  # edits a token of the transcript


class Signature:
    """Of a matrix whose rows arrive in any order."""

    def __init__(self, width: int) -> None:
        generator = torch.Generator().manual_seed(width)
        self.directions = torch.randn(
            width, PROJECTIONS, generator=generator, dtype=torch.float64
        ).div_(PROJECTIONS**0.5)
        self.buckets = torch.zeros(BUCKETS, PROJECTIONS, dtype=torch.float64)

    def add(self, first_row: int, rows: Tensor) -> None:
        """Adds rows (N, width), the first of which is row `first_row` of the matrix."""
        projected = rows.double().cpu() @ self.directions
        # Fibonacci hashing of the row's number: the upper bits are as good as random.
        hashed = (torch.arange(first_row, first_row + rows.size(0)) * 2654435769) % 2**32
        signs = 1.0 - 2.0 * (hashed >> 31).double()
        self.buckets.index_add_(0, (hashed >> 24) % BUCKETS, projected * signs[:, None])

    def values(self) -> list[float]:
        return self.buckets.flatten().tolist()


def signature(gradient: Tensor) -> list[float]:
    """Signature of a whole gradient; its rows are those of the last axis."""
    rows = gradient[:, None] if gradient.dim() == 1 else gradient.flatten(0, -2)
    made = Signature(rows.size(1))
    for start in range(0, rows.size(0), CHUNK_ROWS):
        made.add(start, rows[start : start + CHUNK_ROWS])
    return made.values()


def loss_error(losses: list[float], reference: list[float]) -> float:
    """Largest relative difference; of the sums, where an implementation gives no more than that."""
    if len(losses) != len(reference):
        losses, reference = [sum(losses)], [sum(reference)]
    return _largest(
        abs(ours - theirs) / max(abs(theirs), 1e-30)
        for ours, theirs in zip(losses, reference, strict=True)
    )


def gradient_error(signatures: list[list[float]], reference: list[list[float]]) -> float:
    """Largest relative L2 distance between a gradient and its reference, as estimated."""
    return _largest(
        math.dist(ours, theirs) / max(math.hypot(*theirs), 1e-30)
        for ours, theirs in zip(signatures, reference, strict=True)
    )


def token_error(tokens: list[list[int]], reference: list[list[int]]) -> float:
    """Edits that turn the reference into these tokens, a token of the reference."""
    from torchaudio.functional import edit_distance

    edits = sum(edit_distance(*pair) for pair in zip(reference, tokens, strict=True))
    return edits / max(1, sum(map(len, reference)))


def disagreement(result: dict, reference: dict) -> str:
    """What is wrong with `result`; empty if nothing is. Notes the errors in `result`."""
    if "tokens" in reference:
        result["token_error"] = token_error(result["tokens"], reference["tokens"])
        wrong = result["token_error"] > TOKEN_TOLERANCE
        return f"{result['token_error']:.1%} token errors" if wrong else ""
    result["loss_error"] = loss_error(result["losses"], reference["losses"])
    result["gradient_error"] = gradient_error(result["signatures"], reference["signatures"])
    found = []
    # A NaN is within no tolerance.
    if not result["loss_error"] <= LOSS_TOLERANCE:
        found.append(f"loss off by {result['loss_error']:.1e}")
    if not result["gradient_error"] <= GRADIENT_TOLERANCE:
        found.append(f"gradient off by {result['gradient_error']:.1e}")
    return ", ".join(found)


def _largest(errors) -> float:
    errors = list(errors)
    return float("nan") if any(map(math.isnan, errors)) else max(errors)
