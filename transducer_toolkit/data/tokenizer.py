# SPDX-License-Identifier: Apache-2.0
"""Characters as target symbols; the tokenizer owns the blank."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

__all__ = ["CharTokenizer"]

BLANK_SYMBOL = "<blk>"
SPACE_SYMBOL = "\u2581"  # "lower one eighth block", the field's printable space


class CharTokenizer:
    """Text <-> target symbols, one symbol per character.

    Args:
        symbols: symbol of each id; ``symbols[0]`` is the blank ``<blk>``, all others are single
            characters, the space written as U+2581.

    Raises:
        ValueError: no blank at 0, a symbol that is not one character, or one that repeats.

    Example:
        >>> tokenizer = CharTokenizer.from_texts(["one two"])
        >>> tokenizer.encode("two")
        [5, 6, 4]
        >>> tokenizer.decode([5, 6, 4]), tokenizer.vocab_size, tokenizer.blank
        ('two', 7, 0)
    """

    blank = 0

    def __init__(self, symbols: Sequence[str]) -> None:
        self.symbols = tuple(symbols)
        if not self.symbols or self.symbols[0] != BLANK_SYMBOL:
            raise ValueError(f"symbols[0] must be {BLANK_SYMBOL!r}, got {list(self.symbols[:1])}")
        for id_, symbol in enumerate(self.symbols[1:], start=1):
            if len(symbol) != 1 or symbol.isspace():
                raise ValueError(
                    f"symbols[{id_}] must be one character (space as {SPACE_SYMBOL!r}), "
                    f"got {symbol!r}"
                )
        self._id_of = {symbol: id_ for id_, symbol in enumerate(self.symbols)}
        if len(self._id_of) != len(self.symbols):
            repeated = sorted({s for s in self.symbols if self.symbols.count(s) > 1})
            raise ValueError(f"symbols must not repeat, got {repeated} more than once")

    @classmethod
    def from_texts(cls, texts: Iterable[str]) -> CharTokenizer:
        """Collect the characters of ``texts``; ids follow code-point order, the space first."""
        characters = {character for text in texts for character in _normalise(text)}
        ordered = sorted(characters, key=lambda c: (c != SPACE_SYMBOL, c))
        return cls([BLANK_SYMBOL, *ordered])

    @property
    def vocab_size(self) -> int:
        """Number of symbols, blank included (V)."""
        return len(self.symbols)

    def encode(self, text: str) -> list[int]:
        """Return the ids of ``text``; runs of white space count as one space.

        Raises:
            ValueError: a character is not in the vocabulary.
        """
        try:
            return [self._id_of[character] for character in _normalise(text)]
        except KeyError as error:
            raise ValueError(
                f"character {error.args[0]!r} of {text!r} is not among the "
                f"{self.vocab_size - 1} characters of the tokenizer"
            ) from None

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ``ids``, skipping blanks.

        Raises:
            ValueError: an id is outside ``[0, vocab_size)``.
        """
        characters = []
        for id_ in ids:
            if not 0 <= id_ < self.vocab_size:
                raise ValueError(f"ids must lie in [0, {self.vocab_size}), got {id_}")
            if id_ != self.blank:
                characters.append(self.symbols[id_])
        return " ".join("".join(characters).replace(SPACE_SYMBOL, " ").split())

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write ``tokens.txt``, lines ``symbol id``, as sherpa-onnx and icefall read it."""
        lines = (f"{symbol} {id_}\n" for id_, symbol in enumerate(self.symbols))
        Path(path).write_text("".join(lines), encoding="utf-8")

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


def _normalise(text: str) -> str:
    return SPACE_SYMBOL.join(text.split())
