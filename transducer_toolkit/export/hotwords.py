# SPDX-License-Identifier: Apache-2.0
"""Files for sherpa-onnx's hotwords: ``hotwords.txt`` and ``bpe.vocab``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from transducer_toolkit.data.sentencepiece_tokenizer import SentencePieceTokenizer
from transducer_toolkit.data.tokenizer import CharTokenizer, Tokenizer, check_known

SCORE = re.compile(r"^(?P<phrase>.*?)(?P<score>\s:\S*)?\s*$")


def checked_hotwords(lines: Sequence[str], tokenizer: Tokenizer) -> list[str]:
    """Return the lines that are not empty, with single spaces.

    Args:
        lines: a phrase each, then possibly its score as ``:2.5``.
        tokenizer: tokenizer of the model.

    Raises:
        ValueError: if a score is no number, the tokenizer has no symbol for a character, or the
            client cannot spell words as the tokenizer does.

    Example:
        >>> tokenizer = CharTokenizer.from_texts(["two ten"])
        >>> checked_hotwords(["ten  two :2.5", "", "two"], tokenizer)
        ['ten two :2.5', 'two']
    """
    checked = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        match = SCORE.match(line)
        assert match is not None  # the expression matches every line
        phrase, score = " ".join(match["phrase"].split()), (match["score"] or "").strip()
        try:
            if score:
                float(score[1:])
            check_known(tokenizer, phrase, tokenizer.encode(phrase))
        except ValueError as error:
            raise ValueError(f"hotwords, line {number}: {error}") from error
        checked.append(f"{phrase} {score}".strip())
    if checked and not isinstance(tokenizer, CharTokenizer | SentencePieceTokenizer):
        raise ValueError(
            "hotwords: sherpa-onnx spells them with characters or SentencePiece, and the model has "
            f"a {type(tokenizer).__name__}; export without hotwords"
        )
    return checked


def write_hotwords(lines: Sequence[str], tokenizer: Tokenizer, folder: Path) -> list[Path]:
    """Write ``bpe.vocab``, with which the client spells hotwords, and ``hotwords.txt``.

    Args:
        lines: of :func:`checked_hotwords`; without any, no ``hotwords.txt`` is written.
        tokenizer: tokenizer of the model. Only those of characters and of SentencePiece have a
            ``bpe.vocab``.
        folder: output folder.

    Returns:
        The files written.
    """
    if isinstance(tokenizer, SentencePieceTokenizer):
        scores = tokenizer.scores
    elif isinstance(tokenizer, CharTokenizer):
        scores = (0.0,) * tokenizer.vocab_size
    else:
        return []
    vocabulary = zip(tokenizer.symbols, scores, strict=True)
    files = {"bpe.vocab": [f"{symbol}\t{score:g}" for symbol, score in vocabulary]}
    if lines:
        files["hotwords.txt"] = list(lines)
    for name, content in files.items():
        (folder / name).write_text("".join(f"{line}\n" for line in content), encoding="utf-8")
    return [folder / name for name in files]
