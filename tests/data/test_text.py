# SPDX-License-Identifier: Apache-2.0
import logging

import pytest

from transducer_toolkit.data.manifest import Utterance
from transducer_toolkit.data.text import TextNormalizer, normalize_utterances

COMPOSED, DECOMPOSED = "\u00e9", "e\u0301"


@pytest.mark.parametrize(
    ("options", "text", "expected"),
    [
        ({}, " A  b,\t", " A  b,\t"),
        ({"case": "lower"}, "ÄB  c", "äb c"),
        ({"case": "upper"}, "straße", "STRASSE"),
        ({"case": "fold"}, "Straße", "strasse"),
        ({"unicode": "NFC"}, DECOMPOSED, COMPOSED),
        ({"unicode": "NFD"}, COMPOSED, DECOMPOSED),
        ({"unicode": "NFKC"}, "\ufb01ne", "fine"),
        ({"unicode": "NFC", "case": "lower"}, "E\u0301", COMPOSED),
        ({"punctuation": "remove"}, 'Don\'t -- "well-known", (I) say...', "Don't well-known I say"),
        ({"punctuation": "remove"}, "今天，明天。", "今天明天"),
        ({"punctuation": "remove"}, "one,two 'three'", "one two three"),
        ({"punctuation": "remove"}, "¿qué?", "qué"),
        ({"punctuation": "remove"}, "!", ""),
        ({"function": str.title}, "one  two", "One Two"),
        ({"function": "string.capwords", "case": "lower"}, "ONE two", "One Two"),
    ],
)
def test_texts(options, text, expected):
    assert TextNormalizer(**options)(text) == expected


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"case": "title"}, ValueError, "case: expected 'lower', 'upper', 'fold' or None"),
        ({"punctuation": None}, ValueError, "punctuation: expected 'keep' or 'remove', got None"),
        ({"unicode": "nfc"}, ValueError, "unicode: expected one of NFC, NFD, NFKC, NFKD or None"),
        ({"function": "no_such_package.f"}, ValueError, "cannot import 'no_such_package.f'"),
        ({"function": "string.no_such"}, ValueError, "cannot import 'string.no_such'"),
        ({"function": "capwords"}, ValueError, "cannot import 'capwords'"),
        ({"function": 3}, TypeError, "function: expected a function of a text, got 3"),
        ({"function": len}, TypeError, "function: expected it to return str, got 1"),
    ],
)
def test_errors(options, error, message):
    with pytest.raises(error, match=message):
        TextNormalizer(**options)("a")


def test_word_times_of_another_number_of_words_are_dropped(caplog):
    one = Utterance("a", "a.wav", 2.0, "One - two", word_starts_s=[0.1, 0.5, 1.0])
    two = Utterance("b", "a.wav", 2.0, "One two", word_starts_s=[0.1, 1.0])
    normalize = TextNormalizer(case="lower", punctuation="remove")
    with caplog.at_level(logging.WARNING):
        first, second = normalize_utterances([one, two], normalize)
    assert (first.text, first.word_starts_s) == ("one two", None)
    assert (second.text, second.word_starts_s) == ("one two", [0.1, 1.0])
    assert "1 utterances lose their word times" in caplog.text
