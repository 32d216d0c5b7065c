# SPDX-License-Identifier: Apache-2.0
"""Lightning callbacks for training."""

from transducer_toolkit.training.callbacks.averaging import AverageWeights
from transducer_toolkit.training.callbacks.clock import StepClock
from transducer_toolkit.training.callbacks.feature_statistics import EstimateFeatureStatistics
from transducer_toolkit.training.callbacks.lora import LoraAdapters
from transducer_toolkit.training.callbacks.lost_process import NameLostProcess
from transducer_toolkit.training.callbacks.non_finite import SkipNonFiniteSteps
from transducer_toolkit.training.callbacks.pictures import LearningCurves, UtterancePicture
from transducer_toolkit.training.callbacks.prescan import PreScan
from transducer_toolkit.training.callbacks.progress_bar import ProgressBar
from transducer_toolkit.training.callbacks.seeds import SeedEachBatch
from transducer_toolkit.training.callbacks.unreadable import CountUnreadable

__all__ = [
    "AverageWeights",
    "CountUnreadable",
    "EstimateFeatureStatistics",
    "LearningCurves",
    "LoraAdapters",
    "NameLostProcess",
    "PreScan",
    "ProgressBar",
    "SeedEachBatch",
    "SkipNonFiniteSteps",
    "StepClock",
    "UtterancePicture",
]
