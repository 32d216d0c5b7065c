# SPDX-License-Identifier: Apache-2.0
"""RNN-Transducer losses and the joiners, models and training around them.

Importing this package needs torch only; ``transducer_toolkit.data``, ``.training`` and ``.cli``
need the extra ``transducer_toolkit[train]``.
"""

from transducer_toolkit._version import __version__
from transducer_toolkit.lattice import LatticeShape
from transducer_toolkit.losses import (
    TransducerLoss,
    do_rnnt_pruning,
    get_rnnt_logprobs,
    get_rnnt_logprobs_smoothed,
    get_rnnt_prune_ranges,
    joint_mutual_information_recursion,
    mutual_information_recursion,
    rnnt_loss_simple,
    rnnt_loss_smoothed,
    transducer_loss,
)
from transducer_toolkit.modules.joiner import Joiner, join
from transducer_toolkit.native import build_info

__all__ = [
    "Joiner",
    "LatticeShape",
    "TransducerLoss",
    "__version__",
    "build_info",
    "do_rnnt_pruning",
    "get_rnnt_logprobs",
    "get_rnnt_logprobs_smoothed",
    "get_rnnt_prune_ranges",
    "join",
    "joint_mutual_information_recursion",
    "mutual_information_recursion",
    "rnnt_loss_simple",
    "rnnt_loss_smoothed",
    "transducer_loss",
]
