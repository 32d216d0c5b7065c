# SPDX-License-Identifier: Apache-2.0
"""Error rates, delays and speed over whole sets, also when processes each hold a part."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import jiwer
import torch


@dataclass(frozen=True)
class Transcript:
    """One recognised utterance.

    Attributes:
        id: the utterance.
        reference: its text.
        hypothesis: what was recognised.
        symbol_delays_ms: of the words of the reference, see :func:`symbol_delays_ms`; None where
            it is not known when they start.
        duration_s: of its audio; 0 where it is not known.
        decoding_s: time that encoder and search took for it; in a batch, by its part of the audio.
    """

    id: str
    reference: str
    hypothesis: str
    symbol_delays_ms: tuple[float, ...] | None = None
    duration_s: float = 0.0
    decoding_s: float = 0.0


@dataclass(frozen=True)
class WordErrors:
    """Errors of a set, counted in words along the cheapest alignment.

    Attributes:
        substitutions, deletions, insertions: words.
        num_words: words of the references.
        num_utterances: utterances.

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
        """Word error rate, errors over reference words; above 1 when much is inserted."""
        errors = self.substitutions + self.deletions + self.insertions
        return errors / max(1, self.num_words)


@dataclass(frozen=True)
class CharacterErrors:
    """Errors of a set, counted in characters along the cheapest alignment, spaces included.

    Attributes:
        substitutions, deletions, insertions: characters.
        num_characters: characters of the references.
        num_utterances: utterances.

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
        """Character error rate, errors over reference characters."""
        errors = self.substitutions + self.deletions + self.insertions
        return errors / max(1, self.num_characters)


def count_word_errors(transcripts: Iterable[Transcript]) -> WordErrors:
    """Count the word errors of a set of transcripts.

    Args:
        transcripts: any number; white space separates words, nothing else is normalised.

    Returns:
        The summed errors. An empty reference counts what was inserted.

    Example:
        >>> count_word_errors([Transcript("a", "one", "one two"), Transcript("b", "", "")])
        WordErrors(substitutions=0, deletions=0, insertions=1, num_words=1, num_utterances=2)
    """
    return WordErrors(*_count(jiwer.process_words, list(transcripts)))


def count_character_errors(transcripts: Iterable[Transcript]) -> CharacterErrors:
    """Count the character errors of a set of transcripts.

    Args:
        transcripts: any number; runs of white space count as one space, and none at the ends.

    Returns:
        The summed errors. An empty reference counts what was inserted.

    Example:
        >>> count_character_errors([Transcript("a", "one", "on e")]).cer
        0.3333333333333333
    """
    return CharacterErrors(*_count(jiwer.process_characters, list(transcripts)))


def _count(process: Callable[..., Any], transcripts: list[Transcript]) -> tuple[int, ...]:
    """Substitutions, deletions, insertions, length of the references, utterances."""
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


def real_time_factor(transcripts: Iterable[Transcript]) -> float | None:
    """Time that encoder and search took over the duration of the audio.

    Args:
        transcripts: any number.

    Returns:
        The factor; None if no duration is known.

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
    """How late a model emits the words of an utterance: emission minus start, word by word.

    Args:
        emission_times_s: when the first symbol of each word is emitted, seconds.
        word_starts_s: when each word starts in the audio, seconds.

    Returns:
        Milliseconds; negative where a word is emitted before it starts.

    Raises:
        ValueError: if there are not as many of the ones as of the others.

    Example:
        >>> symbol_delays_ms([0.5, 1.25], [0.25, 1.0])
        (250.0, 250.0)
    """
    if len(emission_times_s) != len(word_starts_s):
        raise ValueError(
            "emission_times_s and word_starts_s must have one time a word each, "
            f"got {len(emission_times_s)} and {len(word_starts_s)}"
        )
    return tuple(
        1000 * (emitted - starts)
        for emitted, starts in zip(emission_times_s, word_starts_s, strict=True)
    )


@dataclass(frozen=True)
class SymbolDelay:
    """Symbol delay of a set.

    Attributes:
        mean_ms: mean over the words.
        median_ms: median over the words.
        num_words: words with a known start.
    """

    mean_ms: float
    median_ms: float
    num_words: int


def measure_symbol_delay(transcripts: Iterable[Transcript]) -> SymbolDelay | None:
    """Summarise the symbol delays of a set of transcripts.

    Args:
        transcripts: any number; those without delays are left out.

    Returns:
        The delay; None if no transcript has one.

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
    """Collect the transcripts of all processes of the default group, on every one of them.

    Args:
        transcripts: those of this process.

    Returns:
        All of them, each id once, in the order of the ids: the same whatever the number of
        processes. Without a process group, those given.

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
