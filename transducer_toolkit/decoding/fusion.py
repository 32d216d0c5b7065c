# SPDX-License-Identifier: Apache-2.0
"""Hotwords and language models, whose scores a search adds to those of the model."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from transducer_toolkit.data.tokenizer import Tokenizer
from transducer_toolkit.decoding.hotwords import CASES, Hotword, HotwordModel, read_hotwords
from transducer_toolkit.decoding.internal_lm import InternalLanguageModel
from transducer_toolkit.decoding.language_model import LanguageModel, WeightedSum, check_lm
from transducer_toolkit.decoding.ngrams import NgramModel
from transducer_toolkit.modules.joiner import Joiner
from transducer_toolkit.modules.predictor import Predictor
from transducer_toolkit.ops.checks import check_choice, check_number

__all__ = ["Fusion", "fused", "lm_options"]

INTERNAL = "model"
DEFAULT_WEIGHTS = {"lm": 0.3, "internal_lm": 0.2}
# Options that need another one.
_BELONGS_TO = {
    "lm_weight": "lm",
    "internal_lm_weight": "internal_lm",
    "hotwords_score": "hotwords",
    "hotwords_depth_score": "hotwords",
    "hotwords_case": "hotwords",
}


@dataclass(frozen=True)
class Fusion:
    """Hotwords and language models for a search.

    The score of a label k after the labels y becomes::

        label(t, y, k) + lm_weight * lm(k | y) - internal_lm_weight * internal(k | y)
            + bonus(k | y)

    Args:
        lm: ARPA file of the model's symbols or of words, or a :class:`LanguageModel`.
        lm_weight: weight of its log-probabilities (default: 0.3).
        internal_lm: language model that is subtracted: "model", that of the transducer itself, or
            an ARPA file of its training texts, usually of bigrams of symbols (LODR).
        internal_lm_weight: weight of its log-probabilities (default: 0.2).
        hotwords: file with a phrase a line, or the phrases; see :func:`read_hotwords`.
        hotwords_score: bonus of each symbol of a phrase (default: 0.2 for each letter).
        hotwords_depth_score: bonus that grows along a phrase (default: 0).
        hotwords_case: "as_is" (the default) or "variants"; see :class:`HotwordModel`.

    Raises:
        ValueError: if an option is given without the one that it belongs to.

    Example:
        >>> fusion = Fusion(hotwords=["Ada Lovelace"], hotwords_score=1.5)
        >>> Recognizer.from_checkpoint("best.ckpt", fusion=fusion)  # doctest: +SKIP
    """

    lm: str | os.PathLike[str] | LanguageModel | None = None
    lm_weight: float | None = None
    internal_lm: str | os.PathLike[str] | LanguageModel | None = None
    internal_lm_weight: float | None = None
    hotwords: str | os.PathLike[str] | Iterable[Hotword | str | tuple[str, float]] | None = None
    hotwords_score: float | None = None
    hotwords_depth_score: float | None = None
    hotwords_case: str | None = None

    def __post_init__(self) -> None:
        for option, owner in _BELONGS_TO.items():
            value = getattr(self, option)
            if value is None:
                continue
            if getattr(self, owner) is None:
                raise ValueError(f"{option}: expected {owner}, too, to which it belongs; got none")
            if option == "hotwords_case":
                check_choice(value, option, CASES)
                continue
            check_number(value, option)
            if not math.isfinite(value) or (owner == "hotwords" and value < 0):
                at_least = " of at least 0" if owner == "hotwords" else ""
                raise ValueError(f"{option}: expected a finite number{at_least}, got {value}")

    def load(self, tokenizer: Tokenizer) -> Callable[[Predictor, Joiner], LanguageModel | None]:
        """Reads the files; returns a function that makes the language model of a search.

        Args:
            tokenizer: tokenizer of the model.

        Returns:
            A function of the model's predictor and joiner. It returns the weighted sum of hotwords
            and language models, which a search takes with ``lm_weight=1``, or None without any.

        Raises:
            FileNotFoundError: if a file is missing.
            ValueError: if a file is damaged or does not suit the tokenizer; names it.
            TypeError: if a part has the wrong type.
        """
        parts: list[tuple[LanguageModel, float]] = []
        for name in ("lm", "internal_lm"):
            part, weight = getattr(self, name), self._weight(name)
            if part is None or (name, part) == ("internal_lm", INTERNAL):
                continue
            if isinstance(part, str | os.PathLike):
                part = NgramModel(part)
            if isinstance(part, NgramModel):
                part = part.bind(tokenizer)
            check_lm(part, weight, name)
            parts.append((part, weight if name == "lm" else -weight))
        if self.hotwords is not None:
            given = self.hotwords
            entries = read_hotwords(given) if isinstance(given, str | os.PathLike) else given
            options = {
                name: value
                for name in ("score", "depth_score", "case")
                if (value := getattr(self, f"hotwords_{name}")) is not None
            }
            parts.append((HotwordModel(entries, tokenizer, **options), 1.0))
        own_weight = 0.0
        if self.internal_lm == INTERNAL:
            own_weight = self._weight("internal_lm")
        return _Maker(tuple((lm, weight) for lm, weight in parts if weight != 0), own_weight)

    def _weight(self, name: str) -> float:
        weight = getattr(self, f"{name}_weight")
        return float(DEFAULT_WEIGHTS[name] if weight is None else weight)


@dataclass(frozen=True)
class _Maker:
    """Makes the language model of a search; can be pickled."""

    parts: Sequence[tuple[LanguageModel, float]]
    own_weight: float

    def __call__(self, predictor: Predictor, joiner: Joiner) -> LanguageModel | None:
        parts = list(self.parts)
        if self.own_weight:
            parts.append((InternalLanguageModel(predictor, joiner), -self.own_weight))
        return WeightedSum(parts) if parts else None


def lm_options(search: Callable[..., Any], lm: LanguageModel | None) -> dict[str, Any]:
    """Returns the options that give a language model of :meth:`Fusion.load` to a search.

    Args:
        search: the function that makes the search.
        lm: the language model, or None.

    Returns:
        The options, none if the language model is None.

    Raises:
        ValueError: if the search has another language model already.
    """
    if lm is None:
        return {}
    if getattr(search, "keywords", {}).get("lm") is not None:
        raise ValueError("search: it has an lm already; give that as Fusion(lm=...)")
    return {"lm": lm, "lm_weight": 1.0}


def fused(
    search: Callable[..., Any], lm_of: Callable[[Predictor, Joiner], LanguageModel | None]
) -> Callable[..., Any]:
    """Returns a function that makes a search with a language model.

    Args:
        search: a function of a predictor, a joiner and options that makes a search.
        lm_of: the result of :meth:`Fusion.load`, which makes the language model.

    Returns:
        A function with the arguments of `search`.
    """
    return partial(_make_search, search, lm_of)


def _make_search(
    search: Callable[..., Any],
    lm_of: Callable[[Predictor, Joiner], LanguageModel | None],
    predictor: Predictor,
    joiner: Joiner,
    **options: Any,
) -> Any:
    return search(predictor, joiner, **options, **lm_options(search, lm_of(predictor, joiner)))
