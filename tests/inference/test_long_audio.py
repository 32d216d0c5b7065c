# SPDX-License-Identifier: Apache-2.0
import random
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile

from transducer_toolkit.inference.long_audio import join_words, transcribe_file
from transducer_toolkit.inference.words import RecognizedWord


def word(text, start_s, duration_s=0.2):
    return RecognizedWord(text, start_s, start_s + duration_s, 1.0)


def texts(words):
    return [word.word for word in words]


class Listener:
    """A recognizer of audio in which sample k has the value k: it knows which words it hears.

    It emits the words of a window a little early or late, gets words wrong or loses them within
    half a second of the window's ends, and calls parts of words there words.
    """

    def __init__(self, words, rate, seed):
        self.fbank = SimpleNamespace(sample_rate=rate)
        self.words, self.rate, self.choose = words, rate, random.Random(seed)
        self.batch_sizes = []

    def recognize_words(self, waveforms):
        self.batch_sizes.append(len(waveforms))
        return [self._hear(float(w[0]) / self.rate, len(w) / self.rate) for w in waveforms]

    def _hear(self, start_s, duration_s):
        found = []
        for spoken in self.words:
            begin, end = spoken.start_s - start_s, spoken.end_s - start_s
            if end <= 0 or begin >= duration_s:
                continue
            jitter = self.choose.choice([-0.04, 0.0, 0.04])
            text = spoken.word
            if begin < 0.5 or end > duration_s - 0.5:
                text = self.choose.choice([text, text[:-1], "noise", None])
            if text:
                begin = min(max(0.0, begin + jitter), duration_s - 0.04)
                end = min(max(begin + 0.04, end + jitter), duration_s)
                found.append(RecognizedWord(text, begin, end, 1.0))
        return found


@pytest.mark.parametrize("seed", range(40))
def test_no_word_is_lost_or_doubled(tmp_path, seed):
    choose = random.Random(seed)
    rate, duration_s = 100, choose.uniform(1.0, 90.0)
    spoken, time_s = [], 0.6
    while time_s < duration_s - 1.0:
        # Often the same word twice; now and then a pause.
        text = choose.choice(["one", "two", "two", "three"])
        spoken.append(word(text, time_s, choose.uniform(0.1, 0.4)))
        time_s = spoken[-1].end_s + choose.choice([0.1, 0.2, 0.3, 0.3, 8.0])
    # The first and the last half second of the file are silent: all words can be heard.
    ramp = np.arange(round(duration_s * rate), dtype=np.float32)
    soundfile.write(tmp_path / "ramp.wav", ramp, rate, subtype="FLOAT")
    listener = Listener(spoken, rate, seed)
    progress = []
    found = transcribe_file(
        listener,
        tmp_path / "ramp.wav",
        window_s=choose.choice([8.0, 10.0, 20.0]),
        overlap_s=choose.choice([3.0, 4.0]),
        batch_size=3,
        on_progress=progress.append,
    )
    assert texts(found.words) == texts(spoken)
    assert found.text == " ".join(texts(spoken))
    for one, other in zip(found.words, spoken, strict=True):
        assert abs(one.start_s - other.start_s) < 0.05
    assert found.duration_s == pytest.approx(len(ramp) / rate)
    assert progress == sorted(progress) and progress[-1] == found.duration_s
    assert max(listener.batch_sizes) <= 3


def test_the_joint_is_the_common_word_nearest_to_the_cut():
    earlier = [word("one", 1.0), word("two", 2.0), word("two", 2.4), word("x", 3.0)]
    later = [word("y", 1.0), word("two", 2.04), word("two", 2.44), word("three", 3.04)]
    assert texts(join_words(earlier, later, cut_s=2.5, reach_s=1)) == ["one", "two", "two", "three"]
    assert texts(join_words(earlier, later, cut_s=2.0, reach_s=1)) == ["one", "two", "two", "three"]


def test_without_a_common_word_the_cut_lies_in_no_word():
    earlier, later = [word("one", 1.0), word("too", 2.0)], [word("two", 2.1), word("three", 3.0)]
    assert texts(join_words(earlier, later, cut_s=2.28, reach_s=1)) == ["one", "too", "three"]
    assert texts(join_words(earlier, later, cut_s=2.02, reach_s=1)) == ["one", "two", "three"]
    assert texts(join_words(earlier, later, cut_s=2.6, reach_s=1)) == ["one", "too", "three"]
    # Words that are far apart are not the same, though their texts are.
    assert texts(join_words([word("one", 1.0)], [word("one", 3.0)], cut_s=2.0, reach_s=1)) == [
        "one",
        "one",
    ]
    assert join_words([], [], cut_s=2.0, reach_s=1) == []


def test_bad_options_are_named(tmp_path):
    listener = Listener([], 100, 0)
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        transcribe_file(listener, tmp_path / "a.wav", batch_size=0)
    with pytest.raises(ValueError, match="overlap_s at most half of it"):
        transcribe_file(listener, tmp_path / "a.wav", window_s=4, overlap_s=3)
