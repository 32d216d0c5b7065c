# SPDX-License-Identifier: Apache-2.0
"""Normalization of texts, for training and for scoring."""

from __future__ import annotations

import dataclasses
import importlib
import logging
import unicodedata
from collections.abc import Callable, Iterable
from typing import Literal

from transducer_toolkit.data.manifest import Utterance

__all__ = ["TextNormalizer", "normalize_utterances"]

CASES: dict[str | None, Callable[[str], str]] = {
    None: str,
    "lower": str.lower,
    "upper": str.upper,
    "fold": str.casefold,
}
Form = Literal["NFC", "NFD", "NFKC", "NFKD"]
FORMS: tuple[Form, ...] = ("NFC", "NFD", "NFKC", "NFKD")
WITHIN_WORDS = "'\u2019-\u2010\u2011"  # apostrophes and hyphens

logger = logging.getLogger(__name__)


class TextNormalizer:
    """Brings texts to one form, with single spaces. Without options, it returns them as they are.

    Args:
        case: "lower", "upper" or "fold" (lower case for comparisons, such as "ss" for "ß"); None
            keeps the case.
        punctuation: "keep" or "remove". Apostrophes and hyphens between letters always stay.
        unicode: Unicode normal form, "NFC", "NFD", "NFKC" or "NFKD"; None keeps the code points.
        function: applied last, text to text; a callable, or its name as
            ``package.module.function``.

    Raises:
        ValueError: an option is unknown, or ``function`` cannot be imported.
        TypeError: ``function`` is not callable, or (on a call) returns no str.

    Example:
        >>> normalize = TextNormalizer(case="lower", punctuation="remove", unicode="NFC")
        >>> normalize('"Well-known"  - isn\\'t it?')
        "well-known isn't it"
    """

    def __init__(
        self,
        *,
        case: str | None = None,
        punctuation: str = "keep",
        unicode: str | None = None,
        function: str | Callable[[str], str] | None = None,
    ) -> None:
        if case not in CASES:
            raise ValueError(f"case: expected 'lower', 'upper', 'fold' or None, got {case!r}")
        if punctuation not in ("keep", "remove"):
            raise ValueError(f"punctuation: expected 'keep' or 'remove', got {punctuation!r}")
        if unicode is not None and unicode not in FORMS:
            raise ValueError(
                f"unicode: expected one of {', '.join(FORMS)} or None, got {unicode!r}"
            )
        self.case = case
        self.punctuation = punctuation
        self.unicode = next((form for form in FORMS if form == unicode), None)
        self.function = _imported(function) if isinstance(function, str) else function
        if self.function is not None and not callable(self.function):
            raise TypeError(f"function: expected a function of a text, got {function!r}")
        self._keeps = (case, punctuation, unicode, function) == (None, "keep", None, None)

    def __call__(self, text: str) -> str:
        """Return the normalized text."""
        if self._keeps:
            return text
        text = self._composed(CASES[self.case](self._composed(text)))
        if self.punctuation == "remove":
            text = _without_punctuation(text)
        if self.function is not None:
            text = self.function(text)
            if not isinstance(text, str):
                raise TypeError(f"function: expected it to return str, got {text!r}")
        return " ".join(text.split())

    def _composed(self, text: str) -> str:
        return text if self.unicode is None else unicodedata.normalize(self.unicode, text)


def _imported(name: str) -> Callable[[str], str]:
    module, _, attribute = name.rpartition(".")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"function: cannot import {name!r} ({error}); give package.module.function of an "
            "installed package, or put its folder on PYTHONPATH"
        ) from error


def _without_punctuation(text: str) -> str:
    kept = []
    for position, character in enumerate(text):
        if unicodedata.category(character)[0] != "P" or (
            character in WITHIN_WORDS
            and text[position - 1 : position].isalnum()
            and text[position + 1 : position + 2].isalnum()
        ):
            kept.append(character)
        elif unicodedata.east_asian_width(character) not in "WF":
            kept.append(" ")  # Chinese and Japanese put no spaces there
    return "".join(kept)


def normalize_utterances(
    utterances: Iterable[Utterance], normalize: Callable[[str], str]
) -> list[Utterance]:
    """Return utterances with normalized texts.

    An utterance whose number of words changes loses its word times; the log says how many do.

    Args:
        utterances: utterances of a manifest.
        normalize: text to text.
    """
    found, num_without_times = [], 0
    for utterance in utterances:
        text, starts_s = normalize(utterance.text), utterance.word_starts_s
        if text == utterance.text:
            found.append(utterance)
            continue
        if starts_s is not None and len(starts_s) != len(text.split()):
            starts_s = None
            num_without_times += 1
        found.append(dataclasses.replace(utterance, text=text, word_starts_s=starts_s))
    if num_without_times:
        logger.warning(
            "%d utterances lose their word times, because the normalization changes their number "
            "of words",
            num_without_times,
        )
    return found
