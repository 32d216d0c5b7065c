# SPDX-License-Identifier: Apache-2.0
"""Word pieces as target symbols, by SentencePiece."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import sentencepiece

from transducer_toolkit.data.byte_pieces import byte_of, characters_of_bytes
from transducer_toolkit.data.tokenizer import (
    BLANK_SYMBOL,
    UNKNOWN_SYMBOL,
    UNKNOWN_TEXT,
    check_ids,
    save_symbols,
)

__all__ = ["SentencePieceTokenizer"]


class SentencePieceTokenizer:
    """Converts between texts and target symbols, one symbol per word piece.

    ``<blk>`` is 0. ``<unk>``, which every SentencePiece model has, stands for characters that the
    training texts lack; it is decoded as U+2047.

    Args:
        model: a trained model, as SentencePiece serializes it.

    Raises:
        ValueError: it is no such model, or its piece 0 is not ``<blk>``.

    Example:
        >>> tokenizer = SentencePieceTokenizer.from_texts(["one two", "two ones"], vocab_size=12)
        >>> tokenizer.symbols[:4], tokenizer.decode(tokenizer.encode("two one"))
        (('<blk>', '<unk>', 'ne', 'tw'), 'two one')

    Source: Kudo and Richardson, "SentencePiece" (2018).
    """

    kind = "sentencepiece"
    blank = 0

    def __init__(self, model: bytes) -> None:
        if not isinstance(model, bytes | bytearray | memoryview):  # bytes(10**12) would be a TB
            raise TypeError(f"model must be bytes, got {type(model).__name__}")
        self._model = bytes(model)
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=self._model)
        except RuntimeError as error:
            raise ValueError("model must be a SentencePiece model; it cannot be parsed") from error
        size = self._processor.get_piece_size()
        self.symbols = tuple(self._processor.id_to_piece(id_) for id_ in range(size))
        self._has_bytes = any(byte_of(symbol) is not None for symbol in self.symbols)
        if not self.symbols:  # of an empty file
            raise ValueError("model must be a SentencePiece model; it has no pieces")
        if self.symbols[0] != BLANK_SYMBOL:
            raise ValueError(
                f"piece 0 of the model must be {BLANK_SYMBOL!r}, got {self.symbols[0]!r}; train it "
                f"with pad_id=0, pad_piece={BLANK_SYMBOL!r}, unk_id=1"
            )

    @classmethod
    def from_texts(
        cls,
        texts: Iterable[str],
        *,
        vocab_size: int,
        model_type: str = "bpe",
        character_coverage: float = 1.0,
    ) -> SentencePieceTokenizer:
        """Train a model; the same texts in the same order give the same model.

        The texts are not normalized, so decoding returns them as the manifest has them.

        Args:
            texts: texts of the training set.
            vocab_size: number of symbols, blank and ``<unk>`` included (V).
            model_type: "bpe" or "unigram".
            character_coverage: part of all characters that must not become ``<unk>``; slightly
                below 1 for scripts with thousands of characters.

        Raises:
            ValueError: ``model_type`` is unknown, there are no texts, or ``vocab_size`` is too
                small for the characters or too large for the texts; SentencePiece says by how much.
        """
        if model_type not in ("bpe", "unigram"):
            raise ValueError(f"model_type must be 'bpe' or 'unigram', got {model_type!r}")
        texts = [text for text in texts if text and not text.isspace()]
        if not texts:
            raise ValueError("texts must hold at least one that is not empty")
        model = io.BytesIO()
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(texts),
                model_writer=model,
                vocab_size=vocab_size,
                model_type=model_type,
                character_coverage=character_coverage,
                normalization_rule_name="identity",
                max_sentence_length=1 << 20,  # bytes; longer ones would be skipped
                pad_id=0,  # the blank is what SentencePiece calls padding: never in a text
                pad_piece=BLANK_SYMBOL,
                unk_id=1,
                unk_piece=UNKNOWN_SYMBOL,
                bos_id=-1,
                eos_id=-1,
                num_threads=1,  # sums in one order: every process of a training gets the same
                minloglevel=2,
            )
        except RuntimeError as error:
            # "INTERNAL: src/file.cc(1) [condition] What was wrong."
            reason = re.sub(r"^.*?\]\s", "", str(error))
            raise ValueError(
                f"vocab_size={vocab_size} does not suit the texts: {reason}"
            ) from error
        return cls(model.getvalue())

    @property
    def vocab_size(self) -> int:
        """Number of symbols, blank included (V)."""
        return len(self.symbols)

    @property
    def scores(self) -> tuple[float, ...]:
        """Score of each symbol; of two pieces, BPE joins the one with the higher score first."""
        return tuple(self._processor.get_score(id_) for id_ in range(self.vocab_size))

    def encode(self, text: str) -> list[int]:
        """Return the ids of ``text``; runs of white space count as one space."""
        return self._processor.encode(" ".join(text.split()))

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ``ids``, skipping blanks and bytes that spell no character.

        Raises:
            ValueError: an id is outside ``[0, vocab_size)``.
        """
        ids = [id_ for id_ in check_ids(ids, self.vocab_size) if id_ != self.blank]
        if self._has_bytes:
            ids = self._without_stray_bytes(ids)
        text = self._processor.decode(ids)
        # The library adds spaces around an unknown symbol, also within a word.
        return " ".join(text.replace(f" {UNKNOWN_TEXT} ", UNKNOWN_TEXT).split())

    def _without_stray_bytes(self, ids: list[int]) -> list[int]:
        symbols = [self.symbols[id_] for id_ in ids]
        spans = characters_of_bytes(symbols).items()
        spelled = {k for first, (_, last) in spans for k in range(first, last + 1)}
        return [
            id_
            for position, (id_, symbol) in enumerate(zip(ids, symbols, strict=True))
            if position in spelled or byte_of(symbol) is None
        ]

    def state(self) -> dict[str, Any]:
        """Return the state that ``tokenizer_from_state`` takes, in plain values."""
        return {"kind": self.kind, "model": self._model}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write ``tokens.txt``, lines ``symbol id``, as sherpa-onnx and icefall read it."""
        save_symbols(self.symbols, path)

    def save_model(self, path: str | os.PathLike[str]) -> None:
        """Write the model, as :meth:`load` and every SentencePiece tool read it."""
        Path(path).write_bytes(self._model)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SentencePieceTokenizer:
        """Read a model file.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is not such a model, or its piece 0 is not ``<blk>``.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"no SentencePiece model at {path}")
        try:
            return cls(path.read_bytes())
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
