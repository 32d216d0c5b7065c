# SPDX-License-Identifier: Apache-2.0
import math

import numpy as np
import pytest
import torch

from transducer_toolkit.data.augment import SpecAugment, WaveformPerturbation


def rng(seed=0):
    return np.random.default_rng(seed)


def tone(frequency_hz=1000.0, num_samples=16000):
    return 0.1 * torch.sin(2 * torch.pi * frequency_hz / 16000 * torch.arange(num_samples))


def power_db(x):
    return 10 * float(x.double().square().mean().log10())


def test_off_by_default():
    torch.testing.assert_close(WaveformPerturbation()(tone(), rng()), tone())


def test_speed_changes_length_and_pitch_together():
    for seed in range(5):
        out = WaveformPerturbation(speed=0.13)(tone(), rng(seed))
        speed = 16000 / len(out)
        assert 0.86 < speed < 1.14
        peak_hz = torch.fft.rfft(out).abs().argmax() * 16000 / len(out)
        assert abs(peak_hz - 1000 * speed) < 3


def test_all_speeds_occur():
    perturb = WaveformPerturbation(speed=0.1)
    generator = rng()
    speeds = {round(perturb.draw_speed(generator), 2) for _ in range(1000)}
    assert speeds == {round(0.9 + 0.01 * step, 2) for step in range(21)}
    assert perturb.max_speed == pytest.approx(max(speeds))


@pytest.mark.parametrize("snr_db", [0.0, 20.0])
@pytest.mark.parametrize("num_samples", [1, 700, 16000, 16064])
def test_noise_has_the_snr_asked_for(snr_db, num_samples):
    waveform = 0.1 * torch.randn(num_samples)
    noisy = WaveformPerturbation(noise_snr_db=(snr_db, snr_db))(waveform, rng())
    assert noisy.shape == waveform.shape
    if num_samples >= 16000:  # fewer samples of brown noise scatter widely
        assert power_db(waveform) - power_db(noisy - waveform) == pytest.approx(snr_db, abs=2.0)


def test_equalizer_stays_within_its_range():
    noise = 0.01 * torch.randn(16000)
    gains_db = []
    for seed in range(20):
        out = WaveformPerturbation(eq_db=6.0)(noise, rng(seed))
        ratio = torch.fft.rfft(out).abs().square() / torch.fft.rfft(noise).abs().square()
        bands = [slice(100, 400), slice(900, 1100), slice(2800, 3200), slice(6000, 7900)]
        gains_db += [10 * float(ratio[band].median().log10()) for band in bands]
    assert max(map(abs, gains_db)) < 6.5 and max(gains_db) > 3 and min(gains_db) < -3


def test_gain_is_exact_and_never_clips():
    quiet = WaveformPerturbation(gain_db=(-6.0, -6.0))(tone(), rng())
    torch.testing.assert_close(quiet, tone() * 10**-0.3)
    loud = WaveformPerturbation(gain_db=(60.0, 60.0))(tone(), rng())
    torch.testing.assert_close(loud, tone() / tone().abs().max())


def test_telephone_leaves_nothing_above_four_kilohertz():
    noise = torch.from_numpy(rng().standard_normal(16000).astype(np.float32)) / 8
    narrow = WaveformPerturbation(telephone_probability=1.0)(noise, rng(3))
    before, after = (torch.fft.rfft(x).abs().square() for x in (noise, narrow))  # 1 Hz a bin
    assert after[4050:].sum() < 1e-3 * before[4050:].sum()
    assert 0.9 < after[:3000].sum() / before[:3000].sum() < 1.1
    assert torch.equal(WaveformPerturbation(telephone_probability=0.0)(noise, rng(3)), noise)


def test_waveform_perturbation_repeats_and_leaves_its_input():
    perturb = WaveformPerturbation(speed=0.1, eq_db=6, noise_snr_db=(10, 20), gain_db=(-6, 6))
    waveform = tone()
    assert torch.equal(perturb(waveform, rng(1)), perturb(waveform, rng(1)))
    assert len(perturb(waveform, rng(1))) != len(perturb(waveform, rng(2)))
    assert torch.equal(waveform, tone())


def test_silence_stays_finite():
    perturb = WaveformPerturbation(eq_db=6, noise_snr_db=(10, 20), gain_db=(-6, 6))
    assert torch.equal(perturb(torch.zeros(1000), rng()), torch.zeros(1000))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"speed": 0.6}, r"speed must lie in \[0, 0.5\], got 0.6"),
        ({"eq_db": -1}, "eq_db must be finite and not negative, got -1"),
        ({"eq_db": math.nan}, "eq_db must be finite and not negative, got nan"),
        ({"speed": math.nan}, r"speed must lie in \[0, 0.5\], got nan"),
        ({"noise_probability": 2}, r"noise_probability must lie in \[0, 1\], got 2"),
        ({"noise_snr_db": (20, 10)}, r"noise_snr_db must be \(lowest, highest\), got \(20, 10\)"),
        ({"gain_db": (1,)}, r"gain_db must be \(lowest, highest\), got \(1,\)"),
    ],
)
def test_waveform_perturbation_errors(options, message):
    with pytest.raises(ValueError, match=message):
        WaveformPerturbation(**options)


@pytest.mark.parametrize("num_frames", [1, 7, 300])
def test_spec_augment_masks_whole_bands_and_spans(num_frames):
    features = torch.randn(num_frames, 80)
    original = features.clone()
    augment = SpecAugment(num_freq_masks=2, max_freq_width=10, num_time_masks=2, max_time_width=30)
    for seed in range(20):
        masked = augment(features, rng(seed))
        changed = masked != features
        bins = changed.all(dim=0)
        frames = changed.all(dim=1)
        assert torch.equal(changed, bins[None] | frames[:, None])
        assert bins.sum() <= 20
        assert frames.sum() <= 2 * min(30, int(0.1 * num_frames)) or bins.all()
        assert torch.equal(masked, augment(features, rng(seed)))
    assert torch.equal(features, original)


def test_spec_augment_fills_with_the_mean():
    features = torch.randn(50, 80) - 7
    augment = SpecAugment(num_freq_masks=1, max_freq_width=80, num_time_masks=0)
    masked = augment(features, rng(3))
    filled = masked[masked != features]
    assert len(filled) and torch.allclose(filled, features.mean())


def test_the_mel_axis_is_warped():
    bins = torch.arange(80.0).repeat(5, 1)
    augment = SpecAugment(max_freq_warp=0.1, num_freq_masks=0, num_time_masks=0)
    factors = []
    for seed in range(50):
        warped = augment(bins, rng(seed))
        factor = float(warped[0, 40] / 40)
        torch.testing.assert_close(warped, (bins * factor).clamp_max(79))
        factors.append(factor)
    assert 0.9 <= min(factors) < 0.92 and 1.08 < max(factors) <= 1.1
    features = torch.randn(7, 80)
    off = SpecAugment(num_freq_masks=0, num_time_masks=0)
    assert torch.equal(off(features, rng()), features)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_freq_warp": 2}, r"max_freq_warp: expected a number in \[0, 1\], got 2"),
        ({"max_freq_warp": math.nan}, r"max_freq_warp: expected a number in \[0, 1\], got nan"),
        ({"max_time_width": -1}, "max_time_width: expected at least 0, got -1"),
        ({"max_time_fraction": 1.5}, r"max_time_fraction: expected a number in \[0, 1\], got 1.5"),
    ],
)
def test_spec_augment_errors(options, message):
    with pytest.raises(ValueError, match=message):
        SpecAugment(**options)
