# SPDX-License-Identifier: Apache-2.0
import random

import numpy as np
import pytest
import soundfile
import torch

from transducer_toolkit.data.features import Fbank
from transducer_toolkit.inference import pauses
from transducer_toolkit.inference.pauses import choose_cuts, has_vad, read_at_pauses

RATE = 16000


def sound(duration_s, hz, seed=0):
    """A voice of some pitch over noise: harmonics that swell four times a second."""
    times = np.arange(round(duration_s * RATE)) / RATE
    voice = sum(np.sin(2 * np.pi * k * hz * times) / k for k in range(1, 12))
    noise = np.random.default_rng(seed).standard_normal(len(times))
    return 0.1 * voice * (2 + np.sin(8 * np.pi * times)) + 0.003 * noise


def silence(duration_s):
    return 0.003 * np.random.default_rng(1).standard_normal(round(duration_s * RATE))


@pytest.fixture
def energy_vad(monkeypatch):
    """A detector that calls loud frames speech, in place of silero-vad."""

    def probabilities(samples):
        size = pauses.VAD_FRAME_SAMPLES
        padded = np.pad(samples, (0, -len(samples) % size)).reshape(-1, size)
        return (np.sqrt((padded**2).mean(axis=1)) > 0.02).astype(np.float32)

    monkeypatch.setattr(pauses, "_speech_probabilities", probabilities)


def read(path, max_s, overlap_s=1.0, **options):
    return list(read_at_pauses(path, Fbank(), max_s=max_s, overlap_s=overlap_s, **options))


def check_cover(pieces, samples, max_s):
    """The pieces contain all samples in order; those that overlap do so as they say."""
    end = 0
    for piece in pieces:
        start = round(piece.start_s * RATE)
        assert start == end - round(piece.overlap_s * RATE)
        assert 200 <= len(piece.waveform) <= max_s * RATE
        end = start + len(piece.waveform)
        np.testing.assert_allclose(piece.waveform, samples[start:end], atol=1e-6)
    assert end == len(samples)


def write(path, samples):
    soundfile.write(path, samples, RATE, subtype="FLOAT")
    return path


def test_a_short_file_is_one_piece(tmp_path, energy_vad):
    path = write(tmp_path / "a.wav", np.concatenate([sound(2, 110), silence(1), sound(2, 220)]))
    (piece,) = read(path, 6.0)
    assert piece.start_s == piece.overlap_s == 0 and len(piece.waveform) == 5 * RATE


def test_cuts_lie_in_pauses_where_the_sound_changes(tmp_path, energy_vad):
    parts = [sound(1.5, 110), silence(0.3), sound(1.5, 110), silence(0.3), 0.5 * sound(4, 330)]
    samples = np.concatenate(parts)
    path = write(tmp_path / "a.wav", samples)
    pieces = read(path, 7.0)
    check_cover(pieces, samples, 7.0)
    starts = [piece.start_s for piece in pieces]
    assert len(starts) == 2 and 3.25 < starts[1] < 3.65  # in the second pause


@pytest.mark.parametrize("seed", range(6))
def test_no_sample_is_lost_and_no_piece_is_too_long(tmp_path, energy_vad, monkeypatch, seed):
    monkeypatch.setattr(pauses, "BLOCK_S", 12.0)
    choose = random.Random(seed)
    parts = []
    for k in range(choose.randint(1, 12)):
        parts += [sound(choose.uniform(0.2, 6), choose.choice([90, 180, 300]), k)]
        parts += [silence(choose.choice([0.0, 0.05, 0.4, 5.0]))]
    samples = np.concatenate(parts)
    path = write(tmp_path / "a.wav", samples)
    check_cover(read(path, 3.0), samples, 3.0)


def test_without_a_quiet_moment_windows_overlap(tmp_path, energy_vad):
    times = np.arange(9 * RATE) / RATE
    fading = 0.4 * np.sin(2 * np.pi * 440 * times) * np.exp(-times / 10)
    samples = np.concatenate([sound(1, 110), silence(0.5), fading, silence(0.5)])
    path = write(tmp_path / "a.wav", samples)
    pieces = read(path, 4.0)
    check_cover(pieces, samples, 4.0)
    assert any(piece.overlap_s == 1.0 for piece in pieces)
    # Silence, digital silence and a single level are no error.
    for quiet in (np.zeros(10 * RATE), silence(10), np.full(10 * RATE, 0.5)):
        check_cover(read(write(path, quiet), 4.0), quiet, 4.0)


def test_channels_and_rates(tmp_path, energy_vad):
    samples = np.concatenate([sound(2, 110), silence(0.5), sound(2, 300)])
    soundfile.write(tmp_path / "a.wav", np.stack([samples, -samples], axis=1), 48000)
    pieces = read(tmp_path / "a.wav", 1.0, overlap_s=0.2, channel=1)
    assert pieces[-1].start_s + len(pieces[-1].waveform) / RATE == pytest.approx(1.5)
    with pytest.raises(ValueError, match="channels cancel each other"):
        read(tmp_path / "a.wav", 1.0)


def test_cuts_cost():
    features = np.repeat([[0.0], [5.0], [5.5]], 300, axis=0) + np.zeros((1, 80))
    places = dict.fromkeys(range(50, 900, 50), 1000.0)
    assert choose_cuts(features, places, max_frames=1000) == [300]
    assert choose_cuts(features, dict.fromkeys(places, 1.0), max_frames=1000) == [300, 600]
    assert choose_cuts(features, dict.fromkeys(places, 1e6), max_frames=1000) == []
    assert len(choose_cuts(features, dict.fromkeys(places, 1e6), max_frames=350)) == 2
    assert choose_cuts(features, {300: 1e6, 303: 1000.0}, max_frames=1000) == [303]
    assert choose_cuts(features[:4], {2: 0.0}, max_frames=10) == []


@pytest.mark.skipif(not has_vad(), reason="silero-vad is not installed (extra vad)")
def test_the_detector_finds_pauses_and_leaves_the_threads_alone(tmp_path):
    torch.set_num_threads(2)
    samples = silence(3).astype(np.float32)
    assert (pauses._speech_probabilities(samples) < pauses.IS_SPEECH).all()
    assert len(pauses._speech_probabilities(samples)) == -(-len(samples) // 512)
    assert torch.get_num_threads() == 2
