# SPDX-License-Identifier: Apache-2.0
import pytest

from transducer_toolkit.data.tokenizer import CharTokenizer
from transducer_toolkit.data.tokenizer_state import tokenizer_from_state


@pytest.fixture
def tokenizer():
    return CharTokenizer.from_texts(["zero one", "  two\tsix ", ""])


def test_vocabulary_is_ordered(tokenizer):
    assert tokenizer.symbols == ("<blk>", "▁", "e", "i", "n", "o", "r", "s", "t", "w", "x", "z")
    assert (tokenizer.vocab_size, tokenizer.blank) == (12, 0)
    assert tokenizer.symbols == CharTokenizer.from_texts(["x w z six", "tone r"]).symbols


@pytest.mark.parametrize("text", ["", "one", "six two", "zero zero"])
def test_round_trip(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text and tokenizer.blank not in ids


def test_white_space_is_normalized(tokenizer):
    assert tokenizer.encode("  one \n two ") == tokenizer.encode("one two")


def test_blanks_and_stray_spaces_vanish_when_decoding(tokenizer):
    one = tokenizer.encode("one")
    assert tokenizer.decode([1, 0, *one, 1, 1, 0, *one, 1]) == "one one"


def test_an_unknown_symbol_stands_for_what_training_lacks(tokenizer):
    tolerant = CharTokenizer.from_texts(["one two"], unknown=True)
    assert tolerant.symbols[:3] == ("<blk>", "<unk>", "▁")
    assert tolerant.decode(tolerant.encode("six two")) == "⁇⁇⁇ two"
    assert 1 not in tolerant.encode("one two")


def test_whether_there_is_an_unknown_symbol_is_a_bool():
    with pytest.raises(TypeError, match="unknown: expected a bool, got str"):
        CharTokenizer.from_texts(["one"], unknown="no")


def test_state(tokenizer):
    assert tokenizer_from_state(tokenizer.state()).symbols == tokenizer.symbols
    with pytest.raises(
        ValueError, match="kind must be one of characters, sentencepiece, huggingface, got 'x'"
    ):
        tokenizer_from_state({"kind": "x"})


def test_save_and_load(tokenizer, tmp_path):
    path = tmp_path / "tokens.txt"
    tokenizer.save(path)
    assert path.read_text(encoding="utf-8").splitlines()[:3] == ["<blk> 0", "▁ 1", "e 2"]
    assert CharTokenizer.load(path).symbols == tokenizer.symbols


def test_errors(tokenizer, tmp_path):
    with pytest.raises(ValueError, match="character 'a' of 'two a' is not among the 11 characters"):
        tokenizer.encode("two a")
    for id_ in (-1, 12):
        with pytest.raises(ValueError, match=rf"ids must lie in \[0, 12\), got {id_}"):
            tokenizer.decode([id_])
    for symbols, message in [
        ([], "must be '<blk>', got \\[\\]"),
        (["a"], "symbols\\[0\\] must be '<blk>'"),
        (["<blk>", "ab"], "symbols\\[1\\] must be one character"),
        (["<blk>", b"x"], "symbols\\[1\\] must be one character.* got b'x'"),
        (["<blk>", " "], "symbols\\[1\\] must be one character"),
        (["<blk>", "a", "a"], "symbols must not repeat, got \\['a'\\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            CharTokenizer(symbols)
    path = tmp_path / "tokens.txt"
    path.write_text("<blk> 0\na 2\n")
    with pytest.raises(ValueError, match="line 2: expected 'symbol 1', got 'a 2'"):
        CharTokenizer.load(path)
