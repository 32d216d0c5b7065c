# SPDX-License-Identifier: Apache-2.0
"""Largest gradient error of float32 losses against float64 on the same numbers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from torch import Tensor

from benchmarks.truth import Truth
from benchmarks.workloads import Workload

SIZES = ((20, 5), (100, 20), (343, 71), (1000, 200), (3000, 30), (3000, 600))  # (T, U)
SCALES = (1.0, 10.0, 100.0)


def precision_workloads(base: Workload, max_frames: int) -> Iterator[Workload]:
    """One utterance of each size up to `max_frames` frames."""
    for frames, symbols in SIZES:
        if frames <= max_frames:
            yield replace(base, frames=(frames,), symbols=(symbols,))


def scaled(workload: Workload) -> Iterator[Workload]:
    """The workload with its logits at each scale."""
    for scale in SCALES:
        yield replace(workload, logits_scale=scale)


def largest_error(gradient: Tensor, reference: Truth) -> float:
    """Of any entry of a packed gradient (cells, V); NaN if one is."""
    errors = [
        (gradient[rows].double() - exact).abs().max() for rows, exact in reference.gradient_tiles()
    ]
    largest = errors[0]
    for error in errors[1:]:
        largest = largest.maximum(error)  # unlike Python's max, keeps a NaN
    return largest.item()
