# SPDX-License-Identifier: Apache-2.0
"""Transducer losses as functions, some of them also as modules."""

from transducer_toolkit.losses.durations import (
    MultiBlankLoss,
    TDTLoss,
    multi_blank_loss,
    tdt_loss,
)
from transducer_toolkit.losses.full import get_rnnt_logprobs_joint, rnnt_loss
from transducer_toolkit.losses.fused_joiner import CellParts, FusedJoinerLoss, fused_joiner_loss
from transducer_toolkit.losses.mutual_information import (
    joint_mutual_information_recursion,
    mutual_information_recursion,
)
from transducer_toolkit.losses.packed import TransducerLoss, transducer_loss
from transducer_toolkit.losses.pruned import get_rnnt_logprobs_pruned, rnnt_loss_pruned
from transducer_toolkit.losses.pruning import do_rnnt_pruning, get_rnnt_prune_ranges
from transducer_toolkit.losses.simple import (
    get_rnnt_logprobs,
    get_rnnt_logprobs_smoothed,
    rnnt_loss_simple,
    rnnt_loss_smoothed,
)

__all__ = [
    "CellParts",
    "FusedJoinerLoss",
    "MultiBlankLoss",
    "TDTLoss",
    "TransducerLoss",
    "do_rnnt_pruning",
    "fused_joiner_loss",
    "get_rnnt_logprobs",
    "get_rnnt_logprobs_joint",
    "get_rnnt_logprobs_pruned",
    "get_rnnt_logprobs_smoothed",
    "get_rnnt_prune_ranges",
    "joint_mutual_information_recursion",
    "multi_blank_loss",
    "mutual_information_recursion",
    "rnnt_loss",
    "rnnt_loss_pruned",
    "rnnt_loss_simple",
    "rnnt_loss_smoothed",
    "tdt_loss",
    "transducer_loss",
]
