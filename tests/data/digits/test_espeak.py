# SPDX-License-Identifier: Apache-2.0
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("espeakng_loader")

from transducer_toolkit.data.digits.espeak import EspeakSynthesizer
from transducer_toolkit.data.digits.recipe import load_voices

STYLE = {"rate_wpm": 150, "pitch": 50, "pitch_range": 50, "word_gap_10ms": 0}


@pytest.fixture(scope="module")
def engine():
    return EspeakSynthesizer()


def test_speech_with_word_starts(engine):
    speech = engine.synthesize("three seven, one", voice="en-us+f1", **STYLE)
    assert speech.samples.dtype == np.float32 and 0.1 < np.abs(speech.samples).max() <= 1
    duration_s = len(speech.samples) / speech.sample_rate
    assert 1.0 < duration_s < 2.5
    first, second, third = speech.word_starts_s
    assert 0 <= first < second < third < duration_s


def test_phonemes(engine):
    phonemes, word = (
        engine.synthesize(text, voice="en-us+f1", **STYLE) for text in ("[[tj'u:]] one", "two one")
    )
    assert len(phonemes.word_starts_s) == len(word.word_starts_s) == 2
    # One more sound in front of the vowel, and not the names of the brackets.
    assert 0 < phonemes.word_starts_s[1] - word.word_starts_s[1] < 0.15


def test_every_voice_of_the_list_speaks(engine):
    voices = load_voices()
    for name in ("train", "val", "test", "excluded"):
        variants, accents = voices.of_set(name)
        for number, variant in enumerate(variants):
            voice = f"{accents[number % len(accents)]}+{variant}"
            speech = engine.synthesize("two", voice=voice, **STYLE)
            assert len(speech.word_starts_s) == 1 and np.abs(speech.samples).max() > 0.02, voice


def test_rate(engine):
    slow, fast = (
        len(engine.synthesize("one two three", voice="en", **{**STYLE, "rate_wpm": rate}).samples)
        for rate in (80, 230)
    )
    assert 2 * fast < slow < 4 * fast


@pytest.mark.parametrize("voice", ["en-us+nobody", "xx", "xx+f1"])
def test_unknown_voices(engine, voice):
    with pytest.raises(ValueError, match=f"espeak-ng has no voice '{voice}'".replace("+", "[+]")):
        engine.synthesize("one", voice=voice, **STYLE)


def test_a_variant_of_ones_own(engine):
    definition = engine.definition("f1")
    assert "formant" in definition
    deep = definition.replace("pitch", "//pitch") + "\npitch 60 60\n"
    pitch_hz = {}
    for name, text in (("test-same", definition), ("test-deep", deep)):
        engine.define(name, text)
        style = {**STYLE, "pitch_range": 0, "rate_wpm": 80}
        samples = engine.synthesize("one", voice=f"en-us+{name}", **style).samples
        correlation = np.correlate(samples[4000:8000], samples[4000:8000], "full")[3999:]
        pitch_hz[name] = engine.sample_rate / (100 + int(correlation[100:500].argmax()))
    assert pitch_hz["test-deep"] < 0.6 * pitch_hz["test-same"]
    engine.define("test-same", deep)  # replaces the definition
    again = engine.synthesize("one", voice="en-us+test-same", **STYLE).samples
    assert len(again) > 0
    import espeakng_loader

    packaged = Path(espeakng_loader.get_data_path(), "voices", "!v")
    assert not (packaged / "test-deep").exists()


def test_bad_options(engine):
    with pytest.raises(ValueError, match=r"rate_wpm must lie in \[80, 450\], got 20"):
        engine.synthesize("one", voice="en", **{**STYLE, "rate_wpm": 20})
