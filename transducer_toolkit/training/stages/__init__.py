# SPDX-License-Identifier: Apache-2.0
"""Loss stages, which compute the loss of each utterance from encoder and predictor outputs.

A loss stage decides which layout the logits have, which loss is computed, and with which options.
``conf/loss/*.yaml`` selects a stage. Loss stages do not need Lightning.
"""

from transducer_toolkit.training.stages.additive import SimpleLoss, SmoothedLoss
from transducer_toolkit.training.stages.base import LossInput, LossStage, StageOutput
from transducer_toolkit.training.stages.fused import FusedLoss
from transducer_toolkit.training.stages.logits import FullLoss, PackedLoss, TorchaudioLoss
from transducer_toolkit.training.stages.pruned import FusedPrunedLoss, PrunedLoss
from transducer_toolkit.training.stages.restricted import RestrictedLoss

__all__ = [
    "FullLoss",
    "FusedLoss",
    "FusedPrunedLoss",
    "LossInput",
    "LossStage",
    "PackedLoss",
    "PrunedLoss",
    "RestrictedLoss",
    "SimpleLoss",
    "SmoothedLoss",
    "StageOutput",
    "TorchaudioLoss",
]
