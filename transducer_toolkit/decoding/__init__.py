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
from transducer_toolkit.decoding.beam_search import (
    BeamHypothesis,
    LanguageModel,
    ModifiedBeamSearch,
)
from transducer_toolkit.decoding.greedy import GreedySearch, GreedyState, greedy_search
from transducer_toolkit.decoding.posteriors import (
    LatticePosteriors,
    lattice_occupancy,
    lattice_posteriors,
)
from transducer_toolkit.decoding.search import Hypothesis, NonFiniteScoresError, Search

__all__ = [
    "TOPOLOGIES",
    "Alignment",
    "BeamHypothesis",
    "GreedySearch",
    "GreedyState",
    "Hypothesis",
    "LanguageModel",
    "LatticePosteriors",
    "ModifiedBeamSearch",
    "NonFiniteScoresError",
    "Search",
    "align",
    "best_path",
    "check_topology",
    "greedy_search",
    "lattice_occupancy",
    "lattice_posteriors",
    "lattice_scores",
]
