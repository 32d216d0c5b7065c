# SPDX-License-Identifier: Apache-2.0
"""Words with times and confidences, from symbols with encoder frames."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from transducer_toolkit.data.byte_pieces import byte_of, characters_of_bytes
from transducer_toolkit.data.features import FRAME_SHIFT_MS
from transducer_toolkit.data.scripts import has_no_spaces
from transducer_toolkit.data.tokenizer import (
    SPACE_SYMBOL,
    UNKNOWN_SYMBOL,
    UNKNOWN_TEXT,
    Tokenizer,
)
from transducer_toolkit.decoding import Hypothesis
from transducer_toolkit.modules.encoder import Encoder

_OPENING = ("Ps", "Pi")  # categories of opening brackets and quotation marks


@dataclass(frozen=True)
class RecognizedWord:
    """A recognized word. In scripts without spaces, the text of one symbol.

    Attributes:
        word: its text.
        start_s: start of the frame that emits its first symbol, seconds.
        end_s: end of the frame that emits its last symbol, seconds.
        confidence: the smallest probability of its symbols when they were emitted, in [0, 1].
        spaced: whether a space separates it from the word before; the first word has none before.
    """

    word: str
    start_s: float
    end_s: float
    confidence: float
    spaced: bool = True


class WordSpan(NamedTuple):
    """Text of a word, positions of its first and last symbol, and whether a space precedes it."""

    text: str
    first: int
    last: int
    spaced: bool


def encoder_frame_s(encoder: Encoder) -> float:
    """Return the duration of an encoder frame; frame t starts at ``t * encoder_frame_s``.

    Example:
        >>> from transducer_toolkit.modules import ConvLstmEncoder
        >>> encoder_frame_s(ConvLstmEncoder(hidden_dim=16))
        0.04
    """
    return encoder.subsampling_factor * FRAME_SHIFT_MS / 1000


def word_starts(symbols: Sequence[str]) -> list[int]:
    """Return the positions of the symbols that begin the words between spaces.

    A word starts after a space (U+2581). The space may be a symbol by itself (characters) or the
    first character of a symbol (word pieces). Spaces that are symbols belong to no word.

    Example:
        >>> word_starts(["a", "b", "\u2581", "c"]), word_starts(["\u2581ab", "c", "\u2581c"])
        ([0, 3], [0, 2])
    """
    starts = []
    begins = True
    for position, symbol in enumerate(symbols):
        letters = symbol.removeprefix(SPACE_SYMBOL)
        begins = begins or letters != symbol
        if letters and begins:
            starts.append(position)
            begins = False
    return starts


def word_spans(tokens: Sequence[int], tokenizer: Tokenizer) -> list[WordSpan]:
    """Group tokens into words.

    A space begins a word. In scripts without spaces, such as Chinese and Thai, each symbol is a
    word, so that words have lengths that subtitles and scoring can use; marks and closing
    punctuation join the word before them. The byte pieces of a character are never separated.

    Args:
        tokens: tokens of a text, without blanks.
        tokenizer: tokenizer of the tokens.

    Example:
        >>> from transducer_toolkit.data.tokenizer import CharTokenizer
        >>> tokenizer = CharTokenizer.from_texts(["ab 今天。"])
        >>> spans = word_spans(tokenizer.encode("ab a今天。"), tokenizer)
        >>> [(span.text, span.spaced) for span in spans]
        [('ab', True), ('a', True), ('今', False), ('天。', False)]
    """
    symbols = [tokenizer.symbols[token] for token in tokens]
    characters = characters_of_bytes(symbols)
    spans: list[WordSpan] = []
    ends_with, space, position = "", True, 0
    while position < len(symbols):
        first, symbol = position, symbols[position]
        if byte_of(symbol) is None:
            last, letters = first, symbol.removeprefix(SPACE_SYMBOL)
            space = space or letters != symbol
            letters = UNKNOWN_TEXT if letters == UNKNOWN_SYMBOL else letters
        else:  # a byte that spells no character is not shown
            letters, last = characters.get(first, ("", first))
            space = space or letters.isspace()
        position = last + 1
        if not letters.strip():
            continue
        if space or _may_part(ends_with, letters[0]):
            spans.append(WordSpan("", first, last, space))
        else:
            spans[-1] = spans[-1]._replace(last=last)
        ends_with, space = letters[-1], False
    return [
        span._replace(text=tokenizer.decode(tokens[span.first : span.last + 1])) for span in spans
    ]


def _may_part(before: str, after: str) -> bool:
    """Whether a word may end between two characters that no space separates."""
    kinds = unicodedata.category(before), unicodedata.category(after)
    if not (has_no_spaces(before) or has_no_spaces(after)):
        # "今天。Today", "今天，「": a word after closing punctuation of a script without spaces.
        is_closing = kinds[0][0] == "P" and kinds[0] not in _OPENING
        is_wide = unicodedata.east_asian_width(before) in "WF"
        return is_wide and is_closing and (after.isalnum() or kinds[1] in _OPENING)
    is_attached = kinds[1] == "Lm" or kinds[1][0] in "MP"
    return kinds[0] not in _OPENING and (not is_attached or kinds[1] in _OPENING)


def joined_text(words: Sequence[RecognizedWord]) -> str:
    """Return the text of words, with spaces where they have them.

    Example:
        >>> words = [RecognizedWord("今", 0, 1, 1), RecognizedWord("天", 1, 2, 1, spaced=False)]
        >>> joined_text(words)
        '今天'
    """
    return "".join(" " * word.spaced + word.word for word in words).strip()


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
    starts_s = [frame * frame_s for frame in hypothesis.frames]
    return words_at(hypothesis.tokens, starts_s, hypothesis.log_probs, tokenizer, frame_s)


def words_at(
    tokens: Sequence[int],
    starts_s: Sequence[float],
    log_probs: Sequence[float],
    tokenizer: Tokenizer,
    frame_s: float,
) -> list[RecognizedWord]:
    """Return the words of tokens with known times.

    Args:
        tokens: tokens of a text, without blanks.
        starts_s: start of the frame that emits each token, seconds.
        log_probs: log-probability of each token.
        tokenizer: tokenizer of the tokens.
        frame_s: duration of an encoder frame, seconds.
    """
    return [
        RecognizedWord(
            word=span.text,
            start_s=starts_s[span.first],
            end_s=starts_s[span.last] + frame_s,
            confidence=math.exp(min(log_probs[span.first : span.last + 1])),
            spaced=span.spaced,
        )
        for span in word_spans(tokens, tokenizer)
    ]
