# SPDX-License-Identifier: Apache-2.0
"""RNN-Transducer losses and the joiners, models and training around them.

Importing this package needs torch only; ``transducer_toolkit.data``, ``.training`` and ``.cli``
need the extra ``transducer_toolkit[train]``.
"""

from transducer_toolkit._version import __version__
from transducer_toolkit.losses import (
    FusedJoinerLoss,
    TransducerLoss,
    do_rnnt_pruning,
    fused_joiner_loss,
    get_rnnt_logprobs,
    get_rnnt_logprobs_joint,
    get_rnnt_logprobs_pruned,
    get_rnnt_logprobs_smoothed,
    get_rnnt_prune_ranges,
    joint_mutual_information_recursion,
    mutual_information_recursion,
    rnnt_loss,
    rnnt_loss_pruned,
    rnnt_loss_simple,
    rnnt_loss_smoothed,
    transducer_loss,
)
from transducer_toolkit.modules.joiner import Joiner
from transducer_toolkit.ops.join import join, joiner_logits
from transducer_toolkit.ops.lattice import LatticeShape
from transducer_toolkit.ops.native import build_info

__all__ = [
    "FusedJoinerLoss",
    "Joiner",
    "LatticeShape",
    "TransducerLoss",
    "__version__",
    "build_info",
    "do_rnnt_pruning",
    "fused_joiner_loss",
    "get_rnnt_logprobs",
    "get_rnnt_logprobs_joint",
    "get_rnnt_logprobs_pruned",
    "get_rnnt_logprobs_smoothed",
    "get_rnnt_prune_ranges",
    "join",
    "joiner_logits",
    "joint_mutual_information_recursion",
    "mutual_information_recursion",
    "rnnt_loss",
    "rnnt_loss_pruned",
    "rnnt_loss_simple",
    "rnnt_loss_smoothed",
    "transducer_loss",
]
