# SPDX-License-Identifier: Apache-2.0
import json
import os
from pathlib import Path

import numpy as np
import pytest
import soundfile

from transducer_toolkit.data import durations
from transducer_toolkit.data.audio import audio_duration_s
from transducer_toolkit.data.corpus import ManifestCorpus
from transducer_toolkit.data.manifest import Utterance, read_manifest, write_manifest


def utterance(**changes):
    return Utterance(**{"id": "a", "audio": "a.wav", "duration_s": 1.5, "text": "one", **changes})


def test_round_trip_with_relative_and_foreign_audio(tmp_path):
    rows = [
        utterance(
            audio=str(tmp_path / "audio" / "a.wav"), word_starts_s=[0.1], extra={"lang": "en"}
        ),
        utterance(id="b", audio="/elsewhere/b.wav", offset_s=0.25, speaker="x", text="ĉu \u2028?"),
        utterance(id="c", audio="/elsewhere/b.wav", channel=1),
    ]
    write_manifest(tmp_path / "m.jsonl", rows)
    stored = [json.loads(line) for line in (tmp_path / "m.jsonl").open(encoding="utf-8")]
    assert [row["audio"] for row in stored] == ["audio/a.wav"] + ["/elsewhere/b.wav"] * 2
    assert [row.get("channel") for row in stored] == [None, None, 1]
    assert read_manifest(tmp_path / "m.jsonl") == rows


def test_a_moved_corpus_is_still_found(tmp_path):
    (tmp_path / "old").mkdir()
    write_manifest(tmp_path / "old" / "m.jsonl", [utterance(audio=str(tmp_path / "old" / "a.wav"))])
    (tmp_path / "old").rename(tmp_path / "new")
    assert read_manifest(tmp_path / "new" / "m.jsonl")[0].audio == str(tmp_path / "new" / "a.wav")


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "m.jsonl"
    write_manifest(path, [utterance()])
    before = path.read_bytes()
    with pytest.raises(TypeError):
        write_manifest(path, [utterance(extra={"not json": object()})])
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_blank_lines_are_skipped(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text('\n{"id": "a", "audio": "a.wav", "duration_s": 1, "text": ""}\n\n')
    assert [u.text for u in read_manifest(path)] == [""]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: "),
        ("[]", "line 2: expected a JSON object, got list"),
        ('{"id": "b", "audio": "b.wav", "text": ""}', r"line 2: no audio file at .*b\.wav"),
        ('{"id": "b", "duration_s": 1}', "line 2: audio and text missing"),
        ('{"audio": "", "duration_s": 1, "text": ""}', "line 2: audio must not be empty"),
        ('{"audio": 3, "text": ""}', "line 2: audio must be str, got int: 3"),
        (
            '{"audio": "a.flac", "duration_s": 1, "text": ""}',
            "line 2: id 'a' already stands in line 1, made of the audio path: give both lines",
        ),
        (
            '{"audio_filepath": "b", "audio": "c", "duration": 1, "text": ""}',
            "line 2: both 'audio_filepath' and 'audio' are given; remove one",
        ),
        ('{"audio_filepath": "b", "duration": "1", "text": ""}', "line 2: duration_s must be"),
        ('{"audio_filepath": ["b", "c"], "duration": 1, "text": ""}', "audio must be str, got l"),
        ('{"audio_filepath": "b", "duration": 1}', "line 2: text missing"),
        (
            '{"id": "b", "audio": "b", "duration_s": 1, "text": "", "lang": "en"}',
            r"line 2: unknown fields \['lang'\]; put them into 'extra'",
        ),
        ('{"id": "b", "audio": "b", "duration_s": 0, "text": ""}', "line 2: duration_s must be"),
        ('{"id": "b", "audio": "b", "duration_s": "1", "text": ""}', "duration_s must be a number"),
        ('{"id": "a", "audio": "b", "duration_s": 1, "text": ""}', "line 2: id 'a' already stands"),
    ],
)
def test_bad_lines_are_named(tmp_path, line, message):
    path = tmp_path / "m.jsonl"
    path.write_text('{"id": "a", "audio": "a.wav", "duration_s": 1, "text": ""}\n' + line)
    with pytest.raises(ValueError, match=message):
        read_manifest(path)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"id": ""}, ValueError, "id must not be empty"),
        ({"audio": 3}, TypeError, "audio must be str, got int: 3"),
        ({"text": None}, TypeError, "text must be str, got NoneType"),
        ({"duration_s": float("nan")}, ValueError, "duration_s must be finite"),
        ({"offset_s": -1}, ValueError, "offset_s must be finite and not negative, got -1"),
        ({"duration_s": 1e300}, ValueError, r"duration_s must be at most 1e\+09, got 1e\+300"),
        ({"offset_s": 10**400}, ValueError, r"offset_s must be at most 1e\+09, got 1000"),
        ({"speaker": 3}, TypeError, "speaker must be str or None, got int"),
        ({"channel": "each"}, ValueError, "channel: expected 'mix' or a number for an utterance"),
        ({"channel": -1}, ValueError, "channel: expected 'mix', 'each' or a number from 0, got -1"),
        ({"extra": [1]}, TypeError, "extra must be a mapping, got list"),
        ({"word_starts_s": 0.5}, TypeError, "word_starts_s must be a list of numbers or None"),
        ({"word_starts_s": ["0"]}, TypeError, "word_starts_s must be a list of numbers or None"),
        ({"word_starts_s": []}, ValueError, "one time a word of text, 1, got 0"),
        (
            {"word_starts_s": [1.6]},
            ValueError,
            r"rise within \[0, 1.5\], the utterance, got \[1.6\]",
        ),
        ({"word_starts_s": [-0.1]}, ValueError, "word_starts_s must rise within"),
        ({"word_starts_s": [float("nan")]}, ValueError, "word_starts_s must rise within"),
        ({"text": "a b", "word_starts_s": [0.4, 0.3]}, ValueError, "word_starts_s must rise"),
    ],
)
def test_bad_fields_are_named(changes, error, message):
    with pytest.raises(error, match=message):
        utterance(**changes)


@pytest.mark.parametrize("audio", ["../a.wav", "b/../../a.wav", "..", "b/../../../etc/passwd"])
def test_a_relative_path_stays_in_the_folder(tmp_path, audio):
    path = tmp_path / "m.jsonl"
    row = {"id": "a", "audio": audio, "duration_s": 1, "text": ""}
    path.write_text(json.dumps(row))
    with pytest.raises(ValueError, match=r"m\.jsonl, line 1: audio '.*' lies outside of"):
        read_manifest(path)


@pytest.mark.parametrize("audio", ["b/../a.wav", "..a.wav", "./a.wav", "/elsewhere/../a.wav"])
def test_dots_are_not_refused_as_such(tmp_path, audio):
    path = tmp_path / "m.jsonl"
    path.write_text(json.dumps({"id": "a", "audio": audio, "duration_s": 1, "text": ""}))
    assert read_manifest(path)[0].audio == str(tmp_path / audio)


def write_lines(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    """Folder with ``one.wav`` (1.5 s) and ``sub/two.flac`` (2 s), and an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "corpus"
    (folder / "sub").mkdir(parents=True)
    soundfile.write(folder / "one.wav", np.zeros(24000), 16000)
    soundfile.write(folder / "sub" / "two.flac", np.zeros(16000), 8000)
    return folder


def test_ids_and_durations_may_be_missing(corpus):
    path = write_lines(
        corpus / "m.jsonl",
        {"audio": "one.wav", "text": "a"},
        {"audio": "sub/two.flac", "text": "b"},
        {"id": "tail", "audio": "./sub/two.flac", "text": "c", "offset_s": 1.25},
        {"audio": "./sub/three.wav", "duration_s": 4, "text": ""},  # it is not opened
    )
    found = [(u.id, u.offset_s, u.duration_s) for u in read_manifest(path)]
    assert found == [("one", 0, 1.5), ("sub/two", 0, 2), ("tail", 1.25, 0.75), ("sub/three", 0, 4)]


def test_durations_are_computed_once_for_each_state_of_a_file(corpus, monkeypatch):
    calls = []

    def duration_s(path):
        calls.append(path)
        return audio_duration_s(path)

    monkeypatch.setattr(durations, "audio_duration_s", duration_s)
    path = write_lines(corpus / "m.jsonl", {"audio": "one.wav", "text": "a"})
    assert [read_manifest(path)[0].duration_s for _ in range(3)] == [1.5] * 3
    assert len(calls) == 1
    soundfile.write(corpus / "one.wav", np.zeros(16000), 16000)
    assert [read_manifest(path)[0].duration_s for _ in range(2)] == [1.0] * 2
    assert len(calls) == 2
    (cached,) = (corpus.parent / "cache").rglob("*.json")
    cached.write_text("{damaged")
    assert read_manifest(path)[0].duration_s == 1.0
    monkeypatch.setenv("XDG_CACHE_HOME", str(corpus / "one.wav"))  # it cannot be a folder
    assert read_manifest(path)[0].duration_s == 1.0


def test_audio_whose_duration_cannot_be_computed_is_named(corpus):
    content = (corpus / "one.wav").read_bytes()
    (corpus / "half.wav").write_bytes(content[: len(content) // 2])
    (corpus / "text.wav").write_text("no audio")
    for row, message in (
        ({"audio": "half.wav"}, r"half\.wav breaks off"),
        ({"audio": "text.wav"}, r"text\.wav cannot be read as audio"),
        ({"audio": "none.wav"}, r"no audio file at .*none\.wav"),
        ({"audio": "one.wav", "offset_s": 1.5}, r"offset_s=1\.5, but one\.wav ends after 1\.50 s"),
        ({"audio": "one.wav", "offset_s": -1}, "offset_s must be finite and not negative"),
    ):
        path = write_lines(corpus / "m.jsonl", {**row, "text": "a"})
        with pytest.raises(ValueError, match=rf"m\.jsonl, line 1: .*{message}"):
            read_manifest(path)


def test_nemo_manifests_are_read(corpus):
    path = write_lines(
        corpus / "m.json",
        {"audio_filepath": "one.wav", "duration": 1.2, "offset": 0.25, "text": "a", "lang": "en"},
        {"audio_filepath": "/data/b.wav", "duration": 3, "text": "b", "speaker": 7},
        {"audio_filepath": "sub/two.flac", "text": "c", "extra": {"x": 1}, "y": 2},
    )
    assert read_manifest(path) == [
        Utterance("one", str(corpus / "one.wav"), 1.2, "a", offset_s=0.25, extra={"lang": "en"}),
        Utterance("/data/b", "/data/b.wav", 3, "b", speaker="7"),
        Utterance("sub/two", str(corpus / "sub/two.flac"), 2.0, "c", extra={"x": 1, "y": 2}),
    ]


def test_a_byte_order_mark_is_accepted(tmp_path):
    path = tmp_path / "m.jsonl"
    row = '{"id": "a", "audio": "a.wav", "duration_s": 1, "text": "é"}\n'
    path.write_bytes(b"\xef\xbb\xbf" + row.encode())
    assert read_manifest(path)[0].text == "é"
    path.write_bytes(b"\xef\xbb\xbf\n" + row.encode())
    assert read_manifest(path)[0].id == "a"
    path.write_bytes(row.encode("utf-16"))
    with pytest.raises(ValueError, match=r"m\.jsonl, line 1: 'utf-8' codec can't decode"):
        read_manifest(path)


def test_missing_manifest(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_manifest(tmp_path / "none.jsonl")


def test_what_is_no_text_is_named_with_its_line(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_bytes(b"\n\xb1\x00\n")
    with pytest.raises(ValueError, match=r"train\.jsonl, line 2: 'utf-8' codec can't decode"):
        read_manifest(path)


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "train.jsonl")
    with pytest.raises(ValueError, match=r"train\.jsonl is no regular file"):
        read_manifest(tmp_path / "train.jsonl")


def test_a_corpus_may_be_a_test_manifest_alone():
    manifests = ManifestCorpus(test="some/dev.clean.jsonl").manifests()
    assert manifests.test == {"dev": Path("some/dev.clean.jsonl")}
    assert manifests.path("test/dev") == Path("some/dev.clean.jsonl")
    for name in ("train", "val", "test/other"):
        with pytest.raises(ValueError, match=f"the corpus has no manifest for {name}: give"):
            manifests.path(name)
    with pytest.raises(TypeError, match="a: expected the path of a manifest, got None"):
        ManifestCorpus(train="train.jsonl", test={"a": None})


def test_channels_of_lines_that_name_none(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.zeros((1600, 2)), 16000)
    soundfile.write(tmp_path / "m.wav", np.zeros(1600), 16000)
    path = tmp_path / "train.jsonl"
    rows = [
        {"audio": "a.wav", "text": "a"},
        {"id": "b", "audio": "a.wav", "text": "b", "channel": 1},
        {"audio": "m.wav", "text": "m"},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def channels(channel):
        return [(u.id, u.channel) for u in read_manifest(path, channel=channel)]

    assert channels("mix") == [("a", "mix"), ("b", 1), ("m", "mix")]
    assert channels(0) == [("a", 0), ("b", 1), ("m", 0)]
    assert channels("each") == [("a#0", 0), ("a#1", 1), ("b", 1), ("m", "mix")]
    with pytest.raises(ValueError, match="channel: expected 'mix', 'each' or a number"):
        channels("left")
    rows.append({"id": "a#1", "audio": "m.wav", "text": "m"})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match="line 4: id 'a#1' already stands in line 1"):
        channels("each")


@pytest.mark.parametrize(
    "line", ["[" * 100_000, json.dumps({"id": "a", "audio": "x" * 10**6, "text": ""})]
)
def test_deep_and_long_lines(tmp_path, line):
    path = tmp_path / "hostile.jsonl"
    path.write_text(f"\n{line}\n")
    with pytest.raises(ValueError, match=r"hostile\.jsonl, line 2: ") as raised:
        read_manifest(path)
    assert len(str(raised.value)) < 1000
