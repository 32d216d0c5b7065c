# SPDX-License-Identifier: Apache-2.0
"""Connected digits in many synthetic voices: a corpus that needs no download."""

from transducer_toolkit.data.digits.corpus import DigitsCorpus

__all__ = ["DigitsCorpus"]
