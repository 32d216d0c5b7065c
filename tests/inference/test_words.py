# SPDX-License-Identifier: Apache-2.0
import math

import pytest

from transducer_toolkit.data.byte_pieces import byte_of, characters_of_bytes, shown_symbols
from transducer_toolkit.data.tokenizer import CharTokenizer
from transducer_toolkit.decoding import Hypothesis
from transducer_toolkit.inference.words import (
    RecognizedWord,
    encoder_frame_s,
    joined_text,
    recognized_words,
    word_spans,
    word_starts,
)
from transducer_toolkit.modules import ConvLstmEncoder


class Pieces:
    """A tokenizer of given symbols, decoded as SentencePiece does."""

    def __init__(self, symbols):
        self.symbols = symbols

    def decode(self, ids):
        symbols = [self.symbols[id_] for id_ in ids]
        spelled = characters_of_bytes(symbols)
        parts = [
            spelled.get(k, ("",))[0] if byte_of(symbol) is not None else symbol
            for k, symbol in enumerate(symbols)
        ]
        return " ".join("".join(parts).replace("\u2581", " ").split())


@pytest.mark.parametrize(
    ("symbols", "expected"),
    [
        ([], []),
        (list("ab\u2581c"), [("ab", 0, 1), ("c", 3, 3)]),
        (["\u2581ab", "c", "\u2581c"], [("abc", 0, 1), ("c", 2, 2)]),
        (["\u2581", "ab", "\u2581", "\u2581c", "\u2581"], [("ab", 1, 1), ("c", 3, 3)]),
        (["\u2581"], []),
        # Byte pieces make characters, and a space may be one of them.
        (["a", "<0xC3>", "<0xA4>", "b"], [("aäb", 0, 3)]),
        (["<0x61>", "<0x20>", "<0x62>"], [("a", 0, 0), ("b", 2, 2)]),
        (["\u2581a", "<0xE4>", "<0xB8>", "b"], [("ab", 0, 3)]),
        (["<0xE4>", "<0xB8>"], []),
        (["\u2581<unk>", "b"], [("<unk>b", 0, 1)]),
    ],
)
def test_word_spans(symbols, expected):
    found = word_spans(list(range(len(symbols))), Pieces(symbols))
    assert [(span.text, span.first, span.last) for span in found] == expected
    assert all(span.spaced for span in found)
    if not any("<0x" in symbol for symbol in symbols):
        assert word_starts(symbols) == [first for _, first, _ in expected]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("今天好", "今|天|好"),
        ("今天。明天，「好」！", "今|天。|明|天，|「好」！"),
        ("コーヒーと々", "コー|ヒー|と々"),
        ("用GitHub吧", "用|GitHub|吧"),
        ("今天。Today is", "今|天。|Today| is"),
        ("ที่นี่", "ที่|นี่"),
        ("ភាសា", "ភា|សា"),
        ("नमस्ते दुनिया", "नमस्ते| दुनिया"),
        ("안녕하세요 세계", "안녕하세요| 세계"),
        ("今 天", "今| 天"),
        ("\U00020000\U00020001", "\U00020000|\U00020001"),
    ],
)
def test_words_of_scripts_without_spaces_are_symbols(text, expected):
    tokenizer = CharTokenizer.from_texts([text])
    spans = word_spans(tokenizer.encode(text), tokenizer)
    assert "|".join(" " * s.spaced + s.text for s in spans).strip() == expected
    words = [RecognizedWord(s.text, 0.0, 1.0, 1.0, s.spaced) for s in spans]
    assert joined_text(words) == text == tokenizer.decode(tokenizer.encode(text))


def test_bytes_that_spell_no_character_are_not_shown():
    assert characters_of_bytes(["<0xE4>", "a", "<0xB8>", "<0x89>"]) == {}
    assert characters_of_bytes(["<0xF0>", "<0x9F>", "<0x41>"]) == {2: ("A", 2)}
    assert characters_of_bytes(["<0xff>", "<0xC3>", "<0xA4>"]) == {1: ("ä", 2)}
    assert shown_symbols(["<0xF0>", "<0x9F>", "<0x99>", "<0x82>", "<0xE4>", "<0xg0>"]) == [
        *("\U0001f642", "", "", "", "", "<0xg0>")
    ]


def test_frame_duration_follows_the_encoder():
    class Eightfold(ConvLstmEncoder):
        def num_output_frames(self, num_frames):
            return (num_frames - 9) // 8 + 1  # without padding at the edges

    assert encoder_frame_s(ConvLstmEncoder(hidden_dim=8)) == 0.04
    assert encoder_frame_s(Eightfold(hidden_dim=8)) == 0.08


def test_words_have_times_and_the_confidence_of_their_least_certain_symbol():
    tokenizer = CharTokenizer(["<blk>", "\u2581", "a", "b"])
    log_probs = [math.log(p) for p in (0.9, 0.6, 0.1, 0.8)]
    found = recognized_words(Hypothesis([2, 3, 1, 2], [1, 1, 4, 6], log_probs), tokenizer, 0.5)
    assert found == [
        RecognizedWord("ab", 0.5, 1.0, pytest.approx(0.6)),
        RecognizedWord("a", 3.0, 3.5, pytest.approx(0.8)),  # the space belongs to no word
    ]
    assert recognized_words(Hypothesis([], [], []), tokenizer, 0.5) == []
