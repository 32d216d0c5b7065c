# SPDX-License-Identifier: Apache-2.0
"""Files that end early or hold more than their header says, read in each way."""

import struct

import numpy as np
import pytest
import soundfile
import torch

from transducer_toolkit.data.audio import audio_duration_s, read_audio
from transducer_toolkit.data.windows import read_windows

RATE = 16000
DURATION_S = 3.0

FORMATS = {
    "wav": ("WAV", "PCM_16"),
    "wav-float": ("WAV", "FLOAT"),
    "wav-adpcm": ("WAV", "IMA_ADPCM"),
    "wavex": ("WAVEX", "PCM_24"),
    "rf64": ("RF64", "PCM_16"),
    "w64": ("W64", "PCM_16"),
    "aiff": ("AIFF", "PCM_16"),
    "au": ("AU", "PCM_16"),
    "caf": ("CAF", "PCM_16"),
    "nist": ("NIST", "PCM_16"),
    "voc": ("VOC", "PCM_16"),
    "flac": ("FLAC", "PCM_16"),
    "ogg": ("OGG", "VORBIS"),
    "opus": ("OGG", "OPUS"),
    "mp3": ("MP3", "MPEG_LAYER_III"),
}


def write(path, kind="wav", *, duration_s=DURATION_S, seed=0):
    """Write noise and return the bytes of the file."""
    samples = np.random.default_rng(seed).uniform(-0.5, 0.5, round(duration_s * RATE))
    container, subtype = FORMATS[kind]
    soundfile.write(path, samples, RATE, format=container, subtype=subtype)
    return path.read_bytes()


def whole(path):
    """Read a file in each of the three ways and return its duration in seconds."""
    read = len(read_audio(path)) / RATE
    windows = list(read_windows(path, window_s=1.0, overlap_s=0.0))
    assert sum(len(window.waveform) for window in windows) / RATE == read
    assert audio_duration_s(path) == pytest.approx(read, abs=1e-4)
    return read


def refused(path, message):
    for read in (
        read_audio,
        lambda path: list(read_windows(path, window_s=1.0, overlap_s=0.0)),
        lambda path: read_audio(path, offset_s=0.5, duration_s=2.5),
    ):
        with pytest.raises(ValueError, match=rf"{path.name} .*{message}"):
            read(path)


@pytest.mark.parametrize("kind", FORMATS)
def test_complete_files_are_read(tmp_path, kind):
    path = tmp_path / f"a.{kind}"
    write(path, kind)
    assert whole(path) == pytest.approx(DURATION_S, abs=0.06)  # ADPCM fills its last block


@pytest.mark.parametrize("share", [0.95, 0.6, 1 / 3])
@pytest.mark.parametrize("kind", FORMATS)
def test_files_that_break_off_are_refused(tmp_path, kind, share):
    path = tmp_path / f"a.{kind}"
    content = write(path, kind)
    path.write_bytes(content[: round(len(content) * share)])
    refused(path, "(breaks off|cannot be read as audio)")


def test_an_ogg_file_without_its_last_page_is_refused(tmp_path):
    path = tmp_path / "a.ogg"
    content = write(path, "ogg")
    path.write_bytes(content[: content.rindex(b"OggS")])
    refused(path, "breaks off: the last page of its Ogg stream is missing")


def test_a_part_before_the_break_is_read(tmp_path):
    path = tmp_path / "a.wav"
    content = write(path)
    expected = read_audio(path, offset_s=0.5, duration_s=0.25)
    path.write_bytes(content[: len(content) // 2])
    assert torch.equal(read_audio(path, offset_s=0.5, duration_s=0.25), expected)


@pytest.mark.parametrize("size", [0x7FFFFFFF, 0xFFFFFFFF, 0x7FFFFFDB, 0x7FFFF000, 0x80000000])
def test_wav_files_from_a_pipe_are_read(tmp_path, size):
    path = tmp_path / "a.wav"
    content = bytearray(write(path))
    at = content.index(b"data") + 4
    content[4:8] = struct.pack("<I", min(size + 36, 0xFFFFFFFF))
    content[at : at + 4] = struct.pack("<I", size)
    path.write_bytes(content)
    assert whole(path) == DURATION_S


@pytest.mark.parametrize("size", [0, 16000, 60000])
def test_a_wav_file_whose_header_announces_less_is_refused(tmp_path, size):
    path = tmp_path / "a.wav"
    content = bytearray(write(path))
    at = content.index(b"data") + 4
    tags = b"LIST" + struct.pack("<I", 4000) + b"INFO" + bytes(range(256)) * 15 + bytes(156)
    path.write_bytes(content + tags)
    assert whole(path) == DURATION_S
    path.write_bytes(content + bytes(4000))
    assert whole(path) == DURATION_S
    content[at : at + 4] = struct.pack("<I", size)
    content[at + 4 + size : at + 9 + size] = b"\x80\xff\x80\xff\x80"
    path.write_bytes(content)
    for read in (read_audio, audio_duration_s):
        with pytest.raises(ValueError, match=rf"a\.wav holds \d+ bytes after the {size} bytes"):
            read(path)


def test_an_au_file_of_unknown_length_is_read(tmp_path):
    path = tmp_path / "a.au"
    content = bytearray(write(path, "au"))
    content[8:12] = b"\xff" * 4
    path.write_bytes(content)
    assert whole(path) == DURATION_S


@pytest.mark.parametrize("lengths_s", [(3.0, 5.0), (0.5, 4.0), (4.0, 0.5), (1.0, 2.0, 3.0)])
def test_joined_mp3_files_are_read_to_the_end(tmp_path, lengths_s):
    path = tmp_path / "joined.mp3"
    parts = [
        write(tmp_path / f"{k}.mp3", "mp3", duration_s=length_s, seed=k)
        for k, length_s in enumerate(lengths_s)
    ]
    path.write_bytes(b"".join(parts))
    # An encoder adds at most four frames of 36 ms to each file after the first.
    assert sum(lengths_s) <= whole(path) < sum(lengths_s) + 0.15 * len(lengths_s)
    first = read_audio(tmp_path / "0.mp3")
    torch.testing.assert_close(read_audio(path)[: len(first) - 1200], first[:-1200])


def test_tags_around_the_frames_of_an_mp3_file_change_nothing(tmp_path):
    path = tmp_path / "a.mp3"
    content = write(path, "mp3")
    expected = read_audio(path)
    id3_2 = b"ID3\x04\0\0" + bytes([0, 0, 3, 0]) + bytes(3 << 7)
    id3_1 = b"TAG" + bytes(125)
    ape = b"APETAGEX" + struct.pack("<III", 2000, 532, 0) + bytes(12) + bytes(532)
    for tagged in (id3_2 + content, content + id3_1, content + ape + id3_1, id3_2 + content + ape):
        path.write_bytes(tagged)
        assert torch.equal(read_audio(path), expected)
    path.write_bytes(id3_2 + content + id3_2 + content + id3_1)
    assert 2 * DURATION_S <= whole(path) < 2 * DURATION_S + 0.3
    path.write_bytes(id3_2 + content[: len(content) // 2] + id3_1)
    refused(path, "breaks off: its header announces .* MP3 frames")


def test_mp3_files_without_a_header_are_read_to_the_end(tmp_path):
    path = tmp_path / "a.mp3"
    content = write(path, "mp3")
    second = content.index(content[:2], 4)
    path.write_bytes(content[second:])
    assert DURATION_S <= whole(path) < DURATION_S + 0.15
    path.write_bytes(content[second:] + content[second:])
    assert 2 * DURATION_S <= whole(path) < 2 * DURATION_S + 0.3
    stereo = np.random.default_rng(0).uniform(-0.5, 0.5, (44100, 2))
    stereo[:22050] *= 1e-3  # the bit rate changes
    soundfile.write(path, stereo, 44100, bitrate_mode="VARIABLE", compression_level=0.5)
    content = path.read_bytes()
    path.write_bytes(content[content.index(b"\xff\xfb", 4) :])
    assert 1 <= whole(path) < 1.15


def test_joined_mp3_files_of_two_sample_rates_are_refused(tmp_path):
    path = tmp_path / "joined.mp3"
    content = write(path, "mp3")
    soundfile.write(tmp_path / "b.mp3", np.random.default_rng(0).uniform(-0.5, 0.5, 88200), 44100)
    path.write_bytes(content + (tmp_path / "b.mp3").read_bytes())
    refused(path, "are no MP3 frames of the sample rate of the first")


@pytest.mark.parametrize("kind", ["ogg", "opus", "flac"])
def test_joined_files_whose_second_would_be_ignored_are_refused(tmp_path, kind):
    path = tmp_path / f"joined.{kind}"
    content = write(path, kind, duration_s=3.0)
    other = write(tmp_path / "b", kind, duration_s=1.0, seed=1)
    path.write_bytes(content + other)
    refused(path, "holds several .* streams in sequence")


def test_a_flac_file_of_unknown_length_is_named(tmp_path):
    path = tmp_path / "a.flac"
    content = bytearray(write(path, "flac"))
    content[21] &= 0xF0
    content[22:26] = bytes(4)
    path.write_bytes(content)
    refused(path, "does not announce its length: convert it")


def test_durations_of_bad_files(tmp_path):
    path = tmp_path / "empty.wav"
    write(path, duration_s=0)
    with pytest.raises(ValueError, match=r"empty\.wav holds no samples"):
        audio_duration_s(path)
    with pytest.raises(FileNotFoundError, match=r"no audio file at .*none\.wav"):
        audio_duration_s(tmp_path / "none.wav")
