# SPDX-License-Identifier: Apache-2.0
import math

import numpy as np
import pytest
import soundfile
import torch

from transducer_toolkit.data.audio import read_audio
from transducer_toolkit.data.windows import read_windows


def write(path, num_samples, rate=16000, channels=1):
    samples = np.random.default_rng(0).uniform(-0.5, 0.5, (num_samples, channels))
    soundfile.write(path, samples.astype(np.float32), rate, subtype="FLOAT")
    return path


@pytest.mark.parametrize("num_samples", [1, 15999, 16000, 16001, 28000, 28001, 63999])
@pytest.mark.parametrize("overlap_s", [0.0, 0.25, 0.5])
def test_windows_cover_the_file_and_overlap(tmp_path, num_samples, overlap_s):
    path = write(tmp_path / "a.wav", num_samples)
    whole = read_audio(path)
    windows = list(read_windows(path, window_s=1.0, overlap_s=overlap_s))
    hop = 16000 - round(16000 * overlap_s)
    assert [w.start_s for w in windows] == [k * hop / 16000 for k in range(len(windows))]
    for k, window in enumerate(windows):
        assert torch.equal(window.waveform, whole[k * hop :][:16000])
    last = len(windows[-1].waveform)
    assert (len(windows) - 1) * hop + last == num_samples
    if len(windows) > 1:
        assert last > 16000 - hop  # it has more than what the window before had
    assert all(len(w.waveform) == 16000 for w in windows[:-1])


def test_other_rates_and_channels_give_the_windows_of_the_whole(tmp_path):
    path = write(tmp_path / "a.wav", 44100 * 3, rate=44100, channels=2)
    whole = read_audio(path)
    for window in read_windows(path, window_s=1.0, overlap_s=0.4):
        start = round(16000 * window.start_s)
        expected = whole[start : start + len(window.waveform)]
        inner = slice(150, len(window.waveform) - 150)  # the resampler's filter sees the edges
        torch.testing.assert_close(window.waveform[inner], expected[inner], atol=1e-4, rtol=0)


def test_a_channel_is_selected(tmp_path):
    path = write(tmp_path / "a.wav", 40000, channels=3)
    expected = read_audio(path, channel=2)
    windows = read_windows(path, window_s=1.0, overlap_s=0.0, channel=2)
    assert torch.equal(torch.cat([window.waveform for window in windows]), expected)
    for channel, message in ((3, "no channel=3"), ("each", "'mix' or a number"), ("x", "got 'x'")):
        with pytest.raises(ValueError, match=message):
            list(read_windows(path, window_s=1.0, overlap_s=0.0, channel=channel))
    samples = soundfile.read(path)[0][:, :1]
    soundfile.write(path, np.concatenate([samples, -samples], axis=1), 16000)
    with pytest.raises(ValueError, match=r"a\.wav: its channels cancel each other in the mix"):
        list(read_windows(path, window_s=1.0, overlap_s=0.0))


def test_windows_of_an_mp3_file_are_parts_of_the_whole(tmp_path):
    """libsndfile 1.2.2 itself returns other samples after a seek in an MP3 file."""
    chirp = 0.3 * np.sin(np.cumsum(np.linspace(0.05, 1, 16000 * 9)))
    soundfile.write(tmp_path / "a.mp3", chirp, 16000)
    whole = read_audio(tmp_path / "a.mp3")
    for window in read_windows(tmp_path / "a.mp3", window_s=2.0, overlap_s=0.5):
        start = round(16000 * window.start_s)
        expected = whole[start : start + len(window.waveform)]
        torch.testing.assert_close(window.waveform, expected, atol=1e-5, rtol=0)


def test_bad_files_are_named(tmp_path):
    def complaint(name):
        with pytest.raises((OSError, ValueError), match=name) as raised:
            list(read_windows(tmp_path / name, window_s=1.0, overlap_s=0.1))
        return str(raised.value)

    assert "no audio file" in complaint("missing.wav")
    write(tmp_path / "empty.wav", 0)
    assert "holds no samples" in complaint("empty.wav")
    (tmp_path / "text.wav").write_text("no audio")
    assert "cannot be read as audio" in complaint("text.wav")
    (tmp_path / "bytes.raw").write_bytes(bytes(100))
    assert "cannot be read as audio" in complaint("bytes.raw")
    soundfile.write(tmp_path / "nan.wav", np.full(500, np.nan), 16000, subtype="FLOAT")
    assert "NaN or infinity" in complaint("nan.wav")
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, 64000)
    for name, message in {"half.flac": "cannot be read", "half.mp3": "breaks off"}.items():
        soundfile.write(tmp_path / name, noise, 16000)
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content[: len(content) // 2])
        assert message in complaint(name)


@pytest.mark.parametrize(
    ("window_s", "overlap_s"), [(0.0, 0.0), (1.0, 0.6), (1.0, -0.1), (math.inf, 0.1)]
)
def test_lengths_that_do_not_fit_are_named(tmp_path, window_s, overlap_s):
    with pytest.raises(ValueError, match=f"got window_s={window_s}, overlap_s={overlap_s}"):
        next(read_windows(tmp_path / "a.wav", window_s=window_s, overlap_s=overlap_s))
