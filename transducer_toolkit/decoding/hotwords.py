# SPDX-License-Identifier: Apache-2.0
"""Hotwords: phrases whose symbols get a bonus, found by an Aho-Corasick automaton."""

from __future__ import annotations

import math
import os
import unicodedata
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from transducer_toolkit.data.byte_pieces import byte_of
from transducer_toolkit.data.scripts import has_no_spaces
from transducer_toolkit.data.tokenizer import SPACE_SYMBOL, Tokenizer, check_known
from transducer_toolkit.decoding.device_copies import DeviceCopies
from transducer_toolkit.ops.checks import check_choice, check_number

__all__ = ["CASES", "Hotword", "HotwordModel", "read_hotwords"]

CASES = ("as_is", "variants")
SCORE_OF_LETTER = 0.2
MAX_TABLE = 2**27  # entries of 8 bytes: 1 GiB
MAX_PHRASE = 1000  # characters
MAX_BONUS = 1e6  # of a phrase: beside a larger one, float32 would lose the scores of the model


@dataclass(frozen=True)
class Hotword:
    """A word or phrase.

    Attributes:
        phrase: its text.
        weight: factor of its bonus, above 0.
        source: where it stands, such as "names.txt, line 3", for error messages.
    """

    phrase: str
    weight: float = 1.0
    source: str = "hotwords"


def read_hotwords(path: str | os.PathLike[str]) -> list[Hotword]:
    """Reads a file with one phrase a line, optionally followed by a tab and its weight.

    The file is UTF-8. Blank lines and lines that begin with ``#`` are skipped. A phrase has at most
    1000 characters.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if a line is not of this form, or no line holds a phrase; names file and line.

    Example:
        >>> read_hotwords("names.txt")  # doctest: +SKIP
        [Hotword(phrase='Ada Lovelace', weight=2.0, source='names.txt, line 1')]
    """
    name = os.fspath(path)
    if not Path(path).is_file():
        raise FileNotFoundError(f"no hotword file at {name}")
    found = []
    content = Path(path).read_bytes().removeprefix("\ufeff".encode())
    for number, line in enumerate(content.splitlines(), start=1):
        source = f"{name}, line {number}"
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError:
            raise ValueError(f"{source}: expected text in UTF-8, got {line[:20]!r}") from None
        if not text.strip() or text.startswith("#"):
            continue
        phrase, tab, weight = text.partition("\t")
        if any(unicodedata.category(c) == "Cc" for c in phrase + weight):
            raise ValueError(
                f"{source}: expected a phrase, or a phrase, a tab and its weight; got {text[:50]!r}"
            )
        found.append(Hotword(phrase, _weight(weight, source) if tab else 1.0, source))
        _check_phrase(found[-1])
    if not found:
        raise ValueError(f"{name} holds no phrases: expected one a line")
    return found


class HotwordModel:
    """A language model that gives a bonus to each symbol of listed phrases.

    Symbol d of a phrase, counted from 1, gets ``weight * (score + depth_score * log(d))``. If a
    hypothesis leaves a phrase before its end, or the utterance ends, the bonus of the incomplete
    phrase is taken back. So a complete phrase raises the score of a hypothesis by the sum over its
    symbols, and all other text leaves it unchanged. If one phrase begins with another, the common
    symbols count once.

    A phrase begins where a word begins and ends where a word ends: the phrase "six" gives no
    bonus to "sixty". Scripts without spaces have no such places; there, a phrase matches anywhere.

    The automaton is one table of scores and one of next states, so a step is two look-ups.

    Args:
        hotwords: the phrases: texts, pairs of a text and its weight, or :class:`Hotword` objects.
        tokenizer: tokenizer of the model.
        score: bonus of a symbol; None for 0.2 times the mean number of letters of the phrases'
            symbols, so that words get about the same bonus from characters and from word pieces.
        depth_score: bonus that grows with the number of symbols matched before.
        case: "as_is" matches the phrases as they are written; "variants" matches them in lower
            case, in upper case and with capital first letters, too, as far as the model has
            symbols for them.

    Raises:
        TypeError: if a phrase is no text, or a number is none.
        ValueError: if there are no phrases, the model has no symbols for one, a weight is not above
            0, the bonus of a phrase exceeds 1e6, or the tables would exceed 1 GiB.

    Example:
        >>> from transducer_toolkit.data.tokenizer import CharTokenizer
        >>> tokenizer = CharTokenizer.from_texts(["one two"])
        >>> lm = HotwordModel(["two"], tokenizer, score=1)
        >>> state, total = lm.initial_state(1), 0.0
        >>> for token in tokenizer.encode("one two"):
        ...     scores, state = lm.step(torch.tensor([token]), state)

    Source:
        icefall's ``ContextGraph``. There, every phrase that another one begins with counts again,
        and phrases need not end at the end of a word.
    """

    def __init__(
        self,
        hotwords: Iterable[Hotword | str | tuple[str, float]],
        tokenizer: Tokenizer,
        *,
        score: float | None = None,
        depth_score: float = 0.0,
        case: str = "as_is",
    ) -> None:
        for name, number in (("score", score), ("depth_score", depth_score)):
            if number is None:
                continue
            check_number(number, name)
            if not 0 <= number < math.inf:
                raise ValueError(f"{name}: expected a number of at least 0, got {number}")
        check_choice(case, "case", CASES)
        entries = [_hotword(entry, index) for index, entry in enumerate(hotwords)]
        if not entries:
            raise ValueError("hotwords: expected at least one phrase, got none")
        patterns = [
            pattern
            for entry in entries
            for pattern in _patterns(entry, tokenizer, case == "variants")
        ]
        if score is None:
            score = SCORE_OF_LETTER * _letters_of_symbol(patterns, tokenizer)
        nodes = _trie(patterns, tokenizer, score, depth_score)
        tables, self._start = _tables(nodes, tokenizer)
        self._tables = DeviceCopies(tables)

    def initial_state(self, batch_size: int, device: torch.device | str = "cpu") -> Tensor:
        """Returns the state (N,) at the beginning of an utterance, where a word begins."""
        return torch.full((batch_size,), self._start, dtype=torch.int64, device=device)

    def step(self, tokens: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the bonus (N, V) of every next symbol, which may be negative, and the state."""
        tables = self._tables.on(state.device)
        state = tables.next_states[state, tables.columns[tokens]].long()
        return tables.scores[state][:, tables.columns], state

    def final(self, state: Tensor) -> Tensor:
        """Returns (N,) what is taken back of phrases that are incomplete at the end."""
        return self._tables.on(state.device).finals[state]


class _Tables(NamedTuple):
    columns: Tensor  # (V,) int64, the column of each symbol; symbols of no phrase share columns
    scores: Tensor  # (S, C) float32
    next_states: Tensor  # (S, C) int32
    finals: Tensor  # (S,) float32


class _Pattern(NamedTuple):
    tokens: tuple[int, ...]
    weight: float
    source: str
    needs_end: bool  # whether it must be followed by the end of a word


class _Node:
    """A node of the trie: the symbols of a phrase up to some place."""

    def __init__(self, parent: _Node | None, token: int, depth: int) -> None:
        self.parent, self.token, self.depth = parent, token, depth
        self.children: dict[int, _Node] = {}
        self.fail = self  # the longest proper suffix that is a node
        self.index = 0  # in breadth-first order
        self.token_score = 0.0
        self.total = 0.0  # sum of the scores of the symbols
        self.kept = 0.0  # part of it that belongs to a complete phrase, so is not taken back
        self.is_end, self.needs_end = False, False
        self.source = ""  # where a phrase stands that ends here

    @property
    def pending(self) -> float:
        """Score that is taken back unless the phrase is completed."""
        return self.total - self.kept


def _hotword(entry: object, index: int) -> Hotword:
    source = f"hotwords[{index}]"
    if isinstance(entry, str):
        entry = Hotword(entry, source=source)
    elif not isinstance(entry, Hotword):
        if not isinstance(entry, Sequence) or len(entry) != 2 or not isinstance(entry[0], str):
            raise TypeError(f"{source}: expected a text, or a text and its weight, got {entry!r}")
        check_number(entry[1], source)
        entry = Hotword(entry[0], float(entry[1]), source)
    _check_phrase(entry)
    return entry


def _check_phrase(entry: Hotword) -> None:
    if not entry.phrase.strip():
        raise ValueError(f"{entry.source}: expected a phrase, got an empty one")
    if len(entry.phrase) > MAX_PHRASE:
        raise ValueError(
            f"{entry.source}: expected at most {MAX_PHRASE} characters, got {len(entry.phrase)}: "
            f"{entry.phrase[:20]!r} and more"
        )
    if not 0 < entry.weight < math.inf:
        raise ValueError(
            f"{entry.source}: expected a weight above 0, got {entry.weight} for "
            f"{entry.phrase[:50]!r}"
        )


def _weight(text: str, source: str) -> float:
    try:
        if "_" in text or not text.isascii():  # float() takes 1_000 and digits of other scripts
            raise ValueError
        return float(text)
    except ValueError:
        raise ValueError(f"{source}: expected a weight after the tab, got {text[:50]!r}") from None


def _patterns(entry: Hotword, tokenizer: Tokenizer, with_variants: bool) -> list[_Pattern]:
    """Returns the symbols of a phrase, in all its variants that the model can write."""
    phrase = " ".join(entry.phrase.split())
    texts = [phrase]
    if with_variants:
        capital = phrase[:1].upper() + phrase[1:]
        title = " ".join(word[:1].upper() + word[1:] for word in phrase.lower().split())
        texts += [phrase.lower(), phrase.upper(), capital, title]
    patterns, problem = [], None
    for text in dict.fromkeys(texts):
        try:
            tokens = tokenizer.encode(text)
            check_known(tokenizer, text, tokens)
            if not tokens:
                raise ValueError(f"the model has no symbols for {text!r}")
        except ValueError as error:
            problem = problem or error
            continue
        needs_end = not has_no_spaces(text[-1])
        for form in _forms(tokens, text, tokenizer):
            patterns.append(_Pattern(tuple(form), entry.weight, entry.source, needs_end))
    if not patterns:
        hint = "" if with_variants else "; hotwords_case=variants tries other cases, too"
        raise ValueError(f"{entry.source}: {problem}{hint}") from problem
    return patterns


def _letters_of_symbol(patterns: Sequence[_Pattern], tokenizer: Tokenizer) -> float:
    symbols = [tokenizer.symbols[token] for pattern in patterns for token in pattern.tokens]
    return sum(len(symbol) for symbol in symbols) / len(symbols)


def _forms(tokens: list[int], text: str, tokenizer: Tokenizer) -> list[list[int]]:
    """Returns the symbols of a phrase as they are within other text, in one or two forms."""
    symbols = tokenizer.symbols
    first = symbols[tokens[0]]
    letters = first.removeprefix(SPACE_SYMBOL)
    if not has_no_spaces(text[0]):
        if letters == first and SPACE_SYMBOL in symbols:
            return [[symbols.index(SPACE_SYMBOL), *tokens]]
        return [tokens]
    # A script without spaces: after a space, and after another symbol if the model has such a form.
    if letters == first or (letters and letters not in symbols):
        return [tokens]
    return [tokens, [*([symbols.index(letters)] if letters else []), *tokens[1:]]]


def _trie(
    patterns: Iterable[_Pattern], tokenizer: Tokenizer, score: float, depth_score: float
) -> list[_Node]:
    """Returns the nodes of the automaton in breadth-first order."""
    root = _Node(None, -1, 0)
    for pattern in patterns:
        node = root
        for token in pattern.tokens:
            if token not in node.children:
                is_space = node is root and tokenizer.symbols[token] == SPACE_SYMBOL
                # The space before a phrase gets no bonus.
                node.children[token] = _Node(node, token, node.depth + (not is_space))
            node = node.children[token]
            if node.depth:
                bonus = pattern.weight * (score + depth_score * math.log(node.depth))
                node.token_score = max(node.token_score, bonus)
        node.is_end, node.needs_end = True, pattern.needs_end
        node.source = pattern.source

    nodes: list[_Node] = []
    queue = deque([root])
    while queue:
        node = queue.popleft()
        node.index = len(nodes)
        nodes.append(node)
        queue.extend(node.children.values())
        parent = node.parent
        if parent is None:
            continue
        fail = parent.fail
        while fail.parent is not None and node.token not in fail.children:
            fail = fail.fail
        node.fail = fail.children.get(node.token, root) if parent.parent is not None else root
        node.total = parent.total + node.token_score
        if node.is_end and not node.total <= MAX_BONUS:
            raise ValueError(
                f"{node.source}: the bonus of the phrase is {node.total:g}, expected at most "
                f"{MAX_BONUS:g}; lower its weight or hotwords_score"
            )
        ends_phrase = parent.is_end and not (
            parent.needs_end and _continues_word(tokenizer.symbols[node.token])
        )
        node.kept = parent.total if ends_phrase else parent.kept
    return nodes


def _tables(nodes: Sequence[_Node], tokenizer: Tokenizer) -> tuple[_Tables, int]:
    """Returns the tables of the automaton, and the state at the beginning of an utterance."""
    root = nodes[0]
    of_phrases = sorted({node.token for node in nodes[1:]})
    # One column for each symbol of a phrase, then: blank, other symbols that continue a word, and
    # other symbols.
    blank_column = len(of_phrases)
    num_columns = blank_column + 3
    if len(nodes) * num_columns > MAX_TABLE:
        raise ValueError(
            f"hotwords: the phrases have {len(nodes)} states and {len(of_phrases)} different "
            f"symbols, which needs more than {MAX_TABLE * 8 / 2**30:g} GiB; give fewer phrases"
        )
    continues = torch.tensor([_continues_word(symbol) for symbol in tokenizer.symbols])
    columns = torch.where(continues, blank_column + 1, blank_column + 2)
    columns[tokenizer.blank] = blank_column
    columns[of_phrases] = torch.arange(blank_column)
    continues_word = torch.zeros(num_columns, dtype=torch.bool)  # by column
    continues_word[:blank_column] = continues[of_phrases]
    continues_word[blank_column + 1] = True

    column_of = {token: column for column, token in enumerate(of_phrases)}
    next_states = torch.zeros(len(nodes), num_columns, dtype=torch.int32)
    completed = torch.zeros(len(nodes))  # by a phrase that ends here and need not end a word
    completed_at_end = torch.zeros(len(nodes))  # by a phrase that ends here, at the end of a word
    for node in nodes:
        if node is not root:
            next_states[node.index] = next_states[node.fail.index]
            completed[node.index] = completed[node.fail.index]
            completed_at_end[node.index] = completed_at_end[node.fail.index]
        for token, child in node.children.items():
            next_states[node.index, column_of[token]] = child.index
        if node.is_end:
            # Of phrases that end in each other, the largest bonus counts.
            for table in (completed_at_end,) if node.needs_end else (completed_at_end, completed):
                table[node.index] = max(float(table[node.index]), node.pending)

    pending = torch.tensor([node.pending for node in nodes])
    kept = torch.where(continues_word, completed.unsqueeze(1), completed_at_end.unsqueeze(1))
    scores = pending[next_states.long()] - pending.unsqueeze(1) + kept
    own = torch.arange(len(nodes), dtype=torch.int32)
    next_states[:, blank_column], scores[:, blank_column] = own, 0
    space = tokenizer.symbols.index(SPACE_SYMBOL) if SPACE_SYMBOL in tokenizer.symbols else None
    start = root.children[space].index if space in root.children else 0
    return _Tables(columns, scores, next_states, completed_at_end - pending), start


def _continues_word(symbol: str) -> bool:
    """Whether a symbol, put after a word, continues it."""
    if byte_of(symbol) is not None:
        return True
    first = symbol[:1]
    is_letter = first.isalnum() or unicodedata.category(first or " ")[0] == "M"
    return is_letter and not has_no_spaces(first)
