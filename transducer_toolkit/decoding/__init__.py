# SPDX-License-Identifier: Apache-2.0
"""From encoder frames to symbols and their times."""

from transducer_toolkit.decoding.alignment import (
    Alignment,
    align,
    best_path,
    lattice_occupancy,
    lattice_scores,
)
from transducer_toolkit.decoding.greedy import Hypothesis, greedy_search

__all__ = [
    "Alignment",
    "Hypothesis",
    "align",
    "best_path",
    "greedy_search",
    "lattice_occupancy",
    "lattice_scores",
]
