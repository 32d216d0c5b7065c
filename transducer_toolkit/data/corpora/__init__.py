# SPDX-License-Identifier: Apache-2.0
"""Existing corpora, converted to manifests."""

from transducer_toolkit.data.corpora.asterisk import AsteriskCorpus
from transducer_toolkit.data.corpora.librispeech import LibriSpeechCorpus
from transducer_toolkit.data.corpora.tuxpaint import TuxPaintCorpus

__all__ = ["AsteriskCorpus", "LibriSpeechCorpus", "TuxPaintCorpus"]
