# SPDX-License-Identifier: Apache-2.0
"""Word error rates and symbol delays over whole sets, also when processes each hold a part."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

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
    """

    id: str
    reference: str
    hypothesis: str
    symbol_delays_ms: tuple[float, ...] | None = None


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
    transcripts = list(transcripts)
    if not transcripts:
        return WordErrors(0, 0, 0, 0, 0)
    words = jiwer.process_words(
        [t.reference for t in transcripts], [t.hypothesis for t in transcripts]
    )
    return WordErrors(
        substitutions=words.substitutions,
        deletions=words.deletions,
        insertions=words.insertions,
        num_words=words.hits + words.substitutions + words.deletions,
        num_utterances=len(transcripts),
    )


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
