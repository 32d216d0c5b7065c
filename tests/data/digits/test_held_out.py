# SPDX-License-Identifier: Apache-2.0
import logging
import shutil

import numpy as np
import pytest
import soundfile

from transducer_toolkit.data.audio import read_audio
from transducer_toolkit.data.digits.held_out import AsteriskDigits, Flite


@pytest.fixture
def sounds(tmp_path):
    """Ten recordings at 8 kHz, digit d being a tone of 0.1 * (d + 1) s."""
    folder = tmp_path / "digits"
    folder.mkdir()
    for digit in range(10):
        tone = 0.3 * np.sin(np.arange(800 * (digit + 1)) * 0.3)
        soundfile.write(folder / f"{digit}.wav", tone, 8000)
    return folder


def test_recorded_digits_are_joined(sounds, tmp_path):
    source = AsteriskDigits(sounds_dir=sounds)
    out = tmp_path / "out"
    out.mkdir()
    words = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    for utterance in source.make(out, 12):
        spoken_s = sum(0.1 * (words.index(word) + 1) for word in utterance.text.split())
        gaps_s = utterance.duration_s - spoken_s
        assert -1e-6 <= gaps_s <= 0.2 * (len(utterance.text.split()) - 1) + 1e-6
        assert len(read_audio(utterance.audio)) == round(16000 * utterance.duration_s)


def test_fingerprint_follows_the_recordings(sounds):
    source = AsteriskDigits(sounds_dir=sounds)
    before = source.fingerprint()
    soundfile.write(sounds / "3.wav", np.zeros(800), 8000)
    assert source.fingerprint() not in (None, before)
    (sounds / "3.wav").unlink()
    assert source.fingerprint() is None


@pytest.mark.skipif(shutil.which("flite") is None, reason="needs the Debian package flite")
def test_flite_speaks(tmp_path):
    source = Flite()
    assert "flite" in source.fingerprint()
    rows = source.make(tmp_path, 8)
    assert [u.speaker for u in rows] == [*source.voices, *source.voices]
    for utterance in rows:
        seconds_a_word = utterance.duration_s / len(utterance.text.split())
        assert 0.2 < seconds_a_word < 1.2
        assert read_audio(utterance.audio).abs().max() > 0.05


def test_missing_packages_are_logged(tmp_path, monkeypatch, caplog):
    pytest.importorskip("espeakng_loader")
    from transducer_toolkit.data.digits import DigitsCorpus

    monkeypatch.setenv("PATH", "")
    corpus = DigitsCorpus(
        cache_dir=tmp_path / "cache",
        num_train=1,
        num_val=1,
        num_test=1,
        num_excluded=1,
        asterisk_digits_dir=tmp_path,
    )
    with caplog.at_level(logging.INFO):
        corpus.prepare()
    for package in ("flite", "asterisk-core-sounds-en-wav"):
        assert f"Debian package {package} is not installed" in caplog.text
    assert list(corpus.manifests().test) == ["test", "excluded"]
