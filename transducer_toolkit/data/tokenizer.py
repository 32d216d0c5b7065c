# SPDX-License-Identifier: Apache-2.0
"""Text to target symbols and back; the tokenizer owns the blank."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeAlias

from transducer_toolkit.ops.checks import check_flag, shortened

__all__ = ["CharTokenizer", "Tokenizer", "TokenizerFactory"]

BLANK_SYMBOL = "<blk>"
UNKNOWN_SYMBOL = "<unk>"
UNKNOWN_TEXT = "\u2047"  # "double question mark": what an unknown symbol reads as
SPACE_SYMBOL = "\u2581"  # "lower one eighth block", the field's printable space


class Tokenizer(Protocol):
    """The interface of a tokenizer.

    A word begins after a U+2581, which is a symbol by itself or the first character of a symbol.
    """

    @property
    def symbols(self) -> tuple[str, ...]:
        """Symbol of each id, the blank at 0."""

    @property
    def vocab_size(self) -> int:
        """Number of symbols, blank included (V)."""

    @property
    def blank(self) -> int:
        """Id of the blank, 0."""

    def encode(self, text: str) -> list[int]:
        """Return the ids of ``text``, none of them blank; ValueError if it has none."""

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ``ids``, skipping blanks; words have one space between them."""

    def state(self) -> dict[str, Any]:
        """Return the state that ``tokenizer_from_state`` takes, in plain values."""

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write ``tokens.txt``, lines ``symbol id``, as sherpa-onnx and icefall read it."""


TokenizerFactory: TypeAlias = Callable[[Iterable[str]], Tokenizer]


def check_tokenizer(tokenizer: object) -> None:
    """Raise a TypeError unless it is a :class:`Tokenizer` or a function that makes one."""
    needed = ("symbols", "vocab_size", "blank", "encode", "decode", "state", "save")
    if not callable(tokenizer) and not all(hasattr(tokenizer, name) for name in needed):
        raise TypeError(
            "tokenizer: expected a Tokenizer, or a function that makes one of texts (the configs "
            "are data/tokenizer=characters, sentencepiece and sentencepiece_model), got "
            f"{type(tokenizer).__name__} {tokenizer!r}"
        )


def unknown_ids(tokenizer: Tokenizer) -> set[int]:
    """Return the id of ``<unk>``, or nothing if the tokenizer has none."""
    return {id_ for id_, symbol in enumerate(tokenizer.symbols) if symbol == UNKNOWN_SYMBOL}


def unknown_characters(tokenizer: Tokenizer, text: str) -> list[str]:
    """Return the characters of a text that are ``<unk>`` to a tokenizer, sorted.

    Example:
        >>> unknown_characters(CharTokenizer.from_texts(["one"], unknown=True), "on!")
        ['!']
    """
    characters = sorted({*"".join(text.split())})
    unknown = unknown_ids(tokenizer)
    return [character for character in characters if unknown & {*tokenizer.encode(character)}]


def check_known(tokenizer: Tokenizer, text: str, ids: Sequence[int]) -> None:
    """Raise a ValueError if a text has characters that are ``<unk>`` to a tokenizer.

    Args:
        tokenizer: a tokenizer.
        text: a text.
        ids: its encoded text.

    Example:
        >>> tokenizer = CharTokenizer.from_texts(["one"], unknown=True)
        >>> check_known(tokenizer, "on", tokenizer.encode("on"))
        >>> check_known(tokenizer, "on!", tokenizer.encode("on!"))
        Traceback (most recent call last):
        ValueError: the model has no symbol for '!' of 'on!': replace it, for example spell it out
    """
    if unknown_ids(tokenizer).isdisjoint(ids):
        return
    missing = unknown_characters(tokenizer, text)
    raise ValueError(
        f"the model has no symbol for {', '.join(map(repr, missing)) or 'a part'} of {text!r}: "
        "replace it, for example spell it out"
    )


def save_symbols(symbols: Sequence[str], path: str | os.PathLike[str]) -> None:
    """Write ``tokens.txt``, lines ``symbol id``, as sherpa-onnx and icefall read it."""
    lines = (f"{symbol} {id_}\n" for id_, symbol in enumerate(symbols))
    Path(path).write_text("".join(lines), encoding="utf-8")


def check_ids(ids: Iterable[int], vocab_size: int) -> list[int]:
    """Return ``ids`` as a list; ValueError for one outside ``[0, vocab_size)``."""
    ids = list(ids)
    for id_ in ids:
        if not 0 <= id_ < vocab_size:
            raise ValueError(f"ids must lie in [0, {vocab_size}), got {id_}")
    return ids


class CharTokenizer:
    """Converts between texts and target symbols, one symbol per character.

    Args:
        symbols: symbol of each id. ``symbols[0]`` is the blank ``<blk>``; all others are single
            characters, the space written as U+2581. One of them may be ``<unk>``, which stands for
            every other character and is decoded as U+2047; without it, other characters are errors.

    Raises:
        ValueError: no blank at 0, a symbol that is not one character, or one that repeats.

    Example:
        >>> tokenizer = CharTokenizer.from_texts(["one two"])
        >>> tokenizer.encode("two")
        [5, 6, 4]
        >>> tokenizer.decode([5, 6, 4]), tokenizer.vocab_size, tokenizer.blank
        ('two', 7, 0)
    """

    kind = "characters"
    blank = 0

    def __init__(self, symbols: Sequence[str]) -> None:
        self.symbols = tuple(symbols)
        if not self.symbols or self.symbols[0] != BLANK_SYMBOL:
            raise ValueError(f"symbols[0] must be {BLANK_SYMBOL!r}, got {list(self.symbols[:1])}")
        for id_, symbol in enumerate(self.symbols[1:], start=1):
            is_character = isinstance(symbol, str) and len(symbol) == 1 and not symbol.isspace()
            if symbol != UNKNOWN_SYMBOL and not is_character:
                raise ValueError(
                    f"symbols[{id_}] must be one character (space as {SPACE_SYMBOL!r}) or "
                    f"{UNKNOWN_SYMBOL!r}, got {shortened(repr(symbol))}"
                )
        self._id_of = {symbol: id_ for id_, symbol in enumerate(self.symbols)}
        if len(self._id_of) != len(self.symbols):
            repeated = sorted({s for s in self.symbols if self.symbols.count(s) > 1})
            raise ValueError(f"symbols must not repeat, got {repeated} more than once")

    @classmethod
    def from_texts(cls, texts: Iterable[str], *, unknown: bool = False) -> CharTokenizer:
        """Collect the characters of ``texts``; ids follow code-point order, the space first.

        Args:
            texts: texts of the training set.
            unknown: whether id 1 is ``<unk>``, for characters that the texts lack.
        """
        check_flag(unknown, "unknown")
        characters = {character for text in texts for character in _normalize(text)}
        ordered = sorted(characters, key=lambda c: (c != SPACE_SYMBOL, c))
        return cls([BLANK_SYMBOL, *([UNKNOWN_SYMBOL] if unknown else []), *ordered])

    @property
    def vocab_size(self) -> int:
        """Number of symbols, blank included (V)."""
        return len(self.symbols)

    def encode(self, text: str) -> list[int]:
        """Return the ids of ``text``; runs of white space count as one space.

        Raises:
            ValueError: a character is not in the vocabulary, and neither is ``<unk>``.
        """
        unknown = self._id_of.get(UNKNOWN_SYMBOL)
        ids = []
        for character in _normalize(text):
            id_ = self._id_of.get(character, unknown)
            if id_ is None:
                raise ValueError(
                    f"character {character!r} of {text!r} is not among the "
                    f"{self.vocab_size - 1} characters of the tokenizer"
                )
            ids.append(id_)
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ``ids``, skipping blanks.

        Raises:
            ValueError: an id is outside ``[0, vocab_size)``.
        """
        symbols = [
            self.symbols[id_] for id_ in check_ids(ids, self.vocab_size) if id_ != self.blank
        ]
        text = "".join(UNKNOWN_TEXT if symbol == UNKNOWN_SYMBOL else symbol for symbol in symbols)
        return " ".join(text.replace(SPACE_SYMBOL, " ").split())

    def state(self) -> dict[str, Any]:
        """Return the state that ``tokenizer_from_state`` takes, in plain values."""
        return {"kind": self.kind, "symbols": list(self.symbols)}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write ``tokens.txt``, lines ``symbol id``, as sherpa-onnx and icefall read it."""
        save_symbols(self.symbols, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> CharTokenizer:
        """Read ``tokens.txt``.

        Raises:
            ValueError: a line is not ``symbol id``, or the ids are not 0, 1, 2, ...
        """
        symbols = []
        for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines()):
            symbol, _, id_ = line.rpartition(" ")
            if id_ != str(number):
                raise ValueError(
                    f"{os.fspath(path)}, line {number + 1}: expected 'symbol {number}', "
                    f"got {line!r}"
                )
            symbols.append(symbol)
        return cls(symbols)


def _normalize(text: str) -> str:
    return SPACE_SYMBOL.join(text.split())
