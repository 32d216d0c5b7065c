# SPDX-License-Identifier: Apache-2.0
"""N-gram language models of ARPA files for the searches."""

from __future__ import annotations

import os
from typing import NamedTuple

import torch
from torch import Tensor

from transducer_toolkit.data.byte_pieces import byte_of
from transducer_toolkit.data.tokenizer import SPACE_SYMBOL, Tokenizer
from transducer_toolkit.decoding.arpa import END, START, UNKNOWN, Ngrams, read_arpa
from transducer_toolkit.decoding.device_copies import DeviceCopies
from transducer_toolkit.ops.checks import check_choice

__all__ = ["NgramModel"]

UNITS = ("auto", "symbols", "words")


class NgramModel:
    """An n-gram language model from an ARPA file, of the model's symbols or of words.

    A model of symbols scores every symbol. A model of words scores a word when the next one begins
    or the utterance ends; the beam search uses both kinds, the greedy search only the first. A word
    is looked up by its letters, so it does not matter how the tokenizer divides it. At the end of
    the utterance, ``</s>`` is scored.

    Args:
        path: the ARPA file, which may be compressed (``.gz``).
        tokenizer: tokenizer of the model. None leaves the model unbound until :meth:`bind`; the
            commands and :class:`~transducer_toolkit.inference.Recognizer` bind it.
        units: "symbols", "words", or "auto": symbols if all entries of the file are symbols of the
            tokenizer.

    Attributes:
        ngrams: the n-grams, whose ``log_prob`` scores sentences.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not an ARPA file, or has no entry that the model can write; names the
            file.

    Example:
        >>> lm = NgramModel("words.arpa", tokenizer)  # doctest: +SKIP
        >>> search = BeamSearch(predictor, joiner, lm=lm)  # doctest: +SKIP
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        tokenizer: Tokenizer | None = None,
        *,
        units: str = "auto",
    ) -> None:
        check_choice(units, "units", UNITS)
        self.path, self.units = os.fspath(path), units
        self.ngrams = read_arpa(path)
        self._bound: _Symbols | _Words | None = None
        if tokenizer is not None:
            self.bind(tokenizer)

    def bind(self, tokenizer: Tokenizer) -> NgramModel:
        """Connects the model with the symbols of a tokenizer; returns itself."""
        entries = [word for word in self.ngrams.words if word not in (START, END, UNKNOWN)]
        units = self.units
        if units == "auto":
            known = set(tokenizer.symbols)
            units = "symbols" if all(entry in known for entry in entries) else "words"
        if units == "symbols":
            known = set(tokenizer.symbols)
            can_write = any(entry in known for entry in entries)
        else:
            letters = {letter for symbol in tokenizer.symbols for letter in symbol}
            has_bytes = any(byte_of(symbol) is not None for symbol in tokenizer.symbols)
            can_write = has_bytes or any(letters.issuperset(entry) for entry in entries)
        if not can_write:
            first = f", such as {entries[0][:50]!r}" if entries else ""
            raise ValueError(
                f"{self.path}: the model can write none of its {units}{first}; give an ARPA file "
                "of texts that are spelled as those of the training"
            )
        try:
            make = _Symbols if units == "symbols" else _Words
            self._bound = make(self.ngrams, tokenizer)
        except ValueError as error:
            raise ValueError(f"{self.path}: {error}") from error
        return self

    @property
    def scores_words(self) -> bool:
        """Whether it is a model of words, which the greedy search does not accept."""
        return isinstance(self._bound, _Words)

    def initial_state(self, batch_size: int, device: torch.device | str = "cpu") -> Tensor:
        """Returns the state (N, ...) after ``<s>``."""
        return self._scorer().initial_state(batch_size, device)

    def step(self, tokens: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the scores (N, V) of the next symbols in nats, and the next state."""
        return self._scorer().step(tokens, state)

    def final(self, state: Tensor) -> Tensor:
        """Returns the scores (N,) of the last word, in a model of words, and of ``</s>``."""
        return self._scorer().final(state)

    def _scorer(self) -> _Symbols | _Words:
        if self._bound is None:
            raise ValueError(
                f"NgramModel of {self.path}: expected a tokenizer, as in NgramModel(path, "
                "tokenizer), or give the model as lm of a Fusion"
            )
        return self._bound


class _Entries(NamedTuple):
    """The entry of the n-grams for each symbol, (V,) int64."""

    entry_of: Tensor


class _Symbols:
    """Scores symbols. The state is a context of the n-grams."""

    def __init__(self, ngrams: Ngrams, tokenizer: Tokenizer) -> None:
        self.ngrams, self.blank = ngrams, tokenizer.blank
        entries = [ngrams.index(symbol) for symbol in tokenizer.symbols]
        self._tables = DeviceCopies(_Entries(torch.tensor(entries)))

    def initial_state(self, batch_size: int, device: torch.device | str) -> Tensor:
        return torch.full((batch_size,), self.ngrams.start, dtype=torch.int64, device=device)

    def step(self, tokens: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        (entry_of,) = self._tables.on(state.device)
        _, after = self.ngrams.follow(state, entry_of[tokens])
        state = torch.where(tokens == self.blank, state, after)  # blank is the start
        scores = self.ngrams.log_probs_of(state)[:, entry_of]
        scores[:, self.blank] = 0
        return scores, state

    def final(self, state: Tensor) -> Tensor:
        return _end_scores(self.ngrams, state)


class _Letters(NamedTuple):
    """Tables to hash the current word: three of symbols, (V,), and two of known words, (W,)."""

    begins: Tensor  # bool, whether the symbol begins a word
    factor: Tensor  # int64; a symbol makes a hash to hash * factor + addend, see _hash_of
    addend: Tensor  # int64
    hashes: Tensor  # int64, ascending
    entries: Tensor  # int64, the entry of the n-grams for each hash


class _Words:
    """Scores words. The state (N, 2) is a context of the n-grams and the hash of the current word.

    The hash is a polynomial of the word's UTF-8 bytes, so that it can be continued symbol by
    symbol. Two words have equal hashes with a probability of about 2^-63.
    """

    def __init__(self, ngrams: Ngrams, tokenizer: Tokenizer) -> None:
        if not any(symbol.startswith(SPACE_SYMBOL) for symbol in tokenizer.symbols):
            raise ValueError(
                "its entries are words, but the model has no symbol for spaces; give an ARPA file "
                "of the model's symbols"
            )
        self.ngrams, self.blank = ngrams, tokenizer.blank
        texts = []
        for symbol in tokenizer.symbols:
            byte, text = byte_of(symbol), symbol.removeprefix(SPACE_SYMBOL)
            if SPACE_SYMBOL in text:
                raise ValueError(
                    f"its entries are words, but the model has symbols of several words: {symbol!r}"
                )
            texts.append(text.encode("utf-8", "replace") if byte is None else bytes([byte]))
        hashes = torch.tensor([_hash_of(word.encode()) for word in ngrams.words])
        ascending, entries = hashes.sort()
        letters = _Letters(
            torch.tensor([symbol.startswith(SPACE_SYMBOL) for symbol in tokenizer.symbols]),
            torch.tensor([_signed(pow(_FACTOR, len(text), 2**64)) for text in texts]),
            torch.tensor([_hash_of(text) for text in texts]),
            ascending,
            entries,
        )
        self._tables = DeviceCopies(letters)

    def initial_state(self, batch_size: int, device: torch.device | str) -> Tensor:
        state = torch.zeros(batch_size, 2, dtype=torch.int64, device=device)
        state[:, 0] = self.ngrams.start
        return state

    def step(self, tokens: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        symbols = self._tables.on(state.device)
        context, word = (part.contiguous() for part in state.unbind(1))
        begins, starts_text = symbols.begins[tokens], tokens == self.blank
        _, after = self._follow(context, word)
        context = torch.where(begins, after, context)
        longer = torch.where(begins, 0, word) * symbols.factor[tokens] + symbols.addend[tokens]
        word = torch.where(starts_text, word, longer)
        log_probs, _ = self._follow(context, word)
        return log_probs.unsqueeze(1) * symbols.begins, torch.stack([context, word], dim=1)

    def final(self, state: Tensor) -> Tensor:
        log_probs, context = self._follow(*(part.contiguous() for part in state.unbind(1)))
        return log_probs + _end_scores(self.ngrams, context)

    def _follow(self, context: Tensor, word: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the log-probabilities (N,) of words that end, and the contexts after them.

        Where the word is empty, the log-probability is 0 and the context stays.
        """
        letters = self._tables.on(word.device)
        place = torch.searchsorted(letters.hashes, word).clamp(max=len(letters.hashes) - 1)
        is_known = letters.hashes[place] == word
        entry = torch.where(is_known, letters.entries[place], self.ngrams.unknown)
        log_probs, after = self.ngrams.follow(context, entry)
        is_empty = word == 0
        return log_probs.masked_fill(is_empty, 0), torch.where(is_empty, context, after)


def _end_scores(ngrams: Ngrams, contexts: Tensor) -> Tensor:
    if ngrams.end is None:
        return torch.zeros(len(contexts), device=contexts.device)
    return ngrams.follow(contexts, torch.full_like(contexts, ngrams.end))[0]


_FACTOR = 0xBF58476D1CE4E5B9  # odd, of splitmix64


def _hash_of(text: bytes) -> int:
    """Returns the hash of a text as a signed int64; that of the empty text is 0.

    The hash of ``a + b`` is ``hash(a) * factor ** len(b) + hash(b)``, modulo 2^64.
    """
    value = 0
    for byte in text:
        value = (value * _FACTOR + _BYTES[byte]) % 2**64
    return _signed(value)


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value


# A random-looking number for each byte.
_BYTES = [(byte + 1) * 0x94D049BB133111EB % 2**64 for byte in range(256)]
