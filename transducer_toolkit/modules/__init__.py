# SPDX-License-Identifier: Apache-2.0
"""Encoder, predictor, joiner, and the transducer made of them."""

from transducer_toolkit.modules.conformer import ConformerEncoder
from transducer_toolkit.modules.emformer import EmformerEncoder
from transducer_toolkit.modules.encoder import (
    ConvLstmEncoder,
    Encoder,
    FrontEndEncoder,
    StreamingEncoder,
)
from transducer_toolkit.modules.joiner import AdditiveJoiner, Joiner
from transducer_toolkit.modules.predictor import LstmPredictor, Predictor, StatelessPredictor
from transducer_toolkit.modules.transducer import Transducer

__all__ = [
    "AdditiveJoiner",
    "ConformerEncoder",
    "ConvLstmEncoder",
    "EmformerEncoder",
    "Encoder",
    "FrontEndEncoder",
    "Joiner",
    "LstmPredictor",
    "Predictor",
    "StatelessPredictor",
    "StreamingEncoder",
    "Transducer",
]
