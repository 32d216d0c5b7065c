# SPDX-License-Identifier: Apache-2.0
import math

import pytest

from transducer_toolkit.data.tokenizer import CharTokenizer
from transducer_toolkit.decoding import Hypothesis
from transducer_toolkit.inference.words import (
    RecognizedWord,
    encoder_frame_s,
    recognized_words,
    word_spans,
)
from transducer_toolkit.modules import ConvLstmEncoder


@pytest.mark.parametrize(
    ("symbols", "expected"),
    [
        ([], []),
        (list("ab\u2581c"), [("ab", 0, 1), ("c", 3, 3)]),
        (["\u2581ab", "c", "\u2581c"], [("abc", 0, 1), ("c", 2, 2)]),
        (["\u2581", "ab", "\u2581", "\u2581c", "\u2581"], [("ab", 1, 1), ("c", 3, 3)]),
        (["\u2581"], []),
    ],
)
def test_word_spans(symbols, expected):
    assert word_spans(symbols) == expected


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
