# SPDX-License-Identifier: Apache-2.0
"""N-gram models of ARPA files, as flat tensors that are searched in batches."""

from __future__ import annotations

import gzip
import math
import os
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from transducer_toolkit.decoding.device_copies import DeviceCopies

__all__ = ["Ngrams", "read_arpa"]

START, END, UNKNOWN = "<s>", "</s>", "<unk>"
# Log-probability of unknown words, base 10, where the file has none. KenLM has the same.
UNKNOWN_LOG10 = -100.0
LN_10 = math.log(10)
# Bounds of a file, so that a hostile one takes neither all memory nor forever.
MAX_ORDER = 32
MAX_LINE = 2**20  # bytes
MAX_DIGITS = 18  # of a count
MAX_EMPTY_LINES = 10_000  # one after another
# Bound of log-probabilities and back-off weights, base 10: float32 holds sums of them.
MAX_LOG10 = 1e6
_BINARY = b"mmap lm http://kheafield.com/code"


class _Tables(NamedTuple):
    """A trie of S contexts and their A continuations. Context 0 is the empty one.

    Context 1 + w is word w. The probabilities after context 0 are in ``unigrams``, all others in
    the arcs, which are sorted by context and word.
    """

    unigrams: Tensor  # (W,) float32, log-probabilities in nats
    backoffs: Tensor  # (S,) float32, log back-off weights in nats
    shorter: Tensor  # (S,) int64, the context without its first word
    keys: Tensor  # (A,) int64, context * W + word, ascending
    log_probs: Tensor  # (A,) float32
    longer: Tensor  # (A,) int64, the context after the word
    first_arc: Tensor  # (S + 1,) int64


class Ngrams:
    """The n-grams of an ARPA file.

    Attributes:
        words: the words, by index; ``<unk>`` among them.
        order: length of the longest n-grams.
        start: context of the beginning of a sentence.
        unknown: index of ``<unk>``.
        end: index of ``</s>``, or None.
    """

    def __init__(self, words: Sequence[str], order: int, tables: _Tables) -> None:
        self.words, self.order = tuple(words), order
        self._index_of = {word: index for index, word in enumerate(words)}
        self.unknown = self._index_of[UNKNOWN]
        self.end = self._index_of.get(END)
        self.start = 1 + self._index_of[START] if START in self._index_of else 0
        self._tables = DeviceCopies(tables)

    def index(self, word: str) -> int:
        """Returns the index of a word, or that of ``<unk>`` if the file has no such word."""
        return self._index_of.get(word, self.unknown)

    def log_prob(self, words: Sequence[str], *, start: bool = True, end: bool = True) -> float:
        """Returns the log-probability of a sentence in nats.

        Args:
            words: its words, without ``<s>`` and ``</s>``.
            start: whether it begins after ``<s>``.
            end: whether it ends with ``</s>``.
        """
        indices = [self.index(word) for word in words]
        if end:
            indices.append(self.index(END))
        context, total = torch.tensor([self.start if start else 0]), 0.0
        for index in indices:
            log_probs, context = self.follow(context, torch.tensor([index]))
            total += float(log_probs)
        return total

    def follow(self, contexts: Tensor, words: Tensor) -> tuple[Tensor, Tensor]:
        """Looks up one word after each context.

        Args:
            contexts: (N,) int64.
            words: (N,) int64.

        Returns:
            The log-probabilities (N,) of the words, and the contexts (N,) after them.
        """
        tables = self._tables.on(contexts.device)
        total = torch.zeros(len(words), device=words.device)
        done = torch.zeros(len(words), dtype=torch.bool, device=words.device)
        log_probs, after = tables.unigrams[words], words + 1
        context = contexts
        for _ in range(self.order - 1):
            place, is_found = _find(tables.keys, context * len(self.words) + words)
            is_new = is_found & ~done
            log_probs = torch.where(is_new, tables.log_probs[place], log_probs)
            after = torch.where(is_new, tables.longer[place], after)
            done |= is_found
            total = total + torch.where(done, 0, tables.backoffs[context])
            context = tables.shorter[context]
        return log_probs + total, after

    def log_probs_of(self, contexts: Tensor) -> Tensor:
        """Returns the log-probabilities (N, W) of all words after each context (N,)."""
        tables = self._tables.on(contexts.device)
        chain = [contexts]
        for _ in range(self.order - 2):
            chain.append(tables.shorter[chain[-1]])
        rows = tables.unigrams.repeat(len(contexts), 1)
        if self.order == 1:
            return rows
        # From the shortest context to the longest: back off, then put in the known words.
        for context in reversed(chain):
            rows += tables.backoffs[context].unsqueeze(1)
            first = tables.first_arc[context]
            counts = tables.first_arc[context + 1] - first
            row = torch.repeat_interleave(counts)
            within = torch.arange(len(row), device=row.device) - (counts.cumsum(0) - counts)[row]
            arc = first[row] + within
            rows[row, tables.keys[arc] % len(self.words)] = tables.log_probs[arc]
        return rows


def read_arpa(path: str | os.PathLike[str]) -> Ngrams:
    """Reads an ARPA file, which may be compressed by gzip (``.gz``).

    If the file has no ``<unk>``, unknown words have the log-probability -100 to the base 10, as in
    KenLM. A file may have n-grams of up to 32 words, lines of up to 1 MiB, and log-probabilities
    and back-off weights of up to 1e6 in size.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not an ARPA file, or exceeds a bound; names file and line.

    Example:
        >>> ngrams = read_arpa("words.arpa")  # doctest: +SKIP
        >>> ngrams.log_prob("three one".split())  # doctest: +SKIP
        -5.19
    """
    name = os.fspath(path)
    if not Path(path).is_file():
        raise FileNotFoundError(f"no ARPA file at {name}")
    lines = _Lines(path)
    counts = _read_counts(lines)
    orders = [_read_order(lines, n, counts) for n in range(1, len(counts) + 1)]
    lines.expect("\\end\\")
    lines.expect_no_more()

    words = [gram[0] for gram in orders[0].grams]
    index_of = {word: index for index, word in enumerate(words)}
    if len(index_of) != len(words):
        number = _first_repeated(words)
        repeated = f"{words[number][:50]!r}"
        raise ValueError(f"{lines.at(orders[0].lines[number])}: {repeated} is there twice")
    unigrams = orders[0]
    spelled = [word for word in ("<UNK>", UNKNOWN) if word in index_of]
    unknown = spelled[0] if spelled else None
    if len(spelled) > 1:
        line = unigrams.lines[index_of[UNKNOWN]]
        raise ValueError(f"{lines.at(line)}: the file has both <UNK> and <unk>; remove one")
    if unknown is None:
        unigrams.grams.append((UNKNOWN,))
        unigrams.log10.append(UNKNOWN_LOG10)
        unigrams.backoffs.append(0.0)
        index_of[UNKNOWN] = len(words)
        words.append(UNKNOWN)
    else:
        words[index_of[unknown]] = UNKNOWN
    return Ngrams(words, len(orders), _build(orders, index_of, lines))


class _Order:
    """The n-grams of one length."""

    def __init__(self) -> None:
        self.grams: list[tuple[str, ...]] = []
        self.log10: list[float] = []
        self.backoffs: list[float] = []
        self.lines: list[int] = []


class _Lines:
    """The lines of a file that are not empty."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.name, self.number = os.fspath(path), 0
        self._lines = self._read(Path(path))
        self._kept: str | None = None

    def at(self, number: int) -> str:
        return f"{self.name}, line {number}"

    def next(self, expected: str) -> str:
        """Returns the next line. If the file ends, the error message contains ``expected``."""
        if self._kept is not None:
            line, self._kept = self._kept, None
            return line
        for line in self._lines:
            return line
        raise ValueError(f"{self.at(self.number)}: expected {expected}, but the file ends")

    def keep(self, line: str) -> None:
        """Makes :meth:`next` return this line once more."""
        self._kept = line

    def expect(self, text: str) -> None:
        line = self.next(text)
        if line != text:
            raise ValueError(f"{self.at(self.number)}: expected {text}, got {line[:50]!r}")

    def expect_no_more(self) -> None:
        """Reads to the end of the file, where gzip has its checksum."""
        for line in self._lines:
            raise ValueError(
                f"{self.at(self.number)}: expected no more after \\end\\, got {line[:50]!r}"
            )

    def _read(self, path: Path) -> Iterator[str]:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            num_empty = 0
            try:
                while line := file.readline(MAX_LINE + 1):
                    self.number += 1
                    if len(line) > MAX_LINE:
                        raise ValueError(
                            f"{self.at(self.number)}: expected at most {MAX_LINE} bytes, got "
                            f"{line[:20]!r} and more"
                        )
                    if self.number == 1 and line.startswith(_BINARY):
                        raise ValueError(
                            f"{self.name} is a binary file of KenLM; give the ARPA file that it "
                            "was made from"
                        )
                    text = line.decode("utf-8-sig" if self.number == 1 else "utf-8")
                    text = text.strip(" \t\r\n")
                    num_empty = 0 if text else num_empty + 1
                    if num_empty > MAX_EMPTY_LINES:
                        raise ValueError(
                            f"{self.at(self.number)}: more than {MAX_EMPTY_LINES} empty lines"
                        )
                    if text:
                        yield text
            except UnicodeDecodeError:
                raise ValueError(
                    f"{self.at(self.number)}: expected text in UTF-8, got {line[:20]!r}"
                ) from None
            except (EOFError, gzip.BadGzipFile, zlib.error) as error:
                raise ValueError(f"{self.name} cannot be read as a gzip file: {error}") from error


def _read_counts(lines: _Lines) -> list[int]:
    lines.expect("\\data\\")
    counts: list[int] = []
    while not (line := lines.next("\\1-grams:")).startswith("\\"):
        before, equals, count = line.partition("=")
        is_next = before.split() == ["ngram", str(len(counts) + 1)]
        count = count.strip()
        is_count = count.isascii() and count.isdecimal() and len(count) <= MAX_DIGITS
        if not is_next or not equals or not is_count:
            raise ValueError(
                f"{lines.at(lines.number)}: expected 'ngram {len(counts) + 1}=NUMBER' or "
                f"\\1-grams:, got {line[:50]!r}"
            )
        counts.append(int(count))
        if len(counts) > MAX_ORDER:
            raise ValueError(
                f"{lines.at(lines.number)}: expected n-grams of at most {MAX_ORDER} words, got "
                f"{line[:50]!r}"
            )
    lines.keep(line)
    if not counts or counts[0] == 0:
        raise ValueError(f"{lines.at(lines.number)}: expected 'ngram 1=NUMBER', got {line[:50]!r}")
    return counts


def _read_order(lines: _Lines, n: int, counts: Sequence[int]) -> _Order:
    lines.expect(f"\\{n}-grams:")
    found = _Order()
    for index in range(counts[n - 1]):
        line = lines.next(f"{counts[n - 1]} {n}-grams, as the head of the file says")
        fields = line.replace("\t", " ").split(" ")
        if "" in fields:
            fields = [field for field in fields if field]
        if line.startswith("\\") and len(fields) == 1:
            raise ValueError(
                f"{lines.at(lines.number)}: expected {counts[n - 1]} {n}-grams, as the head of the "
                f"file says, got {index}"
            )
        if len(fields) not in (n + 1, n + 2):
            raise ValueError(
                f"{lines.at(lines.number)}: expected a log-probability, {n} words and a back-off "
                f"weight, got {line[:50]!r}"
            )
        log10 = _number(fields[0], "a log-probability", lines)
        backoff = 0.0
        if len(fields) == n + 2:
            backoff = _number(fields[-1], "a back-off weight", lines)
        if log10 > 0 or (n == len(counts) and backoff != 0):
            what = "log-probability above 0" if log10 > 0 else "back-off weight of a longest n-gram"
            raise ValueError(f"{lines.at(lines.number)}: {what}: {line[:50]!r}")
        found.grams.append(tuple(fields[1 : n + 1]))
        found.log10.append(log10)
        found.backoffs.append(backoff)
        found.lines.append(lines.number)
    return found


def _number(text: str, what: str, lines: _Lines) -> float:
    try:
        # float() would also take 1_000 and the digits of other scripts.
        value = math.nan if "_" in text or not text.isascii() else float(text)
    except ValueError:
        value = math.nan
    if not abs(value) <= MAX_LOG10:
        raise ValueError(
            f"{lines.at(lines.number)}: expected {what} of at most {MAX_LOG10:g} in size, got "
            f"{text[:50]!r}"
        )
    return value


def _first_repeated(items: Sequence[object]) -> int:
    seen: set[object] = set()
    for number, item in enumerate(items):
        if item in seen:
            return number
        seen.add(item)
    raise AssertionError("nothing repeats")


def _build(orders: Sequence[_Order], index_of: dict[str, int], lines: _Lines) -> _Tables:
    """Builds the tables from the n-grams of each length and the index of each word."""
    num_words = len(index_of)
    _add_beginnings(orders)
    # The contexts of all n-grams but the longest, each with its index.
    context_of: dict[int, int] = {}  # (context of the words before) * W + last word -> context
    shorter, backoffs = [0] * (num_words + 1), [0.0, *orders[0].backoffs]
    arcs: dict[int, tuple[float, int]] = {}  # key -> log10, context after the word

    def after(context: int, word: int) -> int:
        """Returns the longest known context that is a suffix of the context and the word."""
        while context:
            if (found := context_of.get(context * num_words + word)) is not None:
                return found
            context = shorter[context]
        return 1 + word

    def log10_of(context: int, word: int) -> float:
        total = 0.0
        while context:
            if (found := arcs.get(context * num_words + word)) is not None:
                return total + found[0]
            total += backoffs[context]
            context = shorter[context]
        return total + orders[0].log10[word]

    for n, order in enumerate(orders[1:], start=2):
        for gram, log10, backoff, line in zip(
            order.grams, order.log10, order.backoffs, order.lines, strict=True
        ):
            try:
                *before, word = (index_of[part] for part in gram)
            except KeyError as error:
                raise ValueError(
                    f"{lines.at(line)}: {error.args[0][:50]!r} is not among the 1-grams of the file"
                ) from None
            context = 1 + before[0]
            for part in before[1:]:
                context = context_of[context * num_words + part]
            key = context * num_words + word
            if key in arcs:
                raise ValueError(f"{lines.at(line)}: {' '.join(gram)[:50]!r} is there twice")
            if math.isnan(log10):
                log10 = log10_of(context, word)
            longer = after(shorter[context], word)
            if n < len(orders):
                shorter.append(longer)
                longer = context_of[key] = len(backoffs)
                backoffs.append(backoff)
            arcs[key] = log10, longer

    keys = torch.tensor(sorted(arcs), dtype=torch.int64)
    in_order = [arcs[key] for key in keys.tolist()]
    return _Tables(
        unigrams=LN_10 * torch.tensor(orders[0].log10),
        backoffs=LN_10 * torch.tensor(backoffs),
        shorter=torch.tensor(shorter),
        keys=keys,
        log_probs=LN_10 * torch.tensor([log10 for log10, _ in in_order]),
        longer=torch.tensor([longer for _, longer in in_order], dtype=torch.int64),
        first_arc=torch.searchsorted(keys, torch.arange(len(backoffs) + 1) * num_words),
    )


def _add_beginnings(orders: Sequence[_Order]) -> None:
    """Adds the first n - 1 words of each n-gram where the file lacks them, as pruned files do.

    Their log-probability is NaN here; :func:`_build` computes it from shorter n-grams.
    """
    for longer, order in zip(reversed(orders[2:]), reversed(orders[1:-1]), strict=True):
        known = set(order.grams)
        for gram, line in zip(longer.grams, longer.lines, strict=True):
            if gram[:-1] not in known:
                known.add(gram[:-1])
                order.grams.append(gram[:-1])
                order.log10.append(math.nan)
                order.backoffs.append(0.0)
                order.lines.append(line)


def _find(keys: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the index of each wanted key in sorted keys, and whether the key is there."""
    if not len(keys):
        return torch.zeros_like(wanted), torch.zeros_like(wanted, dtype=torch.bool)
    place = torch.searchsorted(keys, wanted).clamp(max=len(keys) - 1)
    return place, keys[place] == wanted
