# SPDX-License-Identifier: Apache-2.0
"""Log-mel features, the same as those of the deployment client sherpa-onnx."""

from __future__ import annotations

import torch
from torch import Tensor

from transducer_toolkit.data.audio import SAMPLE_RATE

__all__ = ["FRAME_SHIFT_MS", "Fbank", "StreamingFbank"]

FRAME_SHIFT_MS = 10.0
FRAME_LENGTH_MS = 25.0
LOWEST_HZ = 20.0
HIGHEST_HZ = SAMPLE_RATE / 2 - 400.0
PREEMPHASIS = 0.97
MAX_MEL_BINS = 512  # twice the bins of the Fourier transform


class Fbank:
    """Computes Kaldi log-mel filterbank features with sherpa-onnx's settings.

    16 kHz, 25 ms frames every 10 ms, 20 Hz to 7600 Hz (``high_freq = -400``), no dither, frames
    centered by reflection at both ends (``snip_edges = False``), samples in [-1, 1] and no mean
    normalization. The encoder normalizes, so an exported encoder is complete.

    Args:
        num_mel_bins: number of mel bins, F.

    Raises:
        ValueError: ``num_mel_bins`` is not in [1, 512].

    Example:
        >>> fbank = Fbank()
        >>> fbank(torch.rand(16000) - 0.5).shape, fbank.num_frames(16000)
        (torch.Size([100, 80]), 100)

    Source: Kaldi's ``compute-fbank-feats``. The numbers equal those of
    ``torchaudio.compliance.kaldi.fbank``, which takes twice the time because it builds the mel
    filters for each utterance. Inference does not need torchaudio.
    """

    sample_rate = SAMPLE_RATE

    def __init__(self, *, num_mel_bins: int = 80) -> None:
        if num_mel_bins < 1:
            raise ValueError(f"num_mel_bins must be positive, got {num_mel_bins}")
        if num_mel_bins > MAX_MEL_BINS:
            raise ValueError(f"num_mel_bins must be at most {MAX_MEL_BINS}, got {num_mel_bins}")
        self.num_mel_bins = num_mel_bins
        self._shift = round(SAMPLE_RATE * FRAME_SHIFT_MS / 1000)
        self._length = round(SAMPLE_RATE * FRAME_LENGTH_MS / 1000)
        self._fft_length = 1 << (self._length - 1).bit_length()
        # Povey's window: a Hann window to the power of 0.85.
        self._window = torch.hann_window(self._length, periodic=False).pow(0.85)
        self.mel_weights = _mel_weights(num_mel_bins, self._fft_length)

    def num_frames(self, num_samples: int) -> int:
        """Return T_in of a 16 kHz waveform, 0 if it is too short for a frame."""
        if num_samples < self._length // 2:
            return 0
        return (num_samples + self._shift // 2) // self._shift

    def __call__(self, waveform: Tensor) -> Tensor:
        """Compute the features of one waveform.

        Args:
            waveform: float32 ``(num_samples,)``, 16 kHz, in [-1, 1].

        Returns:
            float32 ``(T_in, num_mel_bins)`` with ``T_in = num_frames(num_samples)``.

        Raises:
            ValueError: not one-dimensional, or shorter than half a frame (12.5 ms).
            TypeError: not float32.
        """
        if waveform.dim() != 1:
            raise ValueError(f"waveform must be (num_samples,), got {tuple(waveform.shape)}")
        if waveform.dtype != torch.float32:
            raise TypeError(f"waveform must be float32, got {waveform.dtype}")
        if len(waveform) < self._length // 2:
            raise ValueError(
                f"waveform must have at least {self._length // 2} samples, got {len(waveform)}"
            )
        # Frames are centered on multiples of the shift: the waveform continues by reflection.
        overhang = (self._length - self._shift) // 2
        reflected = waveform.flip(0)
        extended = torch.cat([reflected[-overhang:], waveform, reflected])
        return self._log_mel(extended, self.num_frames(len(waveform)))

    def _log_mel(self, samples: Tensor, num_frames: int) -> Tensor:
        """Features of the first ``num_frames`` frames of samples that are already extended."""
        frames = samples.unfold(0, self._length, self._shift)[:num_frames]
        frames = frames - frames.mean(dim=1, keepdim=True)
        previous = torch.cat([frames[:, :1], frames[:, :-1]], dim=1)
        frames = (frames - PREEMPHASIS * previous) * self._window
        power = torch.fft.rfft(frames, n=self._fft_length).abs().square()  # (T_in, bins)
        return (power @ self.mel_weights).clamp_min(torch.finfo(torch.float32).eps).log()


class StreamingFbank:
    """Computes the features of one waveform piece by piece, each frame as early as possible.

    All frames together equal ``fbank`` of the whole waveform up to rounding, for any cut into
    pieces. At most two frames of samples are kept.

    Args:
        fbank: the features to compute.

    Example:
        >>> stream = StreamingFbank(Fbank())
        >>> first, second = (torch.rand(16000) - 0.5).split(9000)
        >>> stream.accept(first).shape, stream.accept(second).shape, stream.finish().shape
        (torch.Size([55, 80]), torch.Size([44, 80]), torch.Size([1, 80]))
    """

    _samples: Tensor  # from the start of the next frame on
    _num_samples: int
    _num_frames: int

    def __init__(self, fbank: Fbank) -> None:
        self.fbank = fbank
        self._reset()

    def accept(self, samples: Tensor) -> Tensor:
        """Take the next samples.

        Args:
            samples: float32 ``(n,)``, n >= 0, 16 kHz, in [-1, 1].

        Returns:
            float32 ``(T, num_mel_bins)``, the frames that are now known, T >= 0.

        Raises:
            ValueError: not one-dimensional.
            TypeError: not float32.
        """
        if samples.dim() != 1:
            raise ValueError(f"samples must be (n,), got {tuple(samples.shape)}")
        if samples.dtype != torch.float32:
            raise TypeError(f"samples must be float32, got {samples.dtype}")
        length, shift = self.fbank._length, self.fbank._shift
        overhang = (length - shift) // 2
        self._num_samples += len(samples)
        self._samples = torch.cat([self._samples, samples])
        if self._num_frames == 0:
            if self._num_samples < length - overhang:
                return self._no_frames()
            self._samples = torch.cat([self._samples[:overhang].flip(0), self._samples])
        num_frames = max(0, (len(self._samples) - length) // shift + 1)
        if num_frames == 0:
            return self._no_frames()
        features = self.fbank._log_mel(self._samples, num_frames)
        self._num_frames += num_frames
        self._samples = self._samples[num_frames * shift :].clone()
        return features

    def finish(self) -> Tensor:
        """End the waveform; the next samples begin another.

        Returns:
            float32 ``(T, num_mel_bins)``, the last frames; T is 0 if the waveform is too short.
        """
        num_frames = self.fbank.num_frames(self._num_samples) - self._num_frames
        if num_frames <= 0:
            features = self._no_frames()
        elif self._num_frames == 0:
            features = self.fbank(self._samples)
        else:  # the samples that the reflection reaches were kept
            extended = torch.cat([self._samples, self._samples.flip(0)])
            features = self.fbank._log_mel(extended, num_frames)
        self._reset()
        return features

    def _reset(self) -> None:
        self._samples = torch.empty(0)
        self._num_samples = self._num_frames = 0

    def _no_frames(self) -> Tensor:
        return torch.empty(0, self.fbank.num_mel_bins)


def _mel(frequency_hz: Tensor) -> Tensor:
    return 1127.0 * torch.log1p(frequency_hz / 700.0)


def _mel_weights(num_mel_bins: int, fft_length: int) -> Tensor:
    """Overlapping triangles on the mel scale: float32 ``(fft_length // 2 + 1, num_mel_bins)``."""
    edges = torch.tensor([LOWEST_HZ, HIGHEST_HZ], dtype=torch.float64)
    lowest, highest = _mel(edges).tolist()
    width = (highest - lowest) / (num_mel_bins + 1)
    left = lowest + width * torch.arange(num_mel_bins, dtype=torch.float64)
    frequencies = torch.arange(fft_length // 2 + 1) * (SAMPLE_RATE / fft_length)
    # Kaldi leaves out the bin at half the sample rate; it lies above HIGHEST_HZ.
    mel = _mel(frequencies.double())[:, None]
    rising, falling = (mel - left) / width, (left + 2 * width - mel) / width
    return torch.minimum(rising, falling).clamp_min(0.0).float()
