# SPDX-License-Identifier: Apache-2.0
"""Searches, which find the symbols in encoder frames, and alignments, which find their times."""

from transducer_toolkit.decoding.alignment import (
    Alignment,
    align,
    best_path,
    lattice_scores,
)
from transducer_toolkit.decoding.beam_search import (
    BeamHypothesis,
    BeamSearch,
    BeamState,
    ModifiedBeamSearch,
)
from transducer_toolkit.decoding.fusion import Fusion
from transducer_toolkit.decoding.greedy import GreedySearch, GreedyState, greedy_search
from transducer_toolkit.decoding.hotwords import Hotword, HotwordModel, read_hotwords
from transducer_toolkit.decoding.internal_lm import InternalLanguageModel
from transducer_toolkit.decoding.language_model import LanguageModel, WeightedSum
from transducer_toolkit.decoding.narrow import NarrowLattice, narrow_lattice
from transducer_toolkit.decoding.ngrams import NgramModel
from transducer_toolkit.decoding.posteriors import (
    LatticePosteriors,
    lattice_occupancy,
    lattice_posteriors,
)
from transducer_toolkit.decoding.search import (
    Hypothesis,
    NonFiniteScoresError,
    Search,
    StreamingSearch,
)
from transducer_toolkit.ops.topology import TOPOLOGIES

__all__ = [
    "TOPOLOGIES",
    "Alignment",
    "BeamHypothesis",
    "BeamSearch",
    "BeamState",
    "Fusion",
    "GreedySearch",
    "GreedyState",
    "Hotword",
    "HotwordModel",
    "Hypothesis",
    "InternalLanguageModel",
    "LanguageModel",
    "LatticePosteriors",
    "ModifiedBeamSearch",
    "NarrowLattice",
    "NgramModel",
    "NonFiniteScoresError",
    "Search",
    "StreamingSearch",
    "WeightedSum",
    "align",
    "best_path",
    "greedy_search",
    "lattice_occupancy",
    "lattice_posteriors",
    "lattice_scores",
    "narrow_lattice",
    "read_hotwords",
]
