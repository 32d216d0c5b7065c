# SPDX-License-Identifier: Apache-2.0
"""Scripts that put no spaces between words."""

from __future__ import annotations

import re

__all__ = ["has_no_spaces"]

# Scripts that put no spaces between words: Thai, Lao, Tibetan, Burmese, Khmer, Tai, Chinese,
# Japanese.
_UNSPACED = re.compile(
    "[\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u1950-\u19df\u1a20-\u1aaf\u2e80-\u2fdf\u3005-\u3007"
    "\u3021-\u3029\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\ua9e0-\ua9ff\uaa60-\uaadf"
    "\uf900-\ufaff\uff66-\uff9f\U0001b000-\U0001b16f\U00020000-\U0003ffff]"
)


def has_no_spaces(character: str) -> bool:
    """Return whether the script of a character puts no spaces between words.

    Example:
        >>> has_no_spaces("今"), has_no_spaces("a")
        (True, False)
    """
    return _UNSPACED.match(character) is not None
