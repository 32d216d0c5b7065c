# SPDX-License-Identifier: Apache-2.0
"""Augmentation of waveforms and features, with a random generator of the caller."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from transducer_toolkit.data.audio import SAMPLE_RATE, resample
from transducer_toolkit.ops.checks import check_at_least, check_number, check_probability

__all__ = ["SpecAugment", "WaveformPerturbation"]

LOWEST_HZ = 50.0  # the spectral shapes are flat below
TELEPHONE_CUTOFF_HZ = (3200.0, 4000.0)
EQ_KNOTS_HZ = (60.0, 250.0, 1000.0, 3000.0, 8000.0)
SPEED_STEP = 0.01  # speeds are multiples of this: few, small resampling kernels


class WaveformPerturbation:
    """Applies random speed, equalization, noise, telephone band and gain, in this order.

    Args:
        speed: speeds are drawn from [1 - speed, 1 + speed] in steps of 0.01; pitch and tempo change
            together, and the length becomes ``num_samples / speed``. 0 is off.
        eq_db: gains of the equalizer at five frequencies are drawn from [-eq_db, eq_db]. 0 is off.
        noise_snr_db: range of the signal-to-noise ratio, dB; the noise has a random spectral slope
            between white (0) and brown (-6 dB an octave). None is off.
        noise_probability: probability that noise is added.
        telephone_probability: probability that nothing is left above a cutoff drawn from 3.2 to
            4 kHz, as in a recording made at 8 kHz.
        gain_db: range of the level change, dB, applied last; a waveform that would then exceed
            full scale is scaled down to it, never clipped.

    Raises:
        TypeError: an option is no number.
        ValueError: an option is out of range.

    Example:
        >>> perturb = WaveformPerturbation(speed=0.1, gain_db=(-6.0, 0.0))
        >>> perturb(torch.ones(16000), np.random.default_rng(0)).dtype
        torch.float32
    """

    def __init__(
        self,
        *,
        speed: float = 0.0,
        eq_db: float = 0.0,
        noise_snr_db: tuple[float, float] | None = None,
        noise_probability: float = 1.0,
        telephone_probability: float = 0.0,
        gain_db: tuple[float, float] = (0.0, 0.0),
    ) -> None:
        check_number(speed, "speed")
        if not 0 <= speed <= 0.5:
            raise ValueError(f"speed must lie in [0, 0.5], got {speed}")
        check_number(eq_db, "eq_db")
        if not 0 <= eq_db < math.inf:
            raise ValueError(f"eq_db must be finite and not negative, got {eq_db}")
        for name, probability in (
            ("noise_probability", noise_probability),
            ("telephone_probability", telephone_probability),
        ):
            check_number(probability, name)
            if not 0 <= probability <= 1:
                raise ValueError(f"{name} must lie in [0, 1], got {probability}")
        for name, bounds in (("noise_snr_db", noise_snr_db), ("gain_db", gain_db)):
            if bounds is not None and (len(bounds) != 2 or bounds[0] > bounds[1]):
                raise ValueError(f"{name} must be (lowest, highest), got {bounds}")
        self.max_speed = 1.0 + speed
        self.speed = speed
        self.eq_db = eq_db
        self.noise_snr_db = noise_snr_db
        self.noise_probability = noise_probability
        self.telephone_probability = telephone_probability
        self.gain_db = gain_db

    def draw_speed(self, rng: np.random.Generator) -> float:
        """Draw a speed, for callers that apply it together with another resampling."""
        steps = int(self.speed / SPEED_STEP + 0.5)
        return 1.0 + SPEED_STEP * int(rng.integers(-steps, steps + 1))

    def __call__(self, waveform: Tensor, rng: np.random.Generator) -> Tensor:
        """Perturb a 16 kHz waveform.

        Args:
            waveform: float32 CPU tensor ``(num_samples,)``.
            rng: source of all randomness; the same state gives the same result.

        Returns:
            float32 tensor ``(num_samples / speed,)`` in [-1, 1].
        """
        if self.speed > 0:
            # To play faster by `speed`, take the rate as higher by it and resample to the nominal.
            percent = round(self.draw_speed(rng) / SPEED_STEP)
            waveform = resample(waveform, percent, round(1 / SPEED_STEP))
        return self.color(waveform, rng)

    def color(self, waveform: Tensor, rng: np.random.Generator) -> Tensor:
        """Apply everything but the speed; the length does not change."""
        eq_knots_db = rng.uniform(-self.eq_db, self.eq_db, len(EQ_KNOTS_HZ))
        snr_db = None
        if self.noise_snr_db is not None and rng.random() < self.noise_probability:
            snr_db = rng.uniform(self.noise_snr_db[0], self.noise_snr_db[1])
        cutoff_hz = None
        if self.telephone_probability > 0 and rng.random() < self.telephone_probability:
            cutoff_hz = rng.uniform(*TELEPHONE_CUTOFF_HZ)
        if self.eq_db > 0 or snr_db is not None or cutoff_hz is not None:
            num_samples, fft_length = len(waveform), _fft_length(len(waveform))
            spectrum = torch.fft.rfft(waveform, n=fft_length)
            if self.eq_db > 0:
                spectrum *= _eq_gain(eq_knots_db, fft_length)
            if snr_db is not None:
                # Parseval: the sum over half the bins is that of |x|^2 up to a common factor; the
                # noise spreads over the padding too, the signal over its own samples only.
                signal_power = _energy(spectrum) / num_samples
                noise = _noise_spectrum(fft_length, rng)
                noise_power = _energy(noise) / fft_length
                ratio = signal_power / noise_power * 10 ** (-snr_db / 10)
                spectrum += noise * ratio.sqrt()
            if cutoff_hz is not None:
                spectrum *= _low_pass_gain(cutoff_hz, fft_length)
            waveform = torch.fft.irfft(spectrum, n=fft_length)[:num_samples]
        gain = 10 ** (rng.uniform(self.gain_db[0], self.gain_db[1]) / 20)
        peak = float(waveform.abs().max()) * gain
        return waveform * (gain / max(peak, 1.0))


def _energy(spectrum: Tensor) -> Tensor:
    return torch.view_as_real(spectrum).square().sum()


def _fft_length(num_samples: int) -> int:
    # A power of two is fast for every length; the padding also keeps the filter's tail from
    # wrapping round onto the start.
    return 1 << (num_samples + SAMPLE_RATE // 50).bit_length()


@lru_cache(maxsize=16)  # one entry per power of two
def _log_frequencies(fft_length: int) -> np.ndarray:
    frequencies = np.fft.rfftfreq(fft_length, 1 / SAMPLE_RATE)
    return np.log(np.maximum(frequencies, LOWEST_HZ)).astype(np.float32)


def _eq_gain(knots_db: np.ndarray, fft_length: int) -> Tensor:
    """Amplitude per bin; the decibels are interpolated over the logarithm of the frequency."""
    gain_db = np.interp(_log_frequencies(fft_length), np.log(EQ_KNOTS_HZ), knots_db)
    return torch.exp(torch.from_numpy(gain_db.astype(np.float32)) * (math.log(10) / 20))


def _low_pass_gain(cutoff_hz: float, fft_length: int) -> Tensor:
    """1 up to 95 % of the cutoff, 0 from the cutoff on, straight in between."""
    frequencies_hz = torch.arange(fft_length // 2 + 1) * (SAMPLE_RATE / fft_length)
    return ((cutoff_hz - frequencies_hz) / (0.05 * cutoff_hz)).clamp(0.0, 1.0)


def _noise_spectrum(fft_length: int, rng: np.random.Generator) -> Tensor:
    """Complex Gaussian noise whose amplitude falls by a random power of the frequency."""
    exponent = float(rng.uniform(-1.0, 0.0))  # brown to white
    amplitude = torch.exp(torch.from_numpy(_log_frequencies(fft_length)) * exponent)
    gaussian = rng.standard_normal((fft_length // 2 + 1, 2), dtype=np.float32)
    return torch.view_as_complex(torch.from_numpy(gaussian)) * amplitude


class SpecAugment:
    """Warps the mel axis, then masks random bands of bins and spans of frames with the mean.

    Args:
        max_freq_warp: the mel axis is stretched by a factor drawn from ``1 +- max_freq_warp``, as a
            shorter or longer vocal tract would; 0 is off.
        num_freq_masks: number of frequency masks.
        max_freq_width: a frequency mask covers 0 to this many bins.
        num_time_masks: number of time masks.
        max_time_width: a time mask covers 0 to this many frames (10 ms each).
        max_time_fraction: a time mask covers at most this fraction of the utterance.

    Raises:
        TypeError: an option is no number, or a number of frames, bins or masks is no integer.
        ValueError: an option is negative, or the fraction is above 1.

    Example:
        >>> masked = SpecAugment()(torch.randn(100, 80), np.random.default_rng(0))

    Source: Park et al., "SpecAugment" (2019), without time warping; for the mel axis, Jaitly and
    Hinton, "Vocal tract length perturbation" (2013).
    """

    def __init__(
        self,
        *,
        max_freq_warp: float = 0.0,
        num_freq_masks: int = 2,
        max_freq_width: int = 15,
        num_time_masks: int = 2,
        max_time_width: int = 20,
        max_time_fraction: float = 0.1,
    ) -> None:
        check_at_least(0, num_freq_masks=num_freq_masks, max_freq_width=max_freq_width)
        check_at_least(0, num_time_masks=num_time_masks, max_time_width=max_time_width)
        check_probability(max_freq_warp, "max_freq_warp")
        check_probability(max_time_fraction, "max_time_fraction")
        self.max_freq_warp = max_freq_warp
        self.num_freq_masks = num_freq_masks
        self.max_freq_width = max_freq_width
        self.num_time_masks = num_time_masks
        self.max_time_width = max_time_width
        self.max_time_fraction = max_time_fraction

    def __call__(self, features: Tensor, rng: np.random.Generator) -> Tensor:
        """Return a warped and masked copy of ``features``.

        Args:
            features: float tensor ``(T_in, F)``.
            rng: source of all randomness.

        Returns:
            Tensor like ``features``, which is not changed.
        """
        num_frames, num_bins = features.shape
        if self.max_freq_warp > 0:
            masked = _warp(features, 1.0 + rng.uniform(-self.max_freq_warp, self.max_freq_warp))
        else:
            masked = features.clone()
        # The mean, not zero: features are log energies whose normalization comes later.
        fill = float(masked.mean())
        max_time_width = min(self.max_time_width, int(self.max_time_fraction * num_frames))
        for _ in range(self.num_freq_masks):
            start, end = _span(num_bins, min(self.max_freq_width, num_bins), rng)
            masked[:, start:end] = fill
        for _ in range(self.num_time_masks):
            start, end = _span(num_frames, max_time_width, rng)
            masked[start:end] = fill
        return masked


def _warp(features: Tensor, factor: float) -> Tensor:
    """Give bin ``k`` the interpolated value at ``k * factor``, or the last bin's beyond the end."""
    last = features.shape[1] - 1
    position = (torch.arange(features.shape[1]) * factor).clamp_max(last)
    below = position.long()
    above = (below + 1).clamp_max(last)
    return torch.lerp(features[:, below], features[:, above], (position - below).to(features))


def _span(size: int, max_width: int, rng: np.random.Generator) -> tuple[int, int]:
    width = int(rng.integers(0, max_width + 1))
    start = int(rng.integers(0, size - width + 1))
    return start, start + width
