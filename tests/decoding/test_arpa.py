# SPDX-License-Identifier: Apache-2.0
"""Reader of ARPA files: equal to KenLM, and one sentence for each kind of garbage."""

import gzip
import math
import random

import pytest
import torch

from recipes.digits.fusion import arpa as estimated_arpa
from transducer_toolkit.decoding.arpa import read_arpa

SMALL = """\\data\\
ngram 1=6
ngram 2=5
ngram 3=2

\\1-grams:
-99\t<s>\t-0.3
-1.2\t</s>
-2.0\t<unk>
-0.5\ta\t-0.4
-0.7\tb\t-0.25
-0.9\tc

\\2-grams:
-0.2\t<s> a\t-0.1
-0.6\ta b\t-0.35
-0.8\tb </s>
-1.1\ta a
-0.75\tb a

\\3-grams:
-0.3\t<s> a b
-0.15\tb a c

\\end\\
"""
# kenlm.Model(path).score(sentence, bos=True, eos=True), log10.
KENLM_SCORES = {
    "": -1.5,
    "a b": -1.65,
    "a a c": -3.9,
    "b a c": -3.1,
    "c c b a": -5.15,
    "a x b": -4.2,
    "x": -3.5,
    "a b a c": -2.95,
}


@pytest.fixture
def small(tmp_path):
    path = tmp_path / "small.arpa"
    path.write_text(SMALL)
    return path


def test_equals_recorded_values_of_kenlm(small):
    ngrams = read_arpa(small)
    for sentence, expected in KENLM_SCORES.items():
        found = ngrams.log_prob(sentence.split()) / math.log(10)
        assert found == pytest.approx(expected, abs=1e-5), sentence


def test_recorded_values_are_those_of_kenlm(small):
    kenlm = pytest.importorskip("kenlm")
    model = kenlm.Model(str(small))
    for sentence, expected in KENLM_SCORES.items():
        assert model.score(sentence) == pytest.approx(expected, abs=1e-5), sentence


@pytest.fixture
def random_texts():
    choose = random.Random(3)
    words = [f"w{index}" for index in range(30)]

    def text():
        return [choose.choice(words[: choose.randint(3, 30)]) for _ in range(choose.randint(0, 9))]

    return [text() for _ in range(400)], [[*text(), "other"] if n % 5 == 0 else text()
                                          for n in range(1000)]  # fmt: skip


@pytest.mark.parametrize("order", [2, 4])
def test_perplexity_of_1000_sentences_equals_kenlm(tmp_path, random_texts, order):
    kenlm = pytest.importorskip("kenlm")
    train, test = random_texts
    path = tmp_path / "texts.arpa"
    path.write_text(estimated_arpa(train, order=order))
    ngrams = read_arpa(path)
    found = [ngrams.log_prob(words) for words in test]
    model = kenlm.Model(str(path))
    expected = [model.score(" ".join(words)) * math.log(10) for words in test]
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-4)
    num_words = sum(len(words) + 1 for words in test)
    assert math.exp(-sum(found) / num_words) == pytest.approx(
        math.exp(-sum(expected) / num_words), rel=1e-5
    )


@pytest.mark.parametrize("order", [2, 3, 5])
def test_all_words_at_once_equal_one_at_a_time(tmp_path, random_texts, order):
    path = tmp_path / "texts.arpa.gz"
    path.write_bytes(gzip.compress(estimated_arpa(random_texts[0], order=order).encode()))
    ngrams = read_arpa(path)
    contexts = [ngrams.start]
    for words in random_texts[1][:40]:
        context = torch.tensor([ngrams.start])
        for word in words:
            _, context = ngrams.follow(context, torch.tensor([ngrams.index(word)]))
            contexts.append(int(context))
    contexts = torch.tensor(contexts)
    rows = ngrams.log_probs_of(contexts)
    for word in range(len(ngrams.words)):
        one, _ = ngrams.follow(contexts, torch.full_like(contexts, word))
        assert torch.allclose(rows[:, word], one, atol=1e-5)
    # The estimate is a distribution, <s> apart.
    sums = rows.exp().sum(1) - rows[:, ngrams.index("<s>")].exp()
    assert torch.allclose(sums, torch.ones_like(sums), atol=1e-4)


def test_a_file_may_lack_the_beginning_of_an_ngram(small):
    # SRILM prunes such files. "b a" then has the probability of "a" and the back-off weight of "b".
    complete = read_arpa(small)
    small.write_text(SMALL.replace("-0.75\tb a\n", "").replace("ngram 2=5", "ngram 2=4"))
    pruned = read_arpa(small)
    for sentence in KENLM_SCORES:
        words = sentence.split()
        assert pruned.log_prob(words) == pytest.approx(complete.log_prob(words), abs=1e-6)


def test_single_words(tmp_path):
    path = tmp_path / "one.arpa"
    path.write_text("\\data\\\nngram 1=2\n\n\\1-grams:\n-0.5 a\n-0.25 </s>\n\n\\end\\\n")
    ngrams = read_arpa(path)
    assert ngrams.log_prob(["a", "a"]) == pytest.approx(-1.25 * math.log(10))
    rows = ngrams.log_probs_of(torch.tensor([0, 1])) / math.log(10)
    assert rows.tolist() == [pytest.approx([-0.5, -0.25, -100])] * 2


def test_unknown_words_of_a_closed_vocabulary(tmp_path):
    path = tmp_path / "closed.arpa"
    path.write_text(SMALL.replace("-2.0\t<unk>\n", "").replace("ngram 1=6", "ngram 1=5"))
    log_prob = read_arpa(path).log_prob(["x"]) / math.log(10)
    assert log_prob == pytest.approx(-0.3 - 100 - 1.2)  # as in KenLM


GARBAGE = {
    "empty": ("", r"line 0: expected \\data\\, but the file ends"),
    "text": ("hello\n", r"line 1: expected \\data\\, got 'hello'"),
    "counts": (SMALL.replace("ngram 2=5", "ngram 2=x"), r"line 3: expected 'ngram 2=NUMBER'"),
    "order": (SMALL.replace("ngram 3=2", "ngram 4=2"), r"line 4: expected 'ngram 3=NUMBER'"),
    "none": ("\\data\\\n\\1-grams:\n", r"line 2: expected 'ngram 1=NUMBER'"),
    "number": (SMALL.replace("-0.9\tc", "x\tc"), r"line 12: expected a log-probability .* got 'x'"),
    "nan": (SMALL.replace("-0.9\tc", "nan\tc"), r"line 12: expected a log-probability"),
    "positive": (SMALL.replace("-0.9\tc", "0.9\tc"), r"line 12: log-probability above 0"),
    "words": (SMALL.replace("a b\t-0.35", "a"), r"line 16: expected a log-probability, 2 words"),
    "unknown": (SMALL.replace("-1.1\ta a", "-1.1\ta z"), r"line 18: 'z' is not among the 1-grams"),
    "twice": (SMALL.replace("-1.1\ta a", "-1.1\ta b"), r"line 18: 'a b' is there twice"),
    "twice, one word": (SMALL.replace("-0.9\tc", "-0.9\tb"), r"line 12: 'b' is there twice"),
    "few": (SMALL.replace("-1.1\ta a\n", ""), r"line 20: expected 5 2-grams, .* got 4"),
    "many": (SMALL.replace("ngram 2=5", "ngram 2=4"), r"line 19: expected \\3-grams:, got"),
    "end": (SMALL.replace("\\end\\\n", ""), r"line 24: expected \\end\\, but the file ends"),
    "overflow": (
        SMALL.replace("-0.9\tc", "-1e39\tc"),
        r"line 12: expected a .* at most 1e\+06 in si",
    ),
    "back-off size": (
        SMALL.replace("\t-0.4\n", "\t1e300\n"),
        r"line 10: expected a back-off weight",
    ),
    "underscore": (
        SMALL.replace("-0.9\tc", "-0_9\tc"),
        r"line 12: expected a log-prob.* got '-0_9'",
    ),
    "digits": (
        SMALL.replace("ngram 2=5", "ngram 2=" + "5" * 5000),
        "line 3: expected 'ngram 2=NUM",
    ),
    "script": (SMALL.replace("ngram 2=5", "ngram 2=\u0665"), "line 3: expected 'ngram 2=NUMBER'"),
    "two unknown": (SMALL.replace("-0.9\tc", "-0.9\t<UNK>"), "line 9: the file has both <UNK>"),
    "long line": (
        SMALL.replace("\tc\n", f"\t{'c' * 2**20}\n"),
        "line 12: expected at most 1048576 by",
    ),
    "empty lines": (SMALL.replace("\n\n", "\n" * 10_003, 1), "line 10005: more than 10000 empty"),
    "orders": (
        SMALL.replace("\n\n", "\n" + "".join(f"ngram {n}=0\n" for n in range(4, 40)) + "\n", 1),
        r"line 34: expected n-grams of at most 32 words, got 'ngram 33=0'",
    ),
    "more": (SMALL + "\nmore\n", r"line 27: expected no more after \\end\\, got 'more'"),
    "backoff": (SMALL.replace("b a c", "b a c\t-1"), r"line 23: back-off weight of a longest"),
}


@pytest.mark.parametrize("name", GARBAGE)
def test_garbage_is_one_sentence_with_file_and_line(tmp_path, name):
    content, message = GARBAGE[name]
    path = tmp_path / "bad.arpa"
    path.write_text(content)
    with pytest.raises(ValueError, match=message) as raised:
        read_arpa(path)
    assert str(raised.value).startswith(f"{path}, line ") and "\n" not in str(raised.value)


def test_files_of_other_kinds(tmp_path):
    path = tmp_path / "lm.arpa"
    with pytest.raises(FileNotFoundError, match="no ARPA file at"):
        read_arpa(path)
    path.write_bytes(b"mmap lm http://kheafield.com/code format version 5\n\0\1\2")
    with pytest.raises(ValueError, match=r"lm\.arpa is a binary file of KenLM; give the ARPA file"):
        read_arpa(path)
    path.write_bytes(b"\\data\\\n\xff\xfe\n")
    with pytest.raises(ValueError, match=r"lm\.arpa, line 2: expected text in UTF-8"):
        read_arpa(path)
    path.with_suffix(".gz").write_bytes(b"\\data\\\n")
    with pytest.raises(ValueError, match="cannot be read as a gzip file"):
        read_arpa(path.with_suffix(".gz"))
    path.with_suffix(".gz").write_bytes(gzip.compress(SMALL.encode())[:60])
    with pytest.raises(ValueError, match="cannot be read as a gzip file"):
        read_arpa(path.with_suffix(".gz"))


def test_damaged_and_endless_gzip_files(tmp_path):
    path = tmp_path / "lm.arpa.gz"
    content = gzip.compress(SMALL.encode())
    for place in range(10, len(content)):
        damaged = bytearray(content)
        damaged[place] ^= 4
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"lm\.arpa\.gz"):
            read_arpa(path)
    path.write_bytes(gzip.compress(b"a" * 2**24) * 20)
    with pytest.raises(ValueError, match=r"lm\.arpa\.gz, line 1: expected at most 1048576 byt"):
        read_arpa(path)


def test_random_bytes_never_raise_another_error(tmp_path):
    choose, path = random.Random(1), tmp_path / "bad.arpa"
    lines = SMALL.splitlines(keepends=True)
    num_read = 0
    for _ in range(300):
        content = bytearray("".join(lines).encode())
        for _ in range(choose.randint(1, 4)):
            content[choose.randrange(len(content))] = choose.randrange(256)
        path.write_bytes(content)
        try:
            read_arpa(path)
            num_read += 1
        except ValueError as error:
            assert str(path) in str(error)
    assert 0 < num_read < 300
