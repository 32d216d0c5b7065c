# SPDX-License-Identifier: Apache-2.0
"""Word error rates over whole sets, also when several processes each hold a part."""

from __future__ import annotations

from collections.abc import Iterable
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
    """

    id: str
    reference: str
    hypothesis: str


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
