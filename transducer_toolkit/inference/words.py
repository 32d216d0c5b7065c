# SPDX-License-Identifier: Apache-2.0
"""Words with times and confidences, from symbols with encoder frames."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from transducer_toolkit.data.features import FRAME_SHIFT_MS
from transducer_toolkit.data.tokenizer import SPACE_SYMBOL, Tokenizer
from transducer_toolkit.decoding import Hypothesis
from transducer_toolkit.modules.encoder import Encoder


@dataclass(frozen=True)
class RecognizedWord:
    """A recognized word.

    Attributes:
        word: its text.
        start_s: start of the frame that emits its first symbol, seconds.
        end_s: end of the frame that emits its last symbol, seconds.
        confidence: the smallest probability of its symbols when they were emitted, in [0, 1].
    """

    word: str
    start_s: float
    end_s: float
    confidence: float


def encoder_frame_s(encoder: Encoder) -> float:
    """Return the duration of an encoder frame; frame t starts at ``t * encoder_frame_s``.

    Example:
        >>> from transducer_toolkit.modules import ConvLstmEncoder
        >>> encoder_frame_s(ConvLstmEncoder(hidden_dim=16))
        0.04
    """
    return encoder.subsampling_factor * FRAME_SHIFT_MS / 1000


def word_spans(symbols: Sequence[str]) -> list[tuple[str, int, int]]:
    """Group symbols into words.

    A word starts after a space (U+2581). The space may be a symbol by itself (characters) or the
    first character of a symbol (word pieces). Spaces that are symbols belong to no word.

    Args:
        symbols: symbols of a text.

    Returns:
        For each word, its text and the positions of its first and last symbol.

    Example:
        >>> word_spans(["a", "b", "\u2581", "c"]), word_spans(["\u2581ab", "c", "\u2581c"])
        ([('ab', 0, 1), ('c', 3, 3)], [('abc', 0, 1), ('c', 2, 2)])
    """
    spans: list[tuple[str, int, int]] = []
    begins = True
    for position, symbol in enumerate(symbols):
        letters = symbol.removeprefix(SPACE_SYMBOL)
        begins = begins or letters != symbol
        if not letters:
            continue
        if begins:
            spans.append((letters, position, position))
        else:
            word, first, _ = spans[-1]
            spans[-1] = (word + letters, first, position)
        begins = False
    return spans


def recognized_words(
    hypothesis: Hypothesis, tokenizer: Tokenizer, frame_s: float
) -> list[RecognizedWord]:
    """Return the words of a hypothesis with times and confidences.

    Args:
        hypothesis: result of a search, with the ``log_probs`` of its tokens.
        tokenizer: tokenizer of its tokens.
        frame_s: duration of an encoder frame, seconds.

    Example:
        >>> from transducer_toolkit.data.tokenizer import CharTokenizer
        >>> tokenizer = CharTokenizer(["<blk>", "\u2581", "a", "b"])
        >>> hypothesis = Hypothesis([2, 3, 1, 2], [5, 6, 8, 9], [-0.1, -0.2, 0.0, 0.0])
        >>> words = recognized_words(hypothesis, tokenizer, frame_s=0.04)
        >>> [(word.word, round(word.confidence, 2)) for word in words]
        [('ab', 0.82), ('a', 1.0)]
    """
    tokens, frames = hypothesis.tokens, hypothesis.frames
    return [
        RecognizedWord(
            word=tokenizer.decode(tokens[first : last + 1]),
            start_s=frames[first] * frame_s,
            end_s=(frames[last] + 1) * frame_s,
            confidence=math.exp(min(hypothesis.log_probs[first : last + 1])),
        )
        for _, first, last in word_spans([tokenizer.symbols[token] for token in tokens])
    ]
