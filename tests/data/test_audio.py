# SPDX-License-Identifier: Apache-2.0
import math
import os

import numpy as np
import pytest
import soundfile
import torch

from transducer_toolkit.data.audio import read_audio, resample


@pytest.fixture
def ramp(tmp_path):
    """One second at 8 kHz, stereo, left rising and right zero."""
    path = tmp_path / "ramp.wav"
    left = np.linspace(0, 0.8, 8000)
    soundfile.write(path, np.stack([left, 0 * left], axis=1), 8000, subtype="FLOAT")
    return path


def test_channels_are_averaged(ramp):
    waveform = read_audio(ramp, sample_rate=8000)
    assert waveform.dtype == torch.float32
    torch.testing.assert_close(waveform, torch.linspace(0, 0.4, 8000))


@pytest.fixture
def three(tmp_path):
    """Three channels of noise at 16 kHz."""
    path = tmp_path / "three.wav"
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, (16000, 3)).astype(np.float32)
    soundfile.write(path, noise, 16000, subtype="FLOAT")
    return path, torch.from_numpy(noise).T


def test_a_channel_or_each_is_selected(three):
    path, noise = three
    assert torch.equal(read_audio(path, channel="each"), noise)
    for channel in range(3):
        assert torch.equal(read_audio(path, channel=channel), noise[channel])
    torch.testing.assert_close(read_audio(path, channel="mix"), noise.mean(dim=0))
    part = read_audio(path, offset_s=0.25, duration_s=0.5, channel="each", sample_rate=8000)
    assert part.shape == (3, 4000)
    one = read_audio(path, offset_s=0.25, duration_s=0.5, channel=1, sample_rate=8000)
    torch.testing.assert_close(part[1], one)


def test_channels_that_do_not_exist_are_named(three):
    path, _ = three
    with pytest.raises(ValueError, match=r"three\.wav has 3 channels, .*there is no channel=3"):
        read_audio(path, channel=3)
    for channel in (-1, "left", True, 0.0, None):
        with pytest.raises(ValueError, match="channel: expected 'mix', 'each' or a number from 0"):
            read_audio(path, channel=channel)


@pytest.mark.parametrize("gain", [-1.0, -0.99])
def test_channels_of_opposite_phase_are_not_mixed_to_silence(tmp_path, gain):
    path = tmp_path / "inverted.wav"
    left = np.random.default_rng(0).uniform(-0.5, 0.5, 16000)
    soundfile.write(path, np.stack([left, gain * left], axis=1), 16000, subtype="FLOAT")
    with pytest.raises(ValueError, match=r"inverted\.wav: its channels cancel each other"):
        read_audio(path)
    torch.testing.assert_close(read_audio(path, channel=0), torch.from_numpy(left).float())


@pytest.mark.parametrize("gain", [1.0, 0.0, -0.5])
def test_other_channels_are_mixed(tmp_path, gain):
    path = tmp_path / "a.wav"
    left = np.random.default_rng(0).uniform(-0.5, 0.5, 16000)
    soundfile.write(path, np.stack([left, gain * left], axis=1), 16000, subtype="FLOAT")
    expected = torch.from_numpy(left * (1 + gain) / 2).float()
    torch.testing.assert_close(read_audio(path), expected)
    soundfile.write(path, np.zeros((16000, 2)), 16000)
    assert not read_audio(path).any()  # silence cancels nothing


def test_part_of_a_file(ramp):
    whole = read_audio(ramp, sample_rate=8000)
    part = read_audio(ramp, offset_s=0.25, duration_s=0.5, sample_rate=8000)
    torch.testing.assert_close(part, whole[2000:6000], rtol=0, atol=0)


def test_a_part_may_miss_what_rounding_adds(ramp):
    assert len(read_audio(ramp, offset_s=0.25, duration_s=0.8, sample_rate=8000)) == 6000
    assert len(read_audio(ramp, offset_s=0.0, duration_s=1.09, sample_rate=8000)) == 8000
    for offset_s, duration_s in ((0.75, 9.0), (0.0, 1.2), (0.9, 0.15), (0.9, 83.0)):
        with pytest.raises(ValueError, match=r"ramp\.wav ends after 1\.00 s, but offset_s="):
            read_audio(ramp, offset_s=offset_s, duration_s=duration_s)


@pytest.mark.parametrize("name", ["a.wav", "a.flac", "a.ogg", "a.opus", "a.mp3", "a.aiff"])
def test_a_part_is_the_same_as_in_the_whole(tmp_path, name):
    """libsndfile 1.2.2 itself returns other samples after a seek in an MP3 file."""
    path = tmp_path / name
    chirp = 0.3 * np.sin(np.cumsum(np.linspace(0.05, 1, 16000 * 20)))
    subtype = "OPUS" if name == "a.opus" else None
    soundfile.write(path, chirp, 16000, format="OGG" if subtype else None, subtype=subtype)
    whole = read_audio(path)
    for start_s in (0.4, 9.5, 15.25):
        part = read_audio(path, offset_s=start_s, duration_s=2)
        expected = whole[round(start_s * 16000) :][:32000]
        torch.testing.assert_close(part, expected, atol=1e-4, rtol=0)


def test_resampling_keeps_the_signal(ramp):
    waveform = read_audio(ramp)  # 16 kHz by default
    assert len(waveform) == 16000
    middle = slice(2000, 14000)
    torch.testing.assert_close(
        waveform[middle], torch.linspace(0, 0.4, 16000)[middle], atol=2e-3, rtol=0
    )


@pytest.mark.parametrize("suffix", ["flac", "ogg", "mp3"])
def test_formats(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    soundfile.write(path, 0.3 * np.sin(np.arange(16000) * 0.2), 16000)
    waveform = read_audio(path)
    assert abs(len(waveform) - 16000) < 2400 and 0.25 < waveform.abs().max() < 0.4


def test_errors(tmp_path, ramp):
    with pytest.raises(FileNotFoundError, match="no audio file at"):
        read_audio(tmp_path / "none.wav")
    (tmp_path / "text.wav").write_text("not audio")
    with pytest.raises(ValueError, match=r"text\.wav cannot be read as audio"):
        read_audio(tmp_path / "text.wav")
    (tmp_path / "headerless.raw").write_bytes(bytes(1000))
    with pytest.raises(ValueError, match=r"headerless\.raw cannot be read as audio"):
        read_audio(tmp_path / "headerless.raw")
    os.mkfifo(tmp_path / "pipe.wav")  # to open it would wait for a writer
    with pytest.raises(
        ValueError, match=r"pipe\.wav cannot be read as audio: it is no regular file"
    ):
        read_audio(tmp_path / "pipe.wav")
    with pytest.raises(ValueError, match=r"holds no samples at offset_s=7\.0"):
        read_audio(ramp, offset_s=7.0)
    for options in ({"offset_s": -1.0}, {"duration_s": 0.0}):
        with pytest.raises(ValueError, match="offset_s must be >= 0 and duration_s > 0"):
            read_audio(ramp, **options)


def test_resample_of_equal_rates_is_the_input():
    waveform = torch.rand(10)
    assert resample(waveform, 16000, 16000) is waveform


@pytest.mark.parametrize("rate", [44101, 15999, 999_983])
def test_rates_of_large_ratios_take_neither_memory_nor_time(rate):
    """Their exact filters would have thousands of millions of coefficients."""
    num_samples = rate // 10
    waveform = torch.sin(2 * torch.pi * 440 * torch.arange(num_samples) / rate)
    resampled = resample(waveform, rate, 16000)
    assert abs(len(resampled) - 1600) <= 1
    expected = torch.sin(2 * torch.pi * 440 * torch.arange(1600) / 16000)
    torch.testing.assert_close(resampled[100:1500], expected[100:1500], atol=2e-2, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("num_samples", [0, 1, 2, 7, 44100])
def test_resampled_audio_has_the_length_that_is_promised(num_samples, dtype):
    waveform = torch.ones(3, num_samples, dtype=dtype)
    resampled = resample(waveform, 44100, 16000)
    assert resampled.shape == (3, math.ceil(num_samples * 16000 / 44100))
    assert resampled.dtype == dtype and resampled.is_contiguous()
    one = resample(waveform[0], 44100, 16000)
    assert torch.equal(resampled, one.expand(3, -1))
    every_second = torch.ones(3, 2 * num_samples, dtype=dtype)[:, ::2]
    assert torch.equal(resample(every_second, 44100, 16000), resampled)
    assert torch.equal(resample(every_second[0], 44100, 16000), one)
    if num_samples > 1000:  # a constant stays one, away from the edges
        torch.testing.assert_close(one[100:-100], torch.ones_like(one[100:-100]), atol=1e-3, rtol=0)


@pytest.mark.parametrize("rate", [0, -1, 1_000_001, 2**31 - 1])
def test_impossible_rates_are_named(rate):
    with pytest.raises(ValueError, match="from_rate: expected a sample rate of 1 to 1000000 Hz"):
        resample(torch.zeros(10), rate, 16000)
