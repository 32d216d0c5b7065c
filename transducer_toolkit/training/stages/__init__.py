# SPDX-License-Identifier: Apache-2.0
"""Loss stages: from encoder and predictor outputs to one loss an utterance.

A stage owns the way from the joiner to the loss, and nothing else: which layout the logits have,
which loss is used, with which options. ``conf/loss/*.yaml`` selects one. None needs Lightning.
"""

from transducer_toolkit.training.stages.additive import SimpleLoss, SmoothedLoss
from transducer_toolkit.training.stages.base import LossInput, LossStage, StageOutput
from transducer_toolkit.training.stages.fused import FusedLoss
from transducer_toolkit.training.stages.logits import FullLoss, PackedLoss, TorchaudioLoss
from transducer_toolkit.training.stages.pruned import FusedPrunedLoss, PrunedLoss

__all__ = [
    "FullLoss",
    "FusedLoss",
    "FusedPrunedLoss",
    "LossInput",
    "LossStage",
    "PackedLoss",
    "PrunedLoss",
    "SimpleLoss",
    "SmoothedLoss",
    "StageOutput",
    "TorchaudioLoss",
]
