# SPDX-License-Identifier: Apache-2.0
"""Transcription of audio files of any length, many files in common batches."""

from __future__ import annotations

import logging
import os
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from transducer_toolkit.data.audio import open_audio
from transducer_toolkit.data.features import Fbank
from transducer_toolkit.data.scripts import has_no_spaces
from transducer_toolkit.data.tokenizer import Tokenizer
from transducer_toolkit.data.windows import AudioWindow, read_windows
from transducer_toolkit.decoding import Hypothesis
from transducer_toolkit.inference.joining import Span, TimedSymbol, join_symbols
from transducer_toolkit.inference.pauses import has_vad, read_at_pauses
from transducer_toolkit.inference.words import RecognizedWord, joined_text, words_at

WINDOW_S = 20.0
OVERLAP_S = 4.0
BATCH_SIZE = 8  # windows recognized together
POOL_BATCHES = 4  # batches of audio that are read before the first of them is recognized
CUTS = ("pauses", "windows")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Transcription:
    """The transcription of an audio file.

    Attributes:
        text: the words, with single spaces.
        words: the words with times and confidences.
        duration_s: duration of the audio, seconds.
        channel: "mix" for the average of the channels, or the number of the channel, from 0.
    """

    text: str
    words: list[RecognizedWord]
    duration_s: float
    channel: int | str = "mix"


class AudioSource(NamedTuple):
    """An audio file and its channel: "mix" for the average of all, or a number from 0."""

    path: str | os.PathLike[str]
    channel: int | str = "mix"


class FileRecognizer(Protocol):
    """The part of a recognizer's interface that :func:`transcribe_files` uses."""

    fbank: Fbank
    tokenizer: Tokenizer

    @property
    def frame_s(self) -> float:
        """Duration of an encoder frame, seconds."""

    @property
    def min_samples(self) -> int:
        """The fewest samples of a waveform."""

    def check_length(self, waveform: Tensor, name: str) -> None:
        """Raise a ValueError if a waveform is shorter."""

    def recognize(self, waveforms: Sequence[Tensor]) -> list[Hypothesis]:
        """Return the symbols of each waveform (samples,)."""


def channels_of(path: str | os.PathLike[str]) -> list[int]:
    """Return the numbers of the channels of an audio file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not audio.
    """
    with open_audio(path) as file:
        return list(range(file.channels))


def transcribe_files(
    recognizer: FileRecognizer,
    sources: Iterable[AudioSource],
    *,
    cut: str | None = None,
    window_s: float = WINDOW_S,
    overlap_s: float = OVERLAP_S,
    batch_size: int = BATCH_SIZE,
    on_progress: Callable[[AudioSource, float], None] | None = None,
) -> Iterator[tuple[AudioSource, Transcription | OSError | ValueError]]:
    """Transcribe audio files of any length in bounded memory.

    A file that is no longer than a window is recognized as a whole. A longer one is cut. ``cut``
    says where:

    - "pauses": in pauses, which silero-vad finds (the extra ``vad``). Each piece is at most a
      window long. Where speech has no pause for so long, the file is cut as with "windows".
    - "windows": into overlapping windows of equal length, whose symbols
      :func:`~transducer_toolkit.inference.joining.join_symbols` joins.

    Pieces of several files are recognized together, sorted by length, so that many short files take
    no more time than a few long ones.

    Args:
        recognizer: a trained recognizer.
        sources: files in any format that soundfile reads, of any sample rate.
        cut: "pauses" or "windows"; None means "pauses" if silero-vad is installed, else "windows",
            with a warning if a file must be cut.
        window_s: length of a window, seconds.
        overlap_s: overlap of two windows, at most half a window, seconds.
        batch_size: number of windows, or of as much audio in smaller pieces, that are recognized
            together; memory grows with it, not with the files.
        on_progress: called with a source and the number of its seconds that were transcribed so
            far.

    Yields:
        The sources in order, each with its transcription (times count from the start of the file)
        or the error that reading or recognizing it raised: a FileNotFoundError if there is no such
        file; a ValueError if it is not audio, ends too early, holds NaN or is too short for an
        encoder frame.

    Raises:
        ValueError: an option is out of range, or ``cut="pauses"`` without silero-vad.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if not 0 <= 2 * overlap_s <= window_s < float("inf") or window_s <= 0:
        raise ValueError(
            "window_s must be positive and overlap_s at most half of it, got "
            f"window_s={window_s}, overlap_s={overlap_s}"
        )
    if cut not in (None, *CUTS):
        raise ValueError(f"cut: expected 'pauses', 'windows' or None, got {cut!r}")
    if cut == "pauses" and not has_vad():
        raise ValueError(
            "cut='pauses' needs silero-vad and onnxruntime: pip install "
            "'transducer_toolkit[vad]', or take cut='windows'"
        )
    return _Transcriber(recognizer, cut, window_s, overlap_s, batch_size, on_progress).run(sources)


def transcribe_file(
    recognizer: FileRecognizer,
    path: str | os.PathLike[str],
    *,
    channel: int | str = "mix",
    cut: str | None = None,
    window_s: float = WINDOW_S,
    overlap_s: float = OVERLAP_S,
    batch_size: int = BATCH_SIZE,
    on_progress: Callable[[float], None] | None = None,
) -> Transcription:
    """Transcribe an audio file of any length in bounded memory.

    Args:
        recognizer: a trained recognizer.
        path: any format that soundfile reads, any sample rate, any number of channels.
        channel: "mix" averages the channels, a number selects one, from 0; for each channel
            separately, call :func:`transcribe_channels`.
        cut: where long files are cut, see :func:`transcribe_files`; as are the other options.
        window_s: length of a window, seconds.
        overlap_s: overlap of two windows, at most half a window, seconds.
        batch_size: number of windows that are recognized together.
        on_progress: called with the number of seconds that were transcribed so far.

    Returns:
        The words, times counted from the start of the file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not audio, ends too early or is too short for an encoder frame, it
            has no such channel or its channels cancel each other in the mix, or an option is out
            of range.
    """
    ((_, found),) = transcribe_files(
        recognizer,
        [AudioSource(path, channel)],
        cut=cut,
        window_s=window_s,
        overlap_s=overlap_s,
        batch_size=batch_size,
        on_progress=None if on_progress is None else lambda _, done_s: on_progress(done_s),
    )
    if isinstance(found, Exception):
        raise found
    return found


@dataclass
class _File:
    """A file in progress: its pieces, and their symbols as far as they are recognized."""

    source: AudioSource
    pieces: list[tuple[float, float, float]] = field(default_factory=list)  # start, overlap, end
    hypotheses: list[Hypothesis | None] = field(default_factory=list)
    error: OSError | ValueError | None = None
    is_read: bool = False

    @property
    def is_done(self) -> bool:
        return self.error is not None or (self.is_read and None not in self.hypotheses)


class _Piece(NamedTuple):
    file: _File
    number: int
    waveform: Tensor


class _Transcriber:
    """The state of :func:`transcribe_files`: pieces that wait for a batch, files that wait for
    pieces."""

    def __init__(
        self,
        recognizer: FileRecognizer,
        cut: str | None,
        window_s: float,
        overlap_s: float,
        batch_size: int,
        on_progress: Callable[[AudioSource, float], None] | None,
    ) -> None:
        self.recognizer = recognizer
        self.cut = cut or ("pauses" if has_vad() else "windows")
        self.warns = cut is None and self.cut == "windows"
        self.window_s, self.overlap_s = window_s, overlap_s
        self.batch_samples = round(batch_size * window_s * recognizer.fbank.sample_rate)
        self.on_progress = on_progress
        self.pool: list[_Piece] = []
        self.pooled = 0  # samples

    def run(
        self, sources: Iterable[AudioSource]
    ) -> Iterator[tuple[AudioSource, Transcription | OSError | ValueError]]:
        files: deque[_File] = deque()
        for source in sources:
            files.append(_File(source))
            try:
                for window in self._windows(source):
                    self._add(files[-1], window)
                    if files[-1].error is not None:
                        break
            except (OSError, ValueError) as error:
                self._give_up(files[-1], error)
            files[-1].is_read = True
            while files and files[0].is_done:
                yield self._result(files.popleft())
        self._recognize_pool()
        yield from map(self._result, files)

    def _windows(self, source: AudioSource) -> Iterator[AudioWindow]:
        fbank = self.recognizer.fbank
        if self.cut == "pauses":
            return read_at_pauses(
                source.path,
                fbank,
                max_s=self.window_s,
                overlap_s=self.overlap_s,
                channel=source.channel,
            )
        return read_windows(
            source.path,
            window_s=self.window_s,
            overlap_s=self.overlap_s,
            sample_rate=fbank.sample_rate,
            channel=source.channel,
        )

    def _add(self, file: _File, window: AudioWindow) -> None:
        if self.warns and window.start_s > 0:
            self.warns = False
            logger.warning(
                "%s is longer than %g s and cut into windows of equal length; cuts in pauses give "
                "fewer errors: pip install 'transducer_toolkit[vad]' (cut='windows' or --cut "
                "windows silences this warning)",
                os.fspath(file.source.path),
                self.window_s,
            )
        waveform = window.waveform
        end_s = window.start_s + len(waveform) / self.recognizer.fbank.sample_rate
        if window.start_s > 0:  # the end of a file may be shorter than an encoder frame
            missing = self.recognizer.min_samples - len(waveform)
            waveform = torch.nn.functional.pad(waveform, (0, max(0, missing)))
        else:
            self.recognizer.check_length(waveform, "the audio")
        self.pool.append(_Piece(file, len(file.pieces), waveform))
        self.pooled += len(waveform)
        file.pieces.append((window.start_s, window.overlap_s, end_s))
        file.hypotheses.append(None)
        if self.pooled >= POOL_BATCHES * self.batch_samples:
            self._recognize_pool()

    def _recognize_pool(self) -> None:
        """Recognize all pieces, longest first, in batches of bounded size with padding."""
        waiting = deque(sorted(self.pool, key=lambda piece: -len(piece.waveform)))
        self.pool, self.pooled = [], 0
        while waiting:
            size = max(1, self.batch_samples // len(waiting[0].waveform))
            batch = [waiting.popleft() for _ in range(min(size, len(waiting)))]
            self._recognize([piece for piece in batch if piece.file.error is None])

    def _recognize(self, batch: list[_Piece]) -> None:
        if not batch:
            return
        try:
            found = self.recognizer.recognize([piece.waveform for piece in batch])
        except ValueError as error:
            if len(batch) == 1:
                self._give_up(batch[0].file, error)
            for piece in batch[1:] and batch:  # one by one, to know which of them it is
                self._recognize([piece])
            return
        for piece, hypothesis in zip(batch, found, strict=True):
            piece.file.hypotheses[piece.number] = hypothesis
        if self.on_progress is not None:
            for file in {id(piece.file): piece.file for piece in batch}.values():
                done_s = sum(
                    end_s - start_s - overlap_s
                    for (start_s, overlap_s, end_s), hypothesis in zip(
                        file.pieces, file.hypotheses, strict=True
                    )
                    if hypothesis is not None
                )
                self.on_progress(file.source, done_s)

    def _give_up(self, file: _File, error: OSError | ValueError) -> None:
        file.error = file.error or error
        self.pool = [piece for piece in self.pool if piece.file is not file]
        self.pooled = sum(len(piece.waveform) for piece in self.pool)

    def _result(self, file: _File) -> tuple[AudioSource, Transcription | OSError | ValueError]:
        if file.error is not None:
            return file.source, file.error
        words: list[RecognizedWord] = []
        for run in self._runs(file):
            found = self._words(run)
            if words and found:
                # Between two pieces, no symbol says whether there is a space.
                spaced = not (has_no_spaces(words[-1].word[-1]) or has_no_spaces(found[0].word[0]))
                found[0] = replace(found[0], spaced=spaced)
            words += found
        duration_s = file.pieces[-1][2]
        text = joined_text(words)
        return file.source, Transcription(text, words, duration_s, file.source.channel)

    def _runs(self, file: _File) -> list[list[TimedSymbol]]:
        """Return the symbols of a file, divided where two pieces have no symbol in common."""
        frame_s = self.recognizer.frame_s
        runs: list[list[TimedSymbol]] = [[]]
        for (start_s, overlap_s, _), hypothesis in zip(file.pieces, file.hypotheses, strict=True):
            assert hypothesis is not None
            symbols = [
                TimedSymbol(token, start_s + frame * frame_s, log_prob)
                for token, frame, log_prob in zip(
                    hypothesis.tokens, hypothesis.frames, hypothesis.log_probs, strict=True
                )
            ]
            if overlap_s == 0:
                runs.append(symbols)
                continue
            # The earlier windows end with the overlap; earlier symbols are not affected.
            earlier = runs[-1]
            tail = bisect_left(earlier, start_s, key=lambda symbol: symbol.start_s)
            kept, later, is_joined = join_symbols(
                earlier[tail:],
                symbols,
                cut_s=start_s + overlap_s / 2,
                reach_s=overlap_s / 4,
                frame_s=frame_s,
                word_times=self._word_times,
            )
            earlier[tail:] = kept
            if is_joined:
                earlier += later
            else:
                runs.append(later)
        return runs

    def _words(self, symbols: Sequence[TimedSymbol]) -> list[RecognizedWord]:
        return words_at(
            [symbol.token for symbol in symbols],
            [symbol.start_s for symbol in symbols],
            [symbol.log_prob for symbol in symbols],
            self.recognizer.tokenizer,
            self.recognizer.frame_s,
        )

    def _word_times(self, symbols: Sequence[TimedSymbol]) -> list[Span]:
        return [(word.start_s, word.end_s) for word in self._words(symbols)]
