# SPDX-License-Identifier: Apache-2.0
"""Reading audio files with soundfile."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import soundfile
import torch
from torch import Tensor

from transducer_toolkit.data.audio_length import check_length
from transducer_toolkit.data.mp3 import correct_header

__all__ = ["SAMPLE_RATE", "audio_duration_s", "open_audio", "read_audio", "resample"]

SAMPLE_RATE = 16000
MAX_SAMPLE_RATE = 1_000_000
MAX_SAMPLES = 2**53  # libsndfile reports more if a file does not announce its length
# A manifest's duration may be rounded, and players disagree about the padding of an MP3 file.
MAX_MISSING_S = 0.1
MAX_MISSING_SHARE = 0.1  # of the requested part
SKIP_SAMPLES = 1_000_000  # read at a time and discarded
MAX_CANCELED = 1e-4  # power of a mix, relative to the loudest channel: -40 dB
MIN_POWER = 1e-8  # of a channel that is not silent: -80 dB
COMPLETE = 0.99  # minimum part of the announced samples that a decoder must return


def read_audio(
    path: str | os.PathLike[str],
    *,
    offset_s: float = 0.0,
    duration_s: float | None = None,
    sample_rate: int = SAMPLE_RATE,
    channel: int | str = "mix",
) -> Tensor:
    """Read (a part of) an audio file at a given sample rate.

    Args:
        path: any format that soundfile reads.
        offset_s: start of the part, in seconds.
        duration_s: length of the part, in seconds; None reads to the end. The last 0.1 s, at most
            a tenth of the part, may be missing in the file.
        sample_rate: sample rate of the result, in Hz; a file of another rate is resampled.
        channel: "mix" averages the channels, "each" returns them all, a number selects one, from 0.

    Returns:
        float32 CPU tensor, full scale being [-1, 1]: ``(num_samples,)``, or
        ``(num_channels, num_samples)`` for "each".

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not audio or not regular, it breaks off, or it ends before the
            requested part does; the file has no such channel, or its channels cancel each other in
            the mix.

    Example:
        >>> waveform = read_audio("speech.flac", offset_s=1.0, duration_s=2.5)  # doctest: +SKIP
    """
    check_channel(channel)
    if offset_s < 0 or (duration_s is not None and duration_s <= 0):
        raise ValueError(
            "offset_s must be >= 0 and duration_s > 0 or None, got "
            f"offset_s={offset_s}, duration_s={duration_s}"
        )
    with open_audio(path) as file:
        file_rate = file.samplerate
        start = min(round(offset_s * file_rate), file.frames)
        _skip(file, start)
        count = file.frames - start if duration_s is None else round(duration_s * file_rate)
        samples = file.read(count, dtype="float32", always_2d=True)
        end = start + len(samples)
        if end >= file.frames or len(samples) < count:
            check_length(path)
            check_all_read(path, end, min(file.frames, start + count))
    if len(samples) == 0:
        raise ValueError(
            f"{os.fspath(path)} holds no samples at offset_s={offset_s}, duration_s={duration_s}"
        )
    missing_s = (count - len(samples)) / file_rate
    if duration_s is not None and missing_s > min(MAX_MISSING_S, MAX_MISSING_SHARE * duration_s):
        raise ValueError(
            f"{os.fspath(path)} ends after {end / file_rate:.2f} s, but offset_s={offset_s} and "
            f"duration_s={duration_s} ask for audio up to {offset_s + duration_s:.2f} s: correct "
            "them or the file"
        )
    chosen = torch.from_numpy(select_channel(path, samples, channel))
    return resample(chosen, file_rate, sample_rate)


def check_channel(channel: int | str) -> None:
    """Raise a ValueError unless ``channel`` is "mix", "each" or a number from 0."""
    is_number = isinstance(channel, int) and not isinstance(channel, bool) and channel >= 0
    if not is_number and channel not in ("mix", "each"):
        raise ValueError(f"channel: expected 'mix', 'each' or a number from 0, got {channel!r}")


def select_channel(
    path: str | os.PathLike[str], samples: np.ndarray, channel: int | str
) -> np.ndarray:
    """Return one channel of a file, the mix of its channels, or each of them.

    Args:
        path: the file, for messages.
        samples: float32 ``(num_samples, num_channels)``.
        channel: "mix", "each" or a number, see :func:`read_audio`.

    Returns:
        float32 ``(num_samples,)``, or ``(num_channels, num_samples)`` for "each".

    Raises:
        ValueError: there is no such channel, or the channels cancel each other in the mix.
    """
    num_channels = samples.shape[1]
    if channel == "each":
        return np.ascontiguousarray(samples.T)
    if isinstance(channel, int):
        if channel >= num_channels:
            raise ValueError(
                f"{os.fspath(path)} has {num_channels} channels, numbered from 0: there is no "
                f"channel={channel}"
            )
        return np.ascontiguousarray(samples[:, channel])
    if num_channels == 1:
        return np.ascontiguousarray(samples[:, 0])
    mix = samples.mean(axis=1, dtype=np.float32)
    loudest = max((_power(samples[:, k]) for k in range(num_channels)), default=0.0)
    if loudest > MIN_POWER and _power(mix) < MAX_CANCELED * loudest:
        raise ValueError(
            f"{os.fspath(path)}: its channels cancel each other in the mix (opposite phase); "
            "select one, for example with channel=0"
        )
    return mix


def _power(samples: np.ndarray) -> float:
    return float(np.mean(np.square(samples, dtype=np.float64))) if len(samples) else 0.0


class _SequentialFile(soundfile.SoundFile):
    """A file that is only read forward, without a seek.

    After a seek in an MP3 file, libsndfile 1.2.2 returns wrong samples for some signals, and
    soundfile seeks after each read of a seekable file.
    """

    def seekable(self) -> bool:
        return False


@contextmanager
def open_audio(path: str | os.PathLike[str]) -> Iterator[soundfile.SoundFile]:
    """Open an audio file, with the true length of an MP3 file whose header announces less.

    Args:
        path: any format that soundfile reads.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not audio or not regular, or an MP3 file that breaks off; also
            replaces the decoder's errors within the ``with`` block.
    """
    check_audio_path(path)
    try:
        with soundfile.SoundFile(_native(path)) as file:
            if file.frames >= MAX_SAMPLES:
                raise ValueError(
                    f"{os.fspath(path)} does not announce its length: convert it to a WAV file"
                )
            if file.format != "MP3":
                yield file
                return
            num_samples = file.frames
        content = correct_header(path, num_samples=num_samples)
        with _SequentialFile(_native(path) if content is None else io.BytesIO(content)) as file:
            yield file
    except (soundfile.LibsndfileError, TypeError) as error:  # TypeError: headerless, such as .raw
        raise ValueError(f"{os.fspath(path)} cannot be read as audio: {error}") from error


def _native(path: str | os.PathLike[str]) -> str | bytes:
    """Return a path for soundfile, which cannot encode the name of a file that is not UTF-8."""
    text = os.fspath(path)
    try:
        text.encode()
    except UnicodeEncodeError:
        return os.fsencode(text)
    return text


def audio_duration_s(path: str | os.PathLike[str]) -> float:
    """Return the duration of a complete audio file, in seconds.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not audio, breaks off, holds no samples or does not announce its
            length.

    Example:
        >>> audio_duration_s("speech.flac")  # doctest: +SKIP
        3.25
    """
    with open_audio(path) as file:
        num_samples, rate = file.frames, file.samplerate
    check_length(path)
    if num_samples == 0:
        raise ValueError(f"{os.fspath(path)} holds no samples")
    return num_samples / rate


def _skip(file: soundfile.SoundFile, num_samples: int) -> None:
    """Move from the start of a file to a sample."""
    if file.seekable():
        file.seek(num_samples)
        return
    while num_samples > 0:
        num_read = len(file.read(min(num_samples, SKIP_SAMPLES), dtype="float32"))
        if num_read == 0:
            return
        num_samples -= num_read


def check_all_read(path: str | os.PathLike[str], num_read: int, num_announced: int) -> None:
    """Raise a ValueError if a decoder returned fewer samples than the file announces."""
    if num_read < COMPLETE * num_announced:
        raise ValueError(
            f"{os.fspath(path)} breaks off: it has {num_read} of {num_announced} samples"
        )


def resample(waveform: Tensor, from_rate: int, to_rate: int) -> Tensor:
    """Resample audio with soxr, in its high quality; equal rates return the input.

    Args:
        waveform: float32 or float64 tensor ``(num_samples,)`` or ``(channels, num_samples)``;
            resampled on the CPU.
        from_rate: sample rate of ``waveform``, Hz. Only the ratio of the rates matters.
        to_rate: sample rate of the result, Hz.

    Returns:
        Tensor ``(..., ceil(num_samples * to_rate / from_rate))`` of the same dtype and device.

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
    import soxr

    # soxr has the channels last. Its build for Python 3.10 refuses one sample with other strides.
    samples = np.array(waveform.cpu().numpy().T, order="C")
    resampled = torch.from_numpy(soxr.resample(samples, from_rate, to_rate).T)
    num_samples = -(-waveform.size(-1) * to_rate // from_rate)  # soxr rounds to the nearest number
    missing = num_samples - resampled.size(-1)
    resampled = torch.nn.functional.pad(resampled, (0, missing))  # or cut, if negative
    return resampled.contiguous().to(waveform.device)


def check_audio_path(path: str | os.PathLike[str]) -> None:
    """Raise a FileNotFoundError or ValueError unless ``path`` is a regular file.

    A pipe is refused because opening one waits for a writer.
    """
    if not os.path.exists(path):
        raise FileNotFoundError(f"no audio file at {os.fspath(path)}")
    if not os.path.isfile(path):
        raise ValueError(f"{os.fspath(path)} cannot be read as audio: it is no regular file")
