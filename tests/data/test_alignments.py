# SPDX-License-Identifier: Apache-2.0
import json

import pytest

from transducer_toolkit.data.alignments import Alignments, file_names


def write(folder, name, tokens):
    (folder / name).write_text(json.dumps({"id": name, "tokens": tokens}), encoding="utf-8")


def test_times_of_the_symbols(tmp_path):
    write(tmp_path, "set_a_1.json", [{"symbol": "a", "time_s": 0.5}, {"symbol": "b", "time_s": 1}])
    write(tmp_path, "byte.json", [{"symbol": "ä", "time_s": 0.1}, {"symbol": "", "time_s": 0.2}])
    write(tmp_path, "own.json", [{"time_s": 0}])
    write(tmp_path, "empty.json", [])
    alignments = Alignments(tmp_path)
    alignments.require(["set/a 1", "byte", "own", "empty"])
    assert alignments.times_s("set/a 1", ["a", "b"], 1.0) == [0.5, 1.0]
    assert alignments.times_s("byte", ["<0xC3>", "<0xA4>"], 1.0) == [0.1, 0.2]
    assert alignments.times_s("own", ["anything"], 1.0) == [0.0]
    assert alignments.times_s("empty", [], 1.0) == []


def test_no_folder_and_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no folder of alignments at .*nowhere; make them"):
        Alignments(tmp_path / "nowhere")
    write(tmp_path, "a.json", [])
    message = r"no alignments of 2 of 3 utterances, e.g. b_1.json of 'b 1'; make .*transducer-align"
    with pytest.raises(ValueError, match=message):
        Alignments(tmp_path).require(["a", "b 1", "c"])
    with pytest.raises(ValueError, match=r"no alignment at .*b.json; make them with: transducer-a"):
        Alignments(tmp_path).times_s("b", [], 1.0)


@pytest.mark.parametrize(
    "tokens, message",
    [
        ([], r"a.json: expected the 1 symbols \['a'\] of the text, got 0: \[\]; align with the"),
        ([{"symbol": "b", "time_s": 0.5}], r"expected the 1 symbols \['a'\] .*got 1: \['b'\]"),
        ([{"symbol": "a", "time_s": 1.5}], "expected times within 1 s, the utterance, got 1.5"),
        ([{"symbol": "a"}], "a.json: expected an object with 'tokens', .* KeyError: 'time_s'"),
        ([{"time_s": "0"}], "TypeError: time_s is '0'"),
        ([{"time_s": True}], "TypeError: time_s is True"),
        ([{"time_s": -0.1}], "ValueError: time_s is -0.1"),
        ([{"time_s": float("nan")}], "ValueError: time_s is nan"),
        ([0.5], "expected an object with 'tokens'"),
        ({"a": 1}, "expected an object with 'tokens'"),
        (None, "expected an object with 'tokens'"),
    ],
)
def test_files_that_do_not_fit(tmp_path, tokens, message):
    write(tmp_path, "a.json", tokens)
    with pytest.raises(ValueError, match=message):
        Alignments(tmp_path).times_s("a", ["a"], 1.0)


@pytest.mark.parametrize("content", [b"", b"[]", b"\xff", b"{", b'{"tokens": 1}'])
def test_files_that_are_no_alignments(tmp_path, content):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"a.json: expected an object with 'tokens'"):
        Alignments(tmp_path).times_s("a", ["a"], 1.0)


def test_times_that_fall_and_deep_files(tmp_path):
    write(tmp_path, "a.json", [{"time_s": 0.5}, {"time_s": 0.4}])
    with pytest.raises(
        ValueError, match=r"a.json: expected times that do not fall, got \[0.5, 0.4"
    ):
        Alignments(tmp_path).times_s("a", ["a", "b"], 1.0)
    (tmp_path / "a.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"a.json: expected an object .* RecursionError"):
        Alignments(tmp_path).times_s("a", ["a"], 1.0)
    write(tmp_path, "a.json", [{"symbol": "x" * 10**4, "time_s": 0.0}] * 1000)
    with pytest.raises(ValueError, match=r"a.json: expected the 1 symbols") as raised:
        Alignments(tmp_path).times_s("a", ["a"], 1.0)
    assert len(str(raised.value)) < 1000


def test_file_names(tmp_path):
    assert file_names(["a/b c", "../up", "\u00e9.1-2+3"]) == ["a_b_c", ".._up", "\u00e9.1-2+3"]
    with pytest.raises(ValueError, match="the ids 'a b' and 'a/b' would share the file 'a_b'"):
        file_names(["a b", "a/b"])
    with pytest.raises(ValueError, match=r"the ids 'a b' and 'a/b' would.*rename one of them"):
        Alignments(tmp_path).require(["a b", "a/b"])
