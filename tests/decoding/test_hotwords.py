# SPDX-License-Identifier: Apache-2.0
import math
import random

import pytest
import torch

from transducer_toolkit.data.sentencepiece_tokenizer import SentencePieceTokenizer
from transducer_toolkit.data.tokenizer import CharTokenizer
from transducer_toolkit.decoding import Hotword, HotwordModel, hotwords, read_hotwords


@pytest.fixture
def characters():
    return CharTokenizer.from_texts(["abcde fghi", "six sixty"])


@pytest.fixture(scope="module")
def pieces():
    texts = ["six sixty seven seventy", "seven six", "sixty seven", "e seven ty"]
    return SentencePieceTokenizer.from_texts(texts, vocab_size=22)


def steps_of(lm, tokenizer, text):
    """Bonus of each symbol of a text, and what is added at its end."""
    state, scores = lm.initial_state(1), []
    row, state = lm.step(torch.tensor([tokenizer.blank]), state)
    for token in tokenizer.encode(text):
        scores.append(round(float(row[0, token]), 4))
        row, state = lm.step(torch.tensor([token]), state)
    assert float(row[0, tokenizer.blank]) == 0
    return scores, round(float(lm.final(state)[0]), 4)


def total(lm, tokenizer, text):
    scores, final = steps_of(lm, tokenizer, text)
    return round(sum(scores) + final, 4)


def test_each_symbol_of_a_phrase_gets_a_bonus_which_a_failure_takes_back(characters):
    lm = HotwordModel(["ab cd"], characters, score=1)
    assert steps_of(lm, characters, "ab cd") == ([1, 1, 1, 1, 1], 0)
    assert steps_of(lm, characters, "ab ce") == ([1, 1, 1, 1, -4], 0)
    assert steps_of(lm, characters, "ab c") == ([1, 1, 1, 1], -4)
    assert steps_of(lm, characters, "e ab cd e") == ([0, 0, 1, 1, 1, 1, 1, 0, 0], 0)
    # A failure may lie in the middle of another match.
    assert steps_of(lm, characters, "ab ab cd") == ([1, 1, 1, -2, 1, 1, 1, 1], 0)


def test_phrases_begin_and_end_where_words_do(characters, pieces):
    for tokenizer in (characters, pieces):
        lm = HotwordModel(["six"], tokenizer, score=1)
        bonus = total(lm, tokenizer, "six")
        assert bonus > 0
        assert total(lm, tokenizer, "six sixty six") == 2 * bonus
        assert total(lm, tokenizer, "sixty") == 0
    lm = HotwordModel(["six"], characters, score=1)
    assert steps_of(lm, characters, "asix") == ([0, 0, 0, 0], 0)
    assert steps_of(lm, characters, "sixty") == ([1, 1, 1, -3, 0], 0)
    # Both are listed: the longer one keeps the bonus.
    lm = HotwordModel(["six", "sixty"], characters, score=1)
    assert steps_of(lm, characters, "sixty six") == ([1, 1, 1, 1, 1, 0, 1, 1, 1], 0)


def test_a_phrase_that_begins_with_another_counts_common_symbols_once(characters):
    lm = HotwordModel(["ab", "ab cd"], characters, score=1)
    assert steps_of(lm, characters, "ab cd") == ([1, 1, 1, 1, 1], 0)
    assert steps_of(lm, characters, "ab ce") == ([1, 1, 1, 1, -2], 0)
    assert steps_of(lm, characters, "ab c") == ([1, 1, 1, 1], -2)


def test_weights_and_depth(characters):
    lm = HotwordModel([("ab", 2.0), ("ac", 0.5)], characters, score=1, depth_score=3)
    second = 1 + 3 * math.log(2)
    assert steps_of(lm, characters, "ab") == ([2, round(2 * second, 4)], 0)
    # The common symbol has the larger bonus of the two.
    assert steps_of(lm, characters, "ac") == ([2, round(0.5 * second, 4)], 0)


def test_the_default_suits_the_length_of_symbols(characters, pieces):
    for tokenizer in (characters, pieces):
        lm = HotwordModel(["seven" if tokenizer is pieces else "abcde"], tokenizer)
        assert 0.8 < total(lm, tokenizer, "seven" if tokenizer is pieces else "abcde") < 1.5


def reference(phrases, text):
    """Sum of the bonuses of a text straight from the definition, with score 1 a character."""
    words = text.split()
    sizes = {}
    for start in range(len(words)):
        for end in range(start + 1, len(words) + 1):
            if " ".join(words[start:end]) in phrases:
                sizes[start] = len(" ".join(words[start:end]))
    return sum(sizes.values())


@pytest.mark.parametrize("seed", range(20))
def test_the_total_equals_the_definition_on_random_texts(seed):
    # Words of one length, and phrases whose ends do not begin other phrases.
    choose = random.Random(seed)
    first, others = ["ab", "ac"], ["cb", "cd", "dd"]
    tokenizer = CharTokenizer.from_texts(["abcd x"])
    phrases = {
        " ".join([choose.choice(first), *choose.choices(others, k=choose.randint(0, 3))])
        for _ in range(6)
    }
    lm = HotwordModel(sorted(phrases), tokenizer, score=1)
    num_found = 0
    for _ in range(30):
        text = " ".join(choose.choices([*first, *others, "abx", "xab"], k=choose.randint(1, 9)))
        expected = reference(phrases, text)
        assert total(lm, tokenizer, text) == expected, (text, phrases)
        num_found += expected > 0
    assert num_found > 0


def test_a_batch_is_its_rows(characters):
    lm = HotwordModel(["ab cd", "bc"], characters, score=1)
    texts = ["ab cd ab", "bc abc b", "ab c ab "]
    tokens = torch.tensor([characters.encode(text + "i" * (8 - len(text.rstrip())))[:8]
                           for text in texts])  # fmt: skip
    state, rows = lm.initial_state(3), []
    for column in tokens.T:
        row, state = lm.step(column, state)
        rows.append(row)
    for number, one in enumerate(tokens):
        state = lm.initial_state(1)
        for column, token in enumerate(one):
            row, state = lm.step(token.view(1), state)
            assert torch.equal(row[0], rows[column][number])


def test_scripts_without_spaces_match_anywhere():
    tokenizer = CharTokenizer.from_texts(["今天好 ab"])
    lm = HotwordModel(["今天"], tokenizer, score=1)
    assert steps_of(lm, tokenizer, "好今天好") == ([0, 1, 1, 0], 0)
    texts = ["今天 天气", "我们 今天 去", "今天 好", "天气 好", "今 天 气 我 们 去 好"]
    pieces = SentencePieceTokenizer.from_texts(texts, vocab_size=22)
    lm = HotwordModel(["今天"], pieces, score=1)
    assert "今天" in pieces.symbols and "▁今天" in pieces.symbols
    assert [total(lm, pieces, text) for text in ("今天", "好今天", "好", "我们今天去")] == [
        1,
        1,
        0,
        1,
    ]


def test_case_variants(characters):
    with pytest.raises(ValueError, match=r"hotwords\[0\]: character 'A' .*hotwords_case=variants"):
        HotwordModel(["Ab"], characters)
    lm = HotwordModel(["Ab CD"], characters, score=1, case="variants")
    assert total(lm, characters, "ab cd") == 5
    tokenizer = CharTokenizer.from_texts(["ab AB"])
    lm = HotwordModel(["ab a"], tokenizer, score=1, case="variants")
    assert [total(lm, tokenizer, text) for text in ("ab a", "AB A", "Ab A", "Ab a", "aB a")] == [
        *(4, 4, 4, 4),
        0,
    ]


def test_phrases_that_the_model_cannot_write_are_named(characters, tmp_path):
    path = tmp_path / "names.txt"
    path.write_text("ab\nab zz\n")
    with pytest.raises(ValueError, match=r"names\.txt, line 2: character 'z' of 'ab zz'"):
        HotwordModel(read_hotwords(path), characters, case="variants")
    tokenizer = CharTokenizer.from_texts(["ab"], unknown=True)
    with pytest.raises(ValueError, match=r"hotwords\[1\]: the model has no symbol for 'z'"):
        HotwordModel(["ab", "az"], tokenizer, case="variants")


def test_files(tmp_path):
    path = tmp_path / "names.txt"
    path.write_text("\ufeffab cd\t2.5\r\n\n# ab\n  de f \n", encoding="utf-8")
    assert read_hotwords(path) == [
        Hotword("ab cd", 2.5, f"{path}, line 1"),
        Hotword("  de f ", 1.0, f"{path}, line 4"),
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no phrases"),
        (b"# only\n\n", "holds no phrases"),
        (b"ab\nab\tx\n", "line 2: expected a weight after the tab, got 'x'"),
        (b"ab\t\n", "line 1: expected a weight after the tab, got ''"),
        (b"ab\tnan\n", "line 1: expected a weight above 0, got nan"),
        (b"ab\t-1\n", "line 1: expected a weight above 0, got -1.0 for 'ab'"),
        (b"\t1\n", "line 1: expected a phrase, got an empty one"),
        (b"ab\t1\t2\n", "line 1: expected a phrase, or a phrase, a tab and its weight"),
        (b"ab\n\xff\xfe\n", "line 2: expected text in UTF-8"),
        (b"ab\t1_0\n", "line 1: expected a weight after the tab, got '1_0'"),
        (b"ab\n" + b"a" * 1001, "line 2: expected at most 1000 characters, got 1001: 'aaaa"),
        (b"RIFF\x00\x01\n", "line 1: expected a phrase, or a phrase, a tab"),
    ],
)
def test_garbage_is_one_sentence_with_file_and_line(tmp_path, content, message):
    path = tmp_path / "names.txt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as raised:
        read_hotwords(path)
    assert str(raised.value).startswith(str(path)) and "\n" not in str(raised.value)


def test_wrong_arguments(characters, monkeypatch, tmp_path):
    with pytest.raises(FileNotFoundError, match="no hotword file at"):
        read_hotwords(tmp_path / "none.txt")
    with pytest.raises(ValueError, match="hotwords: expected at least one phrase, got none"):
        HotwordModel([], characters)
    with pytest.raises(
        TypeError, match=r"hotwords\[1\]: expected a text, or a text and its weight"
    ):
        HotwordModel(["ab", 3], characters)
    with pytest.raises(ValueError, match=r"hotwords\[0\]: expected a weight above 0, got inf"):
        HotwordModel([("ab", math.inf)], characters)
    with pytest.raises(ValueError, match=r"hotwords\[0\]: the bonus of the phrase is 4e\+06"):
        HotwordModel([("ab", 2e6)], characters, score=1)
    with pytest.raises(ValueError, match="score: expected a number of at least 0, got -1"):
        HotwordModel(["ab"], characters, score=-1)
    with pytest.raises(TypeError, match="depth_score: expected a number, got str"):
        HotwordModel(["ab"], characters, depth_score="a")
    with pytest.raises(ValueError, match="case: expected one of"):
        HotwordModel(["ab"], characters, case="any")
    monkeypatch.setattr(hotwords, "MAX_TABLE", 10)
    with pytest.raises(ValueError, match="the phrases have 4 states and 3 different symbols"):
        HotwordModel(["ab"], characters)
