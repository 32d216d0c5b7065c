# SPDX-License-Identifier: Apache-2.0
"""Reading audio files with soundfile."""

from __future__ import annotations

import os
from fractions import Fraction

import numpy as np
import soundfile
import torch
from torch import Tensor

__all__ = ["SAMPLE_RATE", "read_audio", "resample"]

SAMPLE_RATE = 16000
MAX_SAMPLE_RATE = 1_000_000
# Bound on numerator and denominator of a ratio of rates: memory grows with their product.
MAX_RATIO_TERM = 1000


def read_audio(
    path: str | os.PathLike[str],
    *,
    offset_s: float = 0.0,
    duration_s: float | None = None,
    sample_rate: int = SAMPLE_RATE,
) -> Tensor:
    """Read (a part of) an audio file as mono at a given sample rate.

    Args:
        path: any format that soundfile reads; several channels are averaged.
        offset_s: start of the part, in seconds.
        duration_s: length of the part, in seconds; None reads to the end. A part that reaches
            beyond the end of the file is cut there.
        sample_rate: sample rate of the result, in Hz; a file of another rate is resampled.

    Returns:
        float32 CPU tensor ``(num_samples,)``, full scale being [-1, 1].

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not audio or not regular, or the requested part holds no samples.

    Example:
        >>> waveform = read_audio("speech.flac", offset_s=1.0, duration_s=2.5)  # doctest: +SKIP
    """
    check_audio_path(path)
    if offset_s < 0 or (duration_s is not None and duration_s <= 0):
        raise ValueError(
            "offset_s must be >= 0 and duration_s > 0 or None, got "
            f"offset_s={offset_s}, duration_s={duration_s}"
        )
    try:
        with soundfile.SoundFile(path) as file:
            file_rate = file.samplerate
            file.seek(min(round(offset_s * file_rate), file.frames))
            count = -1 if duration_s is None else round(duration_s * file_rate)
            samples = file.read(count, dtype="float32", always_2d=True)
    except (soundfile.LibsndfileError, TypeError) as error:  # TypeError: headerless, such as .raw
        raise ValueError(f"{os.fspath(path)} cannot be read as audio: {error}") from error
    if len(samples) == 0:
        raise ValueError(
            f"{os.fspath(path)} holds no samples at offset_s={offset_s}, duration_s={duration_s}"
        )
    mono = samples[:, 0] if samples.shape[1] == 1 else samples.mean(axis=1, dtype=np.float32)
    return resample(torch.from_numpy(np.ascontiguousarray(mono)), file_rate, sample_rate)


def resample(waveform: Tensor, from_rate: int, to_rate: int) -> Tensor:
    """Resample ``(num_samples,)`` by windowed-sinc interpolation; equal rates return the input.

    A ratio of large numbers, such as 44101 to 16000, is replaced by the nearest ratio of numbers up
    to 1000, which is at most 0.05 % off: the exact ratio would take gigabytes.

    Args:
        waveform: float tensor ``(num_samples,)``.
        from_rate: sample rate of ``waveform``, Hz. Only the ratio of the rates matters.
        to_rate: sample rate of the result, Hz.

    Returns:
        Tensor ``(ceil(num_samples * to_rate / from_rate),)`` of the same dtype and device.

    Raises:
        ValueError: a rate is not in [1, 1,000,000].

    Example:
        >>> resample(torch.zeros(800), 8000, 16000).shape
        torch.Size([1600])
    """
    if from_rate == to_rate:
        return waveform
    for name, rate in (("from_rate", from_rate), ("to_rate", to_rate)):
        if not 1 <= rate <= MAX_SAMPLE_RATE:
            raise ValueError(
                f"{name}: expected a sample rate of 1 to {MAX_SAMPLE_RATE} Hz, got {rate}"
            )
    from torchaudio.functional import resample as torchaudio_resample  # slow import, seldom used

    ratio = Fraction(from_rate, to_rate)
    if ratio.numerator * ratio.denominator > MAX_RATIO_TERM**2:
        below_1 = min(ratio, 1 / ratio).limit_denominator(MAX_RATIO_TERM)
        ratio = below_1 if ratio < 1 else 1 / below_1
    return torchaudio_resample(waveform, ratio.numerator, ratio.denominator)


def check_audio_path(path: str | os.PathLike[str]) -> None:
    """Raise a FileNotFoundError or ValueError unless ``path`` is a regular file.

    A pipe is refused because opening one waits for a writer.
    """
    if not os.path.exists(path):
        raise FileNotFoundError(f"no audio file at {os.fspath(path)}")
    if not os.path.isfile(path):
        raise ValueError(f"{os.fspath(path)} cannot be read as audio: it is no regular file")
