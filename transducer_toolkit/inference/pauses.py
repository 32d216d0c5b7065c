# SPDX-License-Identifier: Apache-2.0
"""Cuts long audio at pauses, which the voice-activity detector silero-vad finds."""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from transducer_toolkit.data.features import FRAME_SHIFT_MS, Fbank
from transducer_toolkit.data.windows import AudioWindow, overlapping_windows, read_windows

__all__ = ["VAD_PACKAGES", "choose_cuts", "has_vad", "read_at_pauses"]

VAD_PACKAGES = ("silero_vad", "onnxruntime")
VAD_FRAME_SAMPLES = 512  # of 16 kHz audio
IS_SPEECH = 0.5  # minimum probability of speech
BLOCK_S = 300.0  # read and cut at a time, or four times the longest piece
MAX_PAUSE_FRAMES = 100  # a longer pause may be cut several times
REACH_FRAMES = 4  # the quietest frame may lie this far outside of a pause
MIN_PIECE_FRAMES = 5
# What a cut must reduce: the sum over frames and mel bins of the squared distances from the mean of
# the piece, in units of the bin's variance. Costs between 600 and 2000 gave similar error rates.
COST_IN_PAUSE = 1000.0
COST_IN_SPEECH = 4000.0
QUIET_FRAMES = 10  # a quiet moment is the quietest frame so far around


def has_vad() -> bool:
    """Return whether silero-vad and onnxruntime are installed."""
    return all(importlib.util.find_spec(name) is not None for name in VAD_PACKAGES)


def read_at_pauses(
    path: str | os.PathLike[str],
    fbank: Fbank,
    *,
    max_s: float,
    overlap_s: float,
    channel: int | str = "mix",
) -> Iterator[AudioWindow]:
    """Read an audio file in pieces that begin and end in pauses.

    Of the pauses, those are chosen at which the sound changes, such as another speaker or another
    microphone: a model whose encoder subtracts the mean of its input then sees inputs like those
    that it was trained on. Where the sound changes much without a pause, it is cut at a quiet
    moment. See :func:`choose_cuts`.

    Args:
        path: any format that soundfile reads.
        fbank: features, which tell how much the sound changes.
        max_s: length of the longest piece, seconds. Where speech has no pause for so long, the
            pieces are windows of this length.
        overlap_s: overlap of such windows.
        channel: "mix" averages the channels, a number selects one, from 0.

    Yields:
        The pieces in order; a file that is no longer than ``max_s`` gives a single one.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: as for :func:`~transducer_toolkit.data.windows.read_windows`.
    """
    rate = fbank.sample_rate
    block_s = max(BLOCK_S, 4 * max_s)
    start, rest = 0, torch.zeros(0)
    blocks = read_windows(path, window_s=block_s, overlap_s=0.0, sample_rate=rate, channel=channel)
    for block in blocks:
        waveform = torch.cat([rest, block.waveform])
        if len(waveform) <= max_s * rate:
            rest = waveform
            continue
        pieces = waveform.tensor_split(_find_cuts(waveform, fbank, max_s))
        # The next block may continue the last piece.
        for piece in pieces[:-1]:
            yield from overlapping_windows(piece, start, max_s, overlap_s, rate)
            start += len(piece)
        rest = pieces[-1]
    yield from overlapping_windows(rest, start, max_s, overlap_s, rate)


def _find_cuts(waveform: Tensor, fbank: Fbank, max_s: float) -> list[int]:
    """Return the samples at which a waveform is cut."""
    frame_s = FRAME_SHIFT_MS / 1000
    features = fbank(waveform).double().numpy()
    levels = np.convolve(features.mean(axis=1), np.ones(3) / 3, mode="same")
    around = np.lib.stride_tricks.sliding_window_view(levels, 2 * QUIET_FRAMES + 1)
    is_quietest = around[:, QUIET_FRAMES] == around.min(axis=1)
    costs = {int(k) + QUIET_FRAMES: COST_IN_SPEECH for k in np.flatnonzero(is_quietest)}
    for start, end in _pauses(_speech_probabilities(waveform.numpy())):
        scale = VAD_FRAME_SAMPLES / fbank.sample_rate / frame_s
        first = max(0, int(start * scale) - REACH_FRAMES)
        last = min(len(levels), int(end * scale) + REACH_FRAMES)
        for part in range(first, last, MAX_PAUSE_FRAMES):
            quiet = levels[part : min(last, part + MAX_PAUSE_FRAMES)]
            costs[part + int(np.argmin(quiet))] = COST_IN_PAUSE
    cuts = choose_cuts(features, costs, max_frames=int(max_s / frame_s))
    return [round(cut * frame_s * fbank.sample_rate) for cut in cuts]


def _speech_probabilities(samples: np.ndarray) -> np.ndarray:
    """Return the probability of speech in each 32 ms of 16 kHz audio."""
    return _vad().audio_forward(samples)


@functools.cache
def _vad() -> Any:
    threads = torch.get_num_threads()
    try:
        from silero_vad import load_silero_vad

        return load_silero_vad(sequence=True)
    finally:
        torch.set_num_threads(threads)  # silero-vad sets one thread when it is imported


def _pauses(speech: np.ndarray) -> list[tuple[int, int]]:
    """Return start and end of the runs without speech, in frames of the detector.

    Example:
        >>> _pauses(np.array([0.1, 0.9, 0.8, 0.2, 0.3]))
        [(0, 1), (3, 5)]
    """
    is_quiet = np.concatenate([[False], speech < IS_SPEECH, [False]])
    edges = np.flatnonzero(is_quiet[1:] != is_quiet[:-1])
    return [(int(start), int(end)) for start, end in edges.reshape(-1, 2)]


def choose_cuts(features: np.ndarray, costs: Mapping[int, float], *, max_frames: int) -> list[int]:
    """Choose the cuts that divide features into pieces of similar sound.

    The choice minimizes the sum over all frames of the squared distance from the mean of their
    piece, plus the costs of the cuts. Each mel bin counts in units of its standard deviation. No
    piece is longer than ``max_frames``, unless no cut is possible for so long.

    Args:
        features: log-mel features, (T, F) float64.
        costs: the cost of a cut, by frame where a cut may be.
        max_frames: length of the longest piece.

    Returns:
        The chosen frames, in order.

    Example:
        >>> features = np.repeat([[0.0], [9.0]], 500, axis=0) + np.zeros((1, 80))
        >>> choose_cuts(features, {200: 1000.0, 500: 1000.0, 800: 1000.0}, max_frames=2000)
        [500]

    Source: Jackson et al., "An algorithm for optimal partitioning of data on an interval" (2005).
    """
    num_frames = len(features)
    places = [0]
    for frame in sorted(costs):
        if places[-1] > 0 and frame - places[-1] < MIN_PIECE_FRAMES:
            if costs[frame] < costs[places[-1]]:  # of two that are close, the cheaper one
                places[-1] = frame
        elif MIN_PIECE_FRAMES <= frame <= num_frames - MIN_PIECE_FRAMES:
            places.append(frame)
    places.append(num_frames)
    scaled = (features - features.mean(axis=0)) / features.std(axis=0).clip(min=1e-3)
    sums = np.concatenate([np.zeros((1, scaled.shape[1])), scaled.cumsum(axis=0)])[places]
    squares = np.concatenate([[0.0], (scaled**2).sum(axis=1).cumsum()])[places]
    ends = np.array(places)
    best, before = np.zeros(len(places)), np.zeros(len(places), dtype=int)
    for end in range(1, len(places)):
        first = min(int(np.searchsorted(ends, ends[end] - max_frames)), end - 1)
        lengths = ends[end] - ends[first:end]
        sum_ = sums[end] - sums[first:end]
        scatter = squares[end] - squares[first:end] - (sum_**2).sum(axis=1) / lengths
        totals = best[first:end] + scatter + costs.get(places[end], 0.0)
        before[end] = first + int(np.argmin(totals))
        best[end] = totals.min()
    cuts, place = [], int(before[-1])
    while place > 0:
        cuts.append(places[place])
        place = int(before[place])
    return cuts[::-1]
