# SPDX-License-Identifier: Apache-2.0
import json
import os

import pytest

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
    ]
    write_manifest(tmp_path / "m.jsonl", rows)
    stored = [json.loads(line) for line in (tmp_path / "m.jsonl").open(encoding="utf-8")]
    assert [row["audio"] for row in stored] == ["audio/a.wav", "/elsewhere/b.wav"]
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
        ('{"id": "b", "audio": "b.wav", "text": ""}', "line 2: .*duration_s"),
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
    with pytest.raises(TypeError, match="val: expected the path of a manifest, got None"):
        ManifestCorpus(train="train.jsonl", val=None)
