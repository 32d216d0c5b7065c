# SPDX-License-Identifier: Apache-2.0
"""Encoder, predictor, joiner, and the transducer made of them."""

from transducer_toolkit.modules.conformer import ConformerEncoder
from transducer_toolkit.modules.encoder import ConvLstmEncoder, Encoder
from transducer_toolkit.modules.joiner import AdditiveJoiner, Joiner
from transducer_toolkit.modules.predictor import LstmPredictor, Predictor, StatelessPredictor
from transducer_toolkit.modules.transducer import Transducer

__all__ = [
    "AdditiveJoiner",
    "ConformerEncoder",
    "ConvLstmEncoder",
    "Encoder",
    "Joiner",
    "LstmPredictor",
    "Predictor",
    "StatelessPredictor",
    "Transducer",
]
