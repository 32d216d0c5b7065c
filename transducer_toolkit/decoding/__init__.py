# SPDX-License-Identifier: Apache-2.0
"""From encoder frames to symbols and their times."""

from transducer_toolkit.decoding.alignment import (
    TOPOLOGIES,
    Alignment,
    align,
    best_path,
    check_topology,
    lattice_scores,
)
from transducer_toolkit.decoding.greedy import GreedySearch, GreedyState, greedy_search
from transducer_toolkit.decoding.hypothesis import Hypothesis, Search
from transducer_toolkit.decoding.posteriors import (
    LatticePosteriors,
    lattice_occupancy,
    lattice_posteriors,
)

__all__ = [
    "TOPOLOGIES",
    "Alignment",
    "GreedySearch",
    "GreedyState",
    "Hypothesis",
    "LatticePosteriors",
    "Search",
    "align",
    "best_path",
    "check_topology",
    "greedy_search",
    "lattice_occupancy",
    "lattice_posteriors",
    "lattice_scores",
]
