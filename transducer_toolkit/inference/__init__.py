# SPDX-License-Identifier: Apache-2.0
"""Trained models at work: recognizers for files and streams, and alignment."""

from transducer_toolkit.inference.aligner import AlignedUtterance, align_text
from transducer_toolkit.inference.endpoints import EndpointRules
from transducer_toolkit.inference.long_audio import AudioSource, Transcription, transcribe_files
from transducer_toolkit.inference.recognizer import Recognizer, load_checkpoint
from transducer_toolkit.inference.streaming import StreamingRecognizer
from transducer_toolkit.inference.words import RecognizedWord

__all__ = [
    "AlignedUtterance",
    "AudioSource",
    "EndpointRules",
    "RecognizedWord",
    "Recognizer",
    "StreamingRecognizer",
    "Transcription",
    "align_text",
    "load_checkpoint",
    "transcribe_files",
]
