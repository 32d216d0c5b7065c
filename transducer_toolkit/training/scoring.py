# SPDX-License-Identifier: Apache-2.0
"""Error rates, symbol delays and speed over whole sets, including sets spread over processes."""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import jiwer
import torch

from transducer_toolkit.data.byte_pieces import byte_of
from transducer_toolkit.data.tokenizer import UNKNOWN_SYMBOL, Tokenizer


@dataclass(frozen=True)
class Transcript:
    """The reference and the hypothesis of one utterance.

    Attributes:
        id: id of the utterance.
        reference: the reference text.
        hypothesis: the recognized text.
        symbol_delays_ms: delays of the words of the reference, see :func:`symbol_delays_ms`; None
            if their start times are unknown.
        duration_s: duration of the audio; 0 if unknown.
        decoding_s: time that the encoder and the search took. The time of a batch is divided among
            its utterances in proportion to their durations.
    """

    id: str
    reference: str
    hypothesis: str
    symbol_delays_ms: tuple[float, ...] | None = None
    duration_s: float = 0.0
    decoding_s: float = 0.0


@dataclass(frozen=True)
class WordErrors:
    """Word errors of a set, counted along the alignment with the fewest errors.

    Attributes:
        substitutions, deletions, insertions: numbers of words.
        num_words: number of words in the references.
        num_utterances: number of utterances.

    Example:
        >>> errors = count_word_errors([Transcript("a", "one two", "one too")])
        >>> errors.wer, errors.substitutions
        (0.5, 1)
    """

    substitutions: int
    deletions: int
    insertions: int
    num_words: int
    num_utterances: int

    @property
    def wer(self) -> float:
        """Word error rate: errors over reference words. Insertions can make it larger than 1."""
        errors = self.substitutions + self.deletions + self.insertions
        return errors / max(1, self.num_words)


@dataclass(frozen=True)
class CharacterErrors:
    """Character errors of a set, counted along the alignment with the fewest errors.

    Spaces are characters.

    Attributes:
        substitutions, deletions, insertions: numbers of characters.
        num_characters: number of characters in the references.
        num_utterances: number of utterances.

    Example:
        >>> errors = count_character_errors([Transcript("a", "one two", "one too")])
        >>> errors.substitutions, errors.num_characters
        (1, 7)
    """

    substitutions: int
    deletions: int
    insertions: int
    num_characters: int
    num_utterances: int

    @property
    def cer(self) -> float:
        """Character error rate: errors over reference characters."""
        errors = self.substitutions + self.deletions + self.insertions
        return errors / max(1, self.num_characters)


def count_word_errors(transcripts: Iterable[Transcript]) -> WordErrors:
    """Counts the word errors of a set of transcripts.

    Args:
        transcripts: any number of transcripts. Texts are split at white space and not normalized
            further.

    Returns:
        The summed errors. Every word of a hypothesis with an empty reference is an insertion.

    Example:
        >>> count_word_errors([Transcript("a", "one", "one two"), Transcript("b", "", "")])
        WordErrors(substitutions=0, deletions=0, insertions=1, num_words=1, num_utterances=2)
    """
    return WordErrors(*_count(jiwer.process_words, list(transcripts)))


def count_character_errors(transcripts: Iterable[Transcript]) -> CharacterErrors:
    """Counts the character errors of a set of transcripts.

    Args:
        transcripts: any number of transcripts. A run of white space counts as one space; white
            space at the ends is ignored.

    Returns:
        The summed errors. Every character of a hypothesis with an empty reference is an insertion.

    Example:
        >>> count_character_errors([Transcript("a", "one", "on e")]).cer
        0.3333333333333333
    """
    return CharacterErrors(*_count(jiwer.process_characters, list(transcripts)))


def _count(process: Callable[..., Any], transcripts: list[Transcript]) -> tuple[int, ...]:
    """Returns substitutions, deletions, insertions, length of the references, utterances."""
    if not transcripts:
        return 0, 0, 0, 0, 0
    found = process(
        [" ".join(t.reference.split()) for t in transcripts],
        [" ".join(t.hypothesis.split()) for t in transcripts],
    )
    return (
        found.substitutions,
        found.deletions,
        found.insertions,
        found.hits + found.substitutions + found.deletions,
        len(transcripts),
    )


def normalize_transcripts(
    transcripts: Iterable[Transcript], normalize: Callable[[str], str] | None
) -> list[Transcript]:
    """Returns transcripts with normalized references and hypotheses.

    Args:
        transcripts: any number of transcripts.
        normalize: text to text, such as a :class:`~transducer_toolkit.data.text.TextNormalizer`;
            None returns the transcripts as they are.

    Example:
        >>> normalize_transcripts([Transcript("a", "One", "ONE")], str.lower)[0].hypothesis
        'one'
    """
    if normalize is None:
        return list(transcripts)
    return [
        dataclasses.replace(t, reference=normalize(t.reference), hypothesis=normalize(t.hypothesis))
        for t in transcripts
    ]


@dataclass(frozen=True)
class UnwritableReferences:
    """References with characters that a model cannot write, so that they are errors for certain.

    Attributes:
        characters: number of references with each such character, the most frequent first.
        ids: ids of the utterances.
    """

    characters: dict[str, int]
    ids: list[str]


def find_unwritable(
    transcripts: Iterable[Transcript],
    tokenizer: Tokenizer,
    normalize: Callable[[str], str] | None = None,
) -> UnwritableReferences:
    """Finds the references with characters that no symbol of a tokenizer has.

    Args:
        transcripts: any number of transcripts, as they are scored.
        tokenizer: tokenizer of the symbols that the model emits. With byte pieces it can write
            everything.
        normalize: the normalization of the transcripts.

    Example:
        >>> from transducer_toolkit.data.tokenizer import CharTokenizer
        >>> tokenizer = CharTokenizer.from_texts(["no one"], unknown=True)
        >>> find_unwritable([Transcript("a", "One!", "one"), Transcript("b", "no", "")], tokenizer)
        UnwritableReferences(characters={'!': 1, 'O': 1}, ids=['a'])
    """
    if any(byte_of(symbol) is not None for symbol in tokenizer.symbols):
        return UnwritableReferences({}, [])
    texts = [
        tokenizer.decode([id_])
        for id_, symbol in enumerate(tokenizer.symbols)
        if symbol != UNKNOWN_SYMBOL and id_ != tokenizer.blank
    ]
    if normalize is not None:
        texts += [normalize(text) for text in texts]
    writable = set("".join(texts))
    missing = {t.id: set("".join(t.reference.split())) - writable for t in transcripts}
    counts = Counter(itertools.chain.from_iterable(missing.values()))
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return UnwritableReferences(dict(ordered), [id_ for id_, found in missing.items() if found])


def real_time_factor(transcripts: Iterable[Transcript]) -> float | None:
    """Returns the decoding time divided by the duration of the audio.

    Args:
        transcripts: any number of transcripts.

    Returns:
        The real-time factor, or None if no duration is known.

    Example:
        >>> real_time_factor([Transcript("a", "", "", duration_s=2.0, decoding_s=0.5)])
        0.25
    """
    transcripts = list(transcripts)
    duration_s = math.fsum(t.duration_s for t in transcripts)
    return math.fsum(t.decoding_s for t in transcripts) / duration_s if duration_s > 0 else None


def symbol_delays_ms(
    emission_times_s: Sequence[float], word_starts_s: Sequence[float]
) -> tuple[float, ...]:
    """Returns the delay of each word of an utterance: emission time minus start time.

    Args:
        emission_times_s: time in seconds at which the first symbol of each word is emitted.
        word_starts_s: time in seconds at which each word starts in the audio.

    Returns:
        The delays in milliseconds. A word emitted before it starts has a negative delay.

    Raises:
        ValueError: if the two sequences have different lengths.

    Example:
        >>> symbol_delays_ms([0.5, 1.25], [0.25, 1.0])
        (250.0, 250.0)
    """
    if len(emission_times_s) != len(word_starts_s):
        raise ValueError(
            "emission_times_s, word_starts_s: expected the same number of times, "
            f"got {len(emission_times_s)} and {len(word_starts_s)}"
        )
    return tuple(
        1000 * (emitted - starts)
        for emitted, starts in zip(emission_times_s, word_starts_s, strict=True)
    )


@dataclass(frozen=True)
class SymbolDelay:
    """Symbol delay of a set of utterances.

    Attributes:
        mean_ms: mean over the words.
        median_ms: median over the words.
        num_words: number of words with a known start time.
    """

    mean_ms: float
    median_ms: float
    num_words: int


def measure_symbol_delay(transcripts: Iterable[Transcript]) -> SymbolDelay | None:
    """Computes the mean and the median symbol delay of a set of transcripts.

    Args:
        transcripts: any number of transcripts. Those without delays are ignored.

    Returns:
        The symbol delay, or None if no transcript has delays.

    Example:
        >>> delays = [(80.0, 120.0, 400.0), None]
        >>> measure_symbol_delay(Transcript("a", "", "", delay) for delay in delays)
        SymbolDelay(mean_ms=200.0, median_ms=120.0, num_words=3)
    """
    delays = list(itertools.chain.from_iterable(t.symbol_delays_ms or () for t in transcripts))
    if not delays:
        return None
    return SymbolDelay(statistics.fmean(delays), statistics.median(delays), len(delays))


def gather_transcripts(transcripts: list[Transcript]) -> list[Transcript]:
    """Gathers the transcripts of all processes of the default process group, in every process.

    Args:
        transcripts: the transcripts of this process.

    Returns:
        The transcripts of all processes, sorted by id, each id once. Without a process group, the
        transcripts of this process. The result does not depend on the number of processes.

    Example:
        >>> gather_transcripts([Transcript("b", "", ""), Transcript("a", "", "")])[0].id
        'a'
    """
    parts = [transcripts]
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        parts = [[] for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather_object(parts, transcripts)
    unique = {transcript.id: transcript for part in parts for transcript in part}
    return [unique[key] for key in sorted(unique)]
