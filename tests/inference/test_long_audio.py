# SPDX-License-Identifier: Apache-2.0
import io
import logging
import random
from types import SimpleNamespace

import numpy as np
import pytest
import sentencepiece
import soundfile

from transducer_toolkit.data.audio import audio_duration_s
from transducer_toolkit.data.sentencepiece_tokenizer import SentencePieceTokenizer
from transducer_toolkit.data.tokenizer import SPACE_SYMBOL, CharTokenizer
from transducer_toolkit.decoding import Hypothesis
from transducer_toolkit.inference import long_audio
from transducer_toolkit.inference.joining import TimedSymbol, join_symbols
from transducer_toolkit.inference.long_audio import (
    AudioSource,
    channels_of,
    transcribe_file,
    transcribe_files,
)
from transducer_toolkit.inference.words import RecognizedWord

FRAME_S = 0.04
HAN = "".join(chr(0x4E00 + k) for k in range(12))


def word(text, start_s, duration_s=0.2):
    return RecognizedWord(text, start_s, start_s + duration_s, 1.0)


def texts(words):
    return [word.word for word in words]


def write_ramp(path, duration_s, rate=100):
    """Audio in which sample k has the value k."""
    samples = np.arange(round(duration_s * rate), dtype=np.float32)
    soundfile.write(path, samples, rate, subtype="FLOAT")
    return path


class Listener:
    """A recognizer of audio in which sample k has the value k: it knows which words it hears.

    It emits the words of a window a little early or late, gets words wrong or loses them within
    half a second of the window's ends, and calls parts of words there words.
    """

    frame_s = FRAME_S
    edge_s = 0.5
    min_samples = 1

    def __init__(self, words, tokenizer, rate=100, seed=0):
        self.fbank = SimpleNamespace(sample_rate=rate)
        self.words, self.rate, self.choose = words, rate, random.Random(seed)
        self.tokenizer = tokenizer
        self.batches = []

    def check_length(self, waveform, name):
        assert len(waveform) >= self.min_samples

    def recognize(self, waveforms):
        self.batches.append([len(waveform) for waveform in waveforms])
        return [self._hear(float(w[0]) / self.rate, len(w) / self.rate) for w in waveforms]

    def _hear(self, start_s, duration_s):
        tokens, frames = [], []
        for spoken in self.words:
            begin, end = spoken.start_s - start_s, spoken.end_s - start_s
            if end <= 0 or begin >= duration_s:
                continue
            jitter = self.choose.choice([-FRAME_S, 0.0, FRAME_S])
            text = spoken.word
            if begin < self.edge_s or end > duration_s - self.edge_s:
                text = self.choose.choice([text, text[:-1], text[::-1], None])
            if not text:
                continue
            begin = min(max(0.0, begin + jitter), duration_s - FRAME_S)
            end = min(max(begin + FRAME_S, end + jitter), duration_s)
            ids = self.tokenizer.encode(text)
            if tokens and spoken.spaced and isinstance(self.tokenizer, CharTokenizer):
                tokens.append(self.tokenizer.symbols.index(SPACE_SYMBOL))
                frames.append(int(begin / FRAME_S))
            for k, id_ in enumerate(ids):
                tokens.append(id_)
                frames.append(int((begin + (end - begin) * k / len(ids)) / FRAME_S))
        return Hypothesis(tokens, frames, [0.0] * len(tokens))


@pytest.mark.parametrize("script", ["letters", "han", "thai", "mixed"])
@pytest.mark.parametrize("seed", range(12))
def test_no_symbol_is_lost_or_doubled(tmp_path, seed, script):
    choose = random.Random(seed)
    duration_s = choose.uniform(1.0, 90.0)
    vocabulary = {
        # Often the same word twice.
        "letters": ["one", "two", "two", "three", "o"],
        "han": [*HAN, HAN[:1] * 2, HAN[3:6]],
        "thai": ["ที่", "นี่", "มา", "กา", "กา"],
        "mixed": [*HAN[:5], "GitHub", "tee"],
    }[script]
    spoken, time_s = [], 0.6
    while time_s < duration_s - 1.0:
        text = choose.choice(vocabulary)
        length_s = max(0.1 * len(text), choose.uniform(0.1, 0.4))
        spoken.append(RecognizedWord(text, time_s, time_s + length_s, 1.0, script == "letters"))
        # Now and then a pause.
        time_s = spoken[-1].end_s + choose.choice([0.1, 0.2, 0.3, 0.3, 8.0])
    # The first and the last half second of the file are silent: all words can be heard.
    path = write_ramp(tmp_path / "ramp.wav", duration_s)
    tokenizer = CharTokenizer.from_texts([*vocabulary, "x x"])
    listener = Listener(spoken, tokenizer, seed=seed)
    progress = []
    found = transcribe_file(
        listener,
        path,
        cut="windows",
        window_s=choose.choice([8.0, 10.0, 20.0]),
        overlap_s=choose.choice([3.0, 4.0]),
        batch_size=3,
        on_progress=progress.append,
    )
    assert found.text == (" " if script == "letters" else "").join(texts(spoken))
    if script == "letters":
        assert texts(found.words) == texts(spoken)
        for one, other in zip(found.words, spoken, strict=True):
            assert abs(one.start_s - other.start_s) < 2.1 * FRAME_S
    assert found.duration_s == pytest.approx(round(duration_s * 100) / 100)
    assert progress == sorted(progress) and progress[-1] == pytest.approx(found.duration_s)


def test_a_minute_without_spaces(tmp_path):
    """60 characters, one a second: with joints at words, 72 were written."""
    text = "".join(chr(0x4E00 + k) for k in range(60))
    spoken = [RecognizedWord(c, k + 0.6, k + 0.64, 1.0, False) for k, c in enumerate(text)]
    path = write_ramp(tmp_path / "sec.wav", 61)
    found = transcribe_file(Listener(spoken, CharTokenizer.from_texts([text])), path, cut="windows")
    assert found.text == text
    # So that subtitles and CTM have entries of sensible lengths.
    assert len(found.words) == 60
    assert max(word.end_s - word.start_s for word in found.words) < 0.1


@pytest.mark.parametrize("overlap_s", [2.0, 4.0])
def test_word_pieces_and_bytes_are_joined(tmp_path, overlap_s):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["one two three ones twos"] * 9),
        model_writer=model,
        vocab_size=290,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        pad_id=0,
        pad_piece="<blk>",
        unk_id=1,
        bos_id=-1,
        eos_id=-1,
        minloglevel=2,
    )
    tokenizer = SentencePieceTokenizer(model.getvalue())
    choose = random.Random(0)
    spoken, time_s = [], 0.6
    while time_s < 58:
        text = choose.choice(["one", "twos", "three", "ü", "三"])
        spoken.append(word(text, time_s, 0.3))
        time_s += choose.choice([0.4, 0.5])
    path = write_ramp(tmp_path / "ramp.wav", 60)
    listener = Listener(spoken, tokenizer)
    found = transcribe_file(listener, path, cut="windows", window_s=10.0, overlap_s=overlap_s)
    assert found.text == " ".join(texts(spoken))


def joined(earlier, later, *, cut_s, reach_s=1.0):
    """Join words of one token each; returns the tokens' names."""
    names = sorted({name for name, _ in (*earlier, *later)})
    first, second, _ = join_symbols(
        [TimedSymbol(names.index(name), start_s, 0.0) for name, start_s in earlier],
        [TimedSymbol(names.index(name), start_s, 0.0) for name, start_s in later],
        cut_s=cut_s,
        reach_s=reach_s,
        frame_s=FRAME_S,
        word_times=lambda symbols: [(s.start_s, s.start_s + 0.2) for s in symbols],
    )
    return [names[symbol.token] for symbol in first + second]


def test_the_joint_is_the_common_symbol_nearest_to_the_cut():
    earlier = [("one", 1.0), ("two", 2.0), ("two", 2.4), ("x", 3.0)]
    later = [("y", 1.0), ("two", 2.04), ("two", 2.44), ("three", 3.04)]
    assert joined(earlier, later, cut_s=2.5) == ["one", "two", "two", "three"]
    assert joined(earlier, later, cut_s=2.0) == ["one", "two", "two", "three"]


def test_a_joint_where_more_symbols_agree_is_better():
    # Near the cut, "five" and "nine" share two letters by chance.
    early = [(c, 1.0 + 0.1 * k) for k, c in enumerate("onetwofive")]
    late = [(c, 1.0 + 0.1 * k) for k, c in enumerate("onetwonine")]
    assert "".join(joined(early, late, cut_s=1.75)) == "onetwonine"


def test_repeated_symbols_are_joined_by_their_times():
    """Two windows that differ by a frame: neither a letter more nor a letter less."""
    for shift_s in (-0.04, 0.0, 0.04):
        early = [(c, 1.0 + 0.04 * k) for k, c in enumerate("hellohello")]
        late = [(c, 1.0 + shift_s + 0.04 * k) for k, c in enumerate("hellohello")]
        assert "".join(joined(early, late, cut_s=1.2)) == "hellohello"


def test_without_a_common_symbol_the_cut_lies_in_no_word():
    earlier, later = [("one", 1.0), ("too", 2.0)], [("two", 2.1), ("three", 3.0)]
    assert joined(earlier, later, cut_s=2.28) == ["one", "too", "three"]
    assert joined(earlier, later, cut_s=2.02) == ["one", "two", "three"]
    assert joined(earlier, later, cut_s=2.6) == ["one", "too", "three"]
    # Words that are far apart are not the same, though their texts are.
    assert joined([("one", 1.0)], [("one", 3.0)], cut_s=2.0) == ["one", "one"]
    assert joined([], [], cut_s=2.0) == []


def test_pieces_that_overlap_nothing_get_spaces_where_the_script_has_them(tmp_path, monkeypatch):
    """With cuts in pauses, no symbol says whether there is a space between two pieces."""
    path = write_ramp(tmp_path / "ramp.wav", 12)

    def in_pieces(path, fbank, *, max_s, overlap_s, channel):
        yield from long_audio.read_windows(path, window_s=4, overlap_s=0, sample_rate=100)

    monkeypatch.setattr(long_audio, "read_at_pauses", in_pieces)
    monkeypatch.setattr(long_audio, "has_vad", lambda: True)
    for text, expected in {
        "one two ten": "one two ten",
        "今 天 好": "今天好",
        "ab 天 c": "ab天c",
    }.items():
        spoken = [word(part, 1.0 + 4 * k) for k, part in enumerate(text.split())]
        listener = Listener(spoken, CharTokenizer.from_texts([text, "x x"]))
        assert transcribe_file(listener, path).text == expected


def test_files_share_batches_and_keep_their_order(tmp_path):
    choose = random.Random(1)
    sources, expected = [], []
    for k in range(40):
        duration_s = choose.choice([1, 2, 3, 25])
        sources.append(AudioSource(write_ramp(tmp_path / f"{k}.wav", duration_s)))
        expected.append(duration_s)
    listener = Listener([word("one", 0.4)], CharTokenizer.from_texts(["one", "x x"]))
    listener.edge_s = 0.0
    results = list(transcribe_files(listener, sources, cut="windows", batch_size=2))
    assert [source for source, _ in results] == sources
    assert [round(found.duration_s) for _, found in results] == expected
    assert {found.text for _, found in results} == {"one"}
    assert max(map(len, listener.batches)) > 10
    assert all(len(batch) * max(batch) <= 2 * 20 * 100 for batch in listener.batches)


def test_a_bad_file_spoils_no_other(tmp_path):
    good = [write_ramp(tmp_path / f"{k}.wav", 2 + k) for k in range(3)]
    soundfile.write(tmp_path / "nan.wav", np.full(200, np.nan), 100, subtype="FLOAT")
    (tmp_path / "text.wav").write_text("no audio")
    listener = Listener([word("one", 1)], CharTokenizer.from_texts(["one"]))
    recognize = listener.recognize

    def refusing(waveforms):
        if any(len(waveform) == 300 for waveform in waveforms):
            raise ValueError("waveforms[1] is odd")
        return recognize(waveforms)

    listener.recognize = refusing
    names = [good[0], tmp_path / "nan.wav", good[1], tmp_path / "no.wav", tmp_path / "text.wav"]
    sources = [AudioSource(path) for path in (*names, good[2])]
    found = [result for _, result in transcribe_files(listener, sources)]
    assert [getattr(result, "text", type(result)) for result in found] == [
        *("one", ValueError, ValueError, FileNotFoundError, ValueError, "one"),
    ]
    assert "NaN" in str(found[1]) and "odd" in str(found[2])
    with pytest.raises(ValueError, match="is odd"):
        transcribe_file(listener, good[1])


def test_channels(tmp_path):
    ramp = np.arange(600, dtype=np.float32)
    stereo = np.stack([ramp, ramp + 1000], axis=1)
    soundfile.write(tmp_path / "a.wav", stereo, 100, subtype="FLOAT")
    spoken = [word("left", 1), word("right", 11), word("both", 6)]
    listener = Listener(spoken, CharTokenizer.from_texts(texts(spoken)))
    path = tmp_path / "a.wav"
    assert channels_of(path) == [0, 1]
    found = [transcribe_file(listener, path, channel=channel) for channel in (0, 1, "mix")]
    assert [(x.text, x.channel) for x in found] == [("left", 0), ("right", 1), ("both", "mix")]
    with pytest.raises(ValueError, match="no channel=2"):
        transcribe_file(listener, path, channel=2)
    with pytest.raises(ValueError, match="expected 'mix' or a number"):
        transcribe_file(listener, path, channel="each")
    soundfile.write(path, np.stack([ramp, -ramp], axis=1), 100, subtype="FLOAT")
    with pytest.raises(ValueError, match="channels cancel each other"):
        transcribe_file(listener, path)
    assert transcribe_file(listener, path, channel=0).text == "left"


@pytest.mark.parametrize("size", [0x7FFFFFFF, 0xFFFFFFFF, 0x7FFFFFFF - 36, 0xFFFFFFFF - 36])
def test_a_stream_with_an_unknown_length_is_read_to_its_end(tmp_path, size):
    """A program that writes to a pipe announces no length."""
    path = tmp_path / "pipe.wav"
    soundfile.write(path, np.zeros(30 * 16000), 16000, subtype="PCM_16")
    content = bytearray(path.read_bytes())
    content[4:8] = content[40:44] = size.to_bytes(4, "little")
    path.write_bytes(content)
    listener = Listener([], CharTokenizer.from_texts(["one"]), rate=16000)
    assert transcribe_file(listener, path, cut="windows").duration_s == 30.0
    assert audio_duration_s(path) == 30.0


def test_a_missing_detector_is_named(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(long_audio, "has_vad", lambda: False)
    path = write_ramp(tmp_path / "a.wav", 30)
    listener = Listener([word("one", 1)], CharTokenizer.from_texts(["one"]))
    with pytest.raises(ValueError, match=r"needs silero-vad .*transducer_toolkit\[vad\]"):
        transcribe_file(listener, path, cut="pauses")
    with caplog.at_level(logging.WARNING):
        assert transcribe_file(listener, path, cut="windows").text == "one"
        assert not caplog.records
        assert transcribe_file(listener, path).text == "one"
        assert "a.wav is longer than 20 s" in caplog.text


def test_bad_options_are_named(tmp_path):
    listener = Listener([], None)
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        transcribe_file(listener, tmp_path / "a.wav", batch_size=0)
    with pytest.raises(ValueError, match="overlap_s at most half of it"):
        transcribe_file(listener, tmp_path / "a.wav", window_s=4, overlap_s=3)
    with pytest.raises(ValueError, match="cut: expected 'pauses', 'windows' or None, got 'words'"):
        transcribe_file(listener, tmp_path / "a.wav", cut="words")
