# SPDX-License-Identifier: Apache-2.0
"""Tokenizers of Hugging Face's ``tokenizers`` as target symbols."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

from transducer_toolkit.data.tokenizer import check_ids, save_symbols
from transducer_toolkit.modules.huggingface_files import local_file, read_config
from transducer_toolkit.ops.checks import check_at_least, one_line

__all__ = ["HuggingFaceTokenizer"]

FILE = "tokenizer.json"
MAX_SYMBOLS = 2**20


class HuggingFaceTokenizer:
    """Converts between texts and target symbols with the tokenizer of a transducer.

    Unlike the other tokenizers of the toolkit, its blank is the symbol that the model has, usually
    the last one.

    Args:
        json: content of ``tokenizer.json``.
        vocab_size: number of symbols of the model, blank included (V).
        blank: id of the blank.

    Raises:
        ImportError: the package tokenizers is not installed.
        ValueError: the content is no tokenizer.
    """

    kind = "huggingface"

    def __init__(self, json: str, *, vocab_size: int, blank: int) -> None:
        check_at_least(1, vocab_size=vocab_size)
        if vocab_size > MAX_SYMBOLS:
            raise ValueError(f"vocab_size: expected at most {MAX_SYMBOLS}, got {vocab_size}")
        if not 0 <= blank < vocab_size:
            raise ValueError(f"blank must be in [0, {vocab_size}), got {blank}")
        try:
            from tokenizers import Tokenizer
        except ImportError as error:
            raise ImportError(
                f"HuggingFaceTokenizer needs tokenizers: pip install tokenizers ({error})"
            ) from error
        try:
            self._tokenizer = Tokenizer.from_str(json)
            self._tokenizer.encode_special_tokens = True  # "<blank>" in a text is text
            self._tokenizer.decode(self._tokenizer.encode("a text").ids)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a panic of the library is no Exception
            raise ValueError(f"{FILE} is no tokenizer: {one_line(error)}") from error
        self.json, self._size, self.blank = json, vocab_size, blank
        symbols = [self._tokenizer.id_to_token(id_) for id_ in range(vocab_size)]
        self.symbols = tuple(
            f"<{id_}>" if symbol is None else symbol for id_, symbol in enumerate(symbols)
        )

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> HuggingFaceTokenizer:
        """Read the tokenizer of the folder of a transducer.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it is damaged, or the folder is not that of a transducer.
        """
        path = local_file(folder, FILE)
        if not path.is_file():
            raise FileNotFoundError(
                f"no {FILE} in the folder {os.fspath(folder)}; save_pretrained of the model's "
                "processor writes it"
            )
        config = read_config(folder)
        size, blank = config.get("vocab_size"), config.get("blank_token_id")
        if not isinstance(size, int) or not isinstance(blank, int):
            raise ValueError(
                f"{os.fspath(folder)}/config.json: expected the vocab_size and the blank_token_id "
                f"of a transducer, got {size!r} and {blank!r}"
            )
        try:
            return cls(path.read_text(encoding="utf-8"), vocab_size=size, blank=blank)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    @property
    def vocab_size(self) -> int:
        """Number of symbols, blank included (V)."""
        return self._size

    def encode(self, text: str) -> list[int]:
        """Return the ids of ``text``; runs of white space count as one space.

        Raises:
            ValueError: an id is not a label of the model.
        """
        ids = self._tokenizer.encode(" ".join(text.split()), add_special_tokens=False).ids
        for id_ in ids:
            if id_ == self.blank or id_ >= self._size:
                raise ValueError(
                    f"the model has no symbol for {self._tokenizer.id_to_token(id_)!r} of {text!r}"
                )
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ``ids``, skipping blanks and special tokens.

        Raises:
            ValueError: an id is outside ``[0, vocab_size)``.
        """
        ids = [id_ for id_ in check_ids(ids, self._size) if id_ != self.blank]
        return " ".join(self._tokenizer.decode(ids, skip_special_tokens=True).split())

    def state(self) -> dict[str, Any]:
        """Return the state that ``tokenizer_from_state`` takes, in plain values."""
        return {
            "kind": self.kind,
            "json": self.json,
            "vocab_size": self._size,
            "blank": self.blank,
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write ``tokens.txt``, lines ``symbol id``, as sherpa-onnx and icefall read it."""
        save_symbols(self.symbols, path)
