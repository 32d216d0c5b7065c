# SPDX-License-Identifier: Apache-2.0
"""Transcription of audio files of any length, in overlapping windows that are joined."""

from __future__ import annotations

import itertools
import os
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from torch import Tensor

from transducer_toolkit.data.features import Fbank
from transducer_toolkit.data.windows import AudioWindow, read_windows
from transducer_toolkit.inference.words import RecognizedWord

WINDOW_S = 20.0
OVERLAP_S = 4.0
BATCH_SIZE = 8  # windows recognized together
SAME_WORD_S = 0.1  # maximum distance of the starts that two windows give the same word


@dataclass(frozen=True)
class Transcription:
    """The transcription of an audio file.

    Attributes:
        text: the words, with single spaces.
        words: the words with times and confidences.
        duration_s: duration of the audio, seconds.
    """

    text: str
    words: list[RecognizedWord]
    duration_s: float


class WordRecognizer(Protocol):
    """The part of a recognizer's interface that :func:`transcribe_file` uses."""

    fbank: Fbank

    def recognize_words(self, waveforms: Sequence[Tensor]) -> list[list[RecognizedWord]]:
        """Return the words of each waveform (samples,)."""


def transcribe_file(
    recognizer: WordRecognizer,
    path: str | os.PathLike[str],
    *,
    window_s: float = WINDOW_S,
    overlap_s: float = OVERLAP_S,
    batch_size: int = BATCH_SIZE,
    on_progress: Callable[[float], None] | None = None,
) -> Transcription:
    """Transcribe an audio file of any length in bounded memory.

    The file is read in overlapping windows, each of which is recognized separately;
    :func:`join_words` joins their words. A file that is no longer than a window is recognized as a
    whole.

    Args:
        recognizer: a trained recognizer.
        path: any format that soundfile reads, any sample rate, any number of channels.
        window_s: length of a window, seconds.
        overlap_s: overlap of two windows, at most half a window, seconds.
        batch_size: number of windows that are recognized together; memory grows with it, not with
            the file.
        on_progress: called with the number of seconds that were transcribed so far.

    Returns:
        The words, times counted from the start of the file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not audio, ends too early or is too short for a frame of features,
            or an option is out of range.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    sample_rate = recognizer.fbank.sample_rate
    windows = read_windows(path, window_s=window_s, overlap_s=overlap_s, sample_rate=sample_rate)
    words: list[RecognizedWord] = []
    duration_s = 0.0
    for batch in _batches(windows, batch_size):
        found = recognizer.recognize_words([window.waveform for window in batch])
        for window, window_words in zip(batch, found, strict=True):
            later = [
                replace(
                    word, start_s=word.start_s + window.start_s, end_s=word.end_s + window.start_s
                )
                for word in window_words
            ]
            if window.start_s > 0:
                # The previous window ends with the overlap; earlier words are not affected.
                tail = bisect_left(words, window.start_s, key=lambda word: word.start_s)
                middle_s = window.start_s + overlap_s / 2
                later = join_words(words[tail:], later, cut_s=middle_s, reach_s=overlap_s / 4)
                del words[tail:]
            words += later
            duration_s = window.start_s + len(window.waveform) / sample_rate
        if on_progress is not None:
            on_progress(duration_s)
    return Transcription(" ".join(word.word for word in words), words, duration_s)


def join_words(
    earlier: Sequence[RecognizedWord],
    later: Sequence[RecognizedWord],
    *,
    cut_s: float,
    reach_s: float,
) -> list[RecognizedWord]:
    """Join the words of two overlapping windows without losing or doubling a word.

    If both windows have the same word, with starts at most 0.1 s apart and within ``reach_s`` of
    ``cut_s``, the one nearest to ``cut_s`` is the joint: words up to it come from the earlier
    window, words after it from the later one. If there is no such word (in a pause, or where the
    windows disagree), the words are cut at the time nearest to ``cut_s`` that lies in no word of
    either window.

    Args:
        earlier: words of the earlier windows.
        later: words of the later window, times on the same clock.
        cut_s: middle of the overlap, seconds.
        reach_s: maximum distance of the joint from the middle, seconds.

    Example:
        >>> def word(text, start_s):
        ...     return RecognizedWord(text, start_s, start_s + 0.2, 1.0)
        >>> earlier = [word("one", 0.0), word("two", 1.0), word("three", 2.0), word("t", 2.8)]
        >>> later = [word("wo", 1.04), word("three", 2.04), word("ten", 2.8)]
        >>> [word.word for word in join_words(earlier, later, cut_s=2.0, reach_s=1.0)]
        ['one', 'two', 'three', 'ten']
    """
    shared = []
    for i, one in enumerate(earlier):
        for j, other in enumerate(later):
            distance_s = abs((one.start_s + other.start_s) / 2 - cut_s)
            close = abs(one.start_s - other.start_s) <= SAME_WORD_S
            if one.word == other.word and close and distance_s <= reach_s:
                shared.append((distance_s, i, j))
    if shared:
        _, i, j = min(shared)
        return [*earlier[: i + 1], *later[j + 1 :]]
    before = after = cut_s  # will be the nearest times in no word, on either side
    spans = sorted((word.start_s, word.end_s) for word in (*earlier, *later))
    for start_s, end_s in spans:
        if start_s < after < end_s:
            after = end_s
    for start_s, end_s in sorted(spans, key=lambda span: -span[1]):
        if start_s < before < end_s:
            before = start_s
    cut_s = before if cut_s - before <= after - cut_s else after
    return [
        *(word for word in earlier if word.end_s <= cut_s),
        *(word for word in later if word.start_s >= cut_s),
    ]


def _batches(windows: Iterable[AudioWindow], size: int) -> Iterable[list[AudioWindow]]:
    windows = iter(windows)
    while batch := list(itertools.islice(windows, size)):
        yield batch
