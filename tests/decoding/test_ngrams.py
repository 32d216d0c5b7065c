# SPDX-License-Identifier: Apache-2.0
"""N-gram models of symbols and of words as language models of a search."""

import math
import random

import pytest
import torch

from recipes.digits.fusion import arpa
from transducer_toolkit.data.sentencepiece_tokenizer import SentencePieceTokenizer
from transducer_toolkit.data.tokenizer import SPACE_SYMBOL, CharTokenizer
from transducer_toolkit.decoding import GreedySearch, NgramModel
from transducer_toolkit.modules import Joiner, StatelessPredictor

WORDS = ["one", "two", "three", "on", "tone"]


@pytest.fixture(scope="module")
def texts():
    choose = random.Random(5)
    return [" ".join(choose.choices(WORDS, k=choose.randint(1, 6))) for _ in range(200)]


@pytest.fixture(params=["characters", "pieces"])
def tokenizer(request, texts):
    if request.param == "characters":
        return CharTokenizer.from_texts(texts)
    return SentencePieceTokenizer.from_texts(texts, vocab_size=20)


def write(path, sentences, order=3):
    path.write_text(arpa(sentences, order=order))
    return path


def total(lm, tokenizer, text):
    """The score that a search gives to a text."""
    state, value = lm.initial_state(1), 0.0
    row, state = lm.step(torch.tensor([tokenizer.blank]), state)
    for token in tokenizer.encode(text):
        assert row.shape == (1, tokenizer.vocab_size)
        value += float(row[0, token])
        row, state = lm.step(torch.tensor([token]), state)
    return value + float(lm.final(state)[0])


def test_words_are_scored_at_their_ends(tmp_path, texts, tokenizer):
    path = write(tmp_path / "words.arpa", [text.split() for text in texts])
    lm = NgramModel(path, tokenizer)
    assert lm.scores_words
    for text in [*texts[:40], "", "tone tone tone", "one toe two", "hen"]:
        expected = lm.ngrams.log_prob(text.split())
        assert total(lm, tokenizer, text) == pytest.approx(expected, abs=1e-4), text
    # Nothing but the beginning of the next word, or the end, has a score.
    state = lm.initial_state(1)
    row, state = lm.step(torch.tensor([tokenizer.blank]), state)
    assert not row.any()
    for token in tokenizer.encode("one"):
        row, state = lm.step(torch.tensor([token]), state)
    begins = [symbol.startswith(SPACE_SYMBOL) for symbol in tokenizer.symbols]
    expected = lm.ngrams.log_prob(["one"], end=False)
    assert row[0].tolist() == pytest.approx([expected * begin for begin in begins], abs=1e-5)


def test_a_word_is_found_however_it_is_divided(tmp_path, texts):
    tokenizer = SentencePieceTokenizer.from_texts(texts, vocab_size=20)
    path = write(tmp_path / "words.arpa", [text.split() for text in texts])
    lm = NgramModel(path, tokenizer)
    known = {symbol: token for token, symbol in enumerate(tokenizer.symbols)}
    divided = [known[symbol] for symbol in (SPACE_SYMBOL, "t", "o", "n", "e")]
    assert len(tokenizer.encode("tone")) < len(divided)
    _, state = lm.step(torch.tensor([0]), lm.initial_state(1))
    for token in divided:
        _, state = lm.step(torch.tensor([token]), state)
    assert float(lm.final(state)[0]) == pytest.approx(lm.ngrams.log_prob(["tone"]), abs=1e-5)


@pytest.mark.parametrize("order", [2, 4])
def test_symbols(tmp_path, texts, tokenizer, order):
    sentences = [[tokenizer.symbols[token] for token in tokenizer.encode(text)] for text in texts]
    lm = NgramModel(write(tmp_path / "symbols.arpa", sentences, order), tokenizer)
    assert not lm.scores_words
    for text in texts[:40]:
        symbols = [tokenizer.symbols[token] for token in tokenizer.encode(text)]
        expected = lm.ngrams.log_prob(symbols)
        assert total(lm, tokenizer, text) == pytest.approx(expected, abs=1e-4)


def test_a_batch_is_its_rows(tmp_path, texts, tokenizer):
    sentences = [[tokenizer.symbols[token] for token in tokenizer.encode(text)] for text in texts]
    for path in (
        write(tmp_path / "symbols.arpa", sentences),
        write(tmp_path / "words.arpa", [text.split() for text in texts]),
    ):
        lm = NgramModel(path, tokenizer)
        tokens = torch.randint(1, tokenizer.vocab_size, (7, 12))
        state, rows = lm.initial_state(7), []
        for column in tokens.T:
            row, state = lm.step(column, state)
            rows.append(row)
        final = lm.final(state)
        for number, one in enumerate(tokens):
            state = lm.initial_state(1)
            for column, token in enumerate(one):
                row, state = lm.step(token.view(1), state)
                assert torch.allclose(row[0], rows[column][number], atol=1e-5)
            assert torch.allclose(lm.final(state)[0], final[number], atol=1e-5)


def test_units_and_errors(tmp_path, texts):
    words = write(tmp_path / "words.arpa", [text.split() for text in texts])
    letters = CharTokenizer.from_texts(["ab"])  # no space, and none of the words
    with pytest.raises(ValueError, match=r"words\.arpa: the model can write none of its words"):
        NgramModel(words, letters)
    with pytest.raises(ValueError, match=r"words\.arpa: the model can write none of its symbols"):
        NgramModel(words, CharTokenizer.from_texts(texts), units="symbols")
    no_spaces = CharTokenizer.from_texts(["onetwhr"])
    with pytest.raises(ValueError, match=r"words\.arpa: .* has no symbol for spaces"):
        NgramModel(words, no_spaces)
    upper = write(tmp_path / "upper.arpa", [text.upper().split() for text in texts])
    with pytest.raises(ValueError, match=r"upper\.arpa: the model can write none of its words, su"):
        NgramModel(upper, CharTokenizer.from_texts(texts))
    with pytest.raises(ValueError, match="units: expected one of"):
        NgramModel(words, units="letters")
    unbound = NgramModel(words)
    with pytest.raises(ValueError, match=r"words\.arpa: expected a tokenizer"):
        unbound.initial_state(1)


def test_greedy_search_refuses_words(tmp_path, texts):
    tokenizer = CharTokenizer.from_texts(texts)
    lm = NgramModel(write(tmp_path / "words.arpa", [text.split() for text in texts]), tokenizer)
    size = tokenizer.vocab_size
    with pytest.raises(ValueError, match="lm: greedy search cannot use a language model of words"):
        GreedySearch(StatelessPredictor(size, 4), Joiner(4, 4, 8, size), lm=lm)


def test_symbols_that_the_file_lacks_are_unknown(tmp_path):
    path = write(tmp_path / "symbols.arpa", [list("abab"), list("ba")])
    tokenizer = CharTokenizer.from_texts(["abz"])
    lm = NgramModel(path, tokenizer)
    row, _ = lm.step(torch.tensor([0]), lm.initial_state(1))
    expected = lm.ngrams.log_prob(["<unk>"], end=False)
    (token,) = tokenizer.encode("z")
    assert float(row[0, token]) == pytest.approx(expected) and math.isfinite(expected)
