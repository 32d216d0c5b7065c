# SPDX-License-Identifier: Apache-2.0
"""Reads long audio files in overlapping windows, without holding a whole file in memory."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from transducer_toolkit.data.audio import (
    SAMPLE_RATE,
    check_all_read,
    check_channel,
    open_audio,
    resample,
    select_channel,
)
from transducer_toolkit.data.audio_length import check_length

__all__ = ["AudioWindow", "overlapping_windows", "read_windows"]


class AudioWindow(NamedTuple):
    """A part of an audio file.

    Attributes:
        start_s: its start, seconds.
        waveform: its samples, float32 ``(num_samples,)``.
        overlap_s: seconds that it shares with the window before it.
    """

    start_s: float
    waveform: Tensor
    overlap_s: float = 0.0


def read_windows(
    path: str | os.PathLike[str],
    *,
    window_s: float,
    overlap_s: float,
    sample_rate: int = SAMPLE_RATE,
    channel: int | str = "mix",
) -> Iterator[AudioWindow]:
    """Read an audio file as mono, in windows that overlap.

    Args:
        path: any format that soundfile reads.
        window_s: length of the windows, in seconds. The last one may be shorter, but is longer than
            the overlap.
        overlap_s: overlap of two windows, in seconds, at most half a window.
        sample_rate: sample rate of the windows, in Hz; each window of a file of another rate is
            resampled.
        channel: "mix" averages the channels, a number selects one, from 0.

    Yields:
        The windows in order; a file that is no longer than a window gives a single one.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not audio, ends too early, holds no samples or holds NaN or
            infinity, has no such channel, its channels cancel each other in the mix, or
            ``overlap_s`` is more than half of ``window_s``.

    Example:
        >>> windows = read_windows("talk.flac", window_s=30, overlap_s=4)  # doctest: +SKIP
        >>> [window.start_s for window in windows]  # doctest: +SKIP
        [0.0, 26.0, 52.0]
    """
    if not 0 <= 2 * overlap_s <= window_s < math.inf or window_s <= 0:
        raise ValueError(
            "window_s must be positive and overlap_s at most half of it, got "
            f"window_s={window_s}, overlap_s={overlap_s}"
        )
    check_channel(channel)
    if channel == "each":
        raise ValueError("channel: expected 'mix' or a number for windows, got 'each'")

    def read_next(num_samples: int) -> np.ndarray:
        samples = file.read(num_samples, dtype="float32", always_2d=True)
        return select_channel(path, samples, channel)

    with open_audio(path) as file:
        check_length(path)
        rate = file.samplerate
        overlap = round(overlap_s * rate)
        hop = round(window_s * rate) - overlap
        start, samples = 0, read_next(hop + overlap)
        while len(samples):
            added = read_next(hop)
            waveform = resample(torch.from_numpy(samples), rate, sample_rate)
            if not bool(waveform.isfinite().all()):
                raise ValueError(f"{os.fspath(path)} holds NaN or infinity")
            yield AudioWindow(start / rate, waveform, overlap / rate if start > 0 else 0.0)
            if not len(added):
                break
            start, samples = start + hop, np.concatenate([samples[hop:], added])
        else:
            raise ValueError(f"{os.fspath(path)} holds no samples")
        check_all_read(path, start + len(samples), file.frames)


def overlapping_windows(
    waveform: Tensor, start: int, window_s: float, overlap_s: float, sample_rate: int
) -> Iterator[AudioWindow]:
    """Divide a part of a file into windows, as :func:`read_windows` divides a file.

    Args:
        waveform: the part, float32 ``(num_samples,)``.
        start: its first sample in the file.
        window_s: length of the windows, seconds.
        overlap_s: overlap of two windows, seconds.
        sample_rate: sample rate of ``waveform``, Hz.

    Example:
        >>> windows = overlapping_windows(torch.zeros(5), 10, 3.0, 1.0, 1)
        >>> [(window.start_s, len(window.waveform), window.overlap_s) for window in windows]
        [(10.0, 3, 0.0), (12.0, 3, 1.0)]
    """
    overlap = round(overlap_s * sample_rate)
    hop = round(window_s * sample_rate) - overlap
    for first in range(0, max(1, len(waveform) - overlap), hop):
        yield AudioWindow(
            (start + first) / sample_rate,
            waveform[first : first + hop + overlap],
            overlap / sample_rate if first > 0 else 0.0,
        )
