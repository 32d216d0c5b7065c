# SPDX-License-Identifier: Apache-2.0
import json

import pytest
import soundfile

from transducer_toolkit.cli.align import main
from transducer_toolkit.data.manifest import Utterance, read_manifest, write_manifest

TOKEN_FIELDS = ["symbol", "frame", "time_s", "posterior", "expected_time_s"]


@pytest.fixture
def align(trained):
    """Run the command with the trained checkpoint; returns the exit status."""

    def run(*arguments):
        checkpoint = str(trained / "checkpoints" / "best.ckpt")
        return main(["--checkpoint", checkpoint, *map(str, arguments)])

    return run


@pytest.fixture
def utterance(tones):
    return read_manifest(tones / "test.jsonl")[0]


def check_json(row, utterance, *, topology="regular"):
    assert row["id"] == utterance.id and row["text"] == utterance.text
    assert row["topology"] == topology and row["frame_s"] == 0.04
    assert "".join(token["symbol"] for token in row["tokens"]) == utterance.text.replace(
        " ", "\u2581"
    )
    frames = [token["frame"] for token in row["tokens"]]
    assert frames == sorted(frames) and frames[-1] < row["num_frames"]
    for token in row["tokens"]:
        assert list(token) == TOKEN_FIELDS
        assert token["time_s"] == pytest.approx(0.04 * token["frame"])
        assert 0 < token["posterior"] <= 1
        assert 0 <= token["expected_time_s"] < utterance.duration_s + 0.04
    assert [word["word"] for word in row["words"]] == utterance.text.split()
    assert all(word["start_s"] < word["end_s"] for word in row["words"])
    assert row["words"][0]["start_s"] == row["tokens"][0]["time_s"]
    assert row["words"][-1]["end_s"] == pytest.approx(row["tokens"][-1]["time_s"] + 0.04)
    assert row["path_log_prob"] <= row["log_likelihood"] + 1e-5


def test_a_manifest_in_all_formats(align, tones, tmp_path, capsys):
    folder = tmp_path / "new" / "folder"
    assert align("--manifest", tones / "test.jsonl", "--output-dir", folder) == 0
    assert f"6 of 6 utterances aligned, see {folder}" in capsys.readouterr().out
    utterances = read_manifest(tones / "test.jsonl")
    expected = {f"{u.id}.{suffix}" for u in utterances for suffix in ("json", "png")}
    assert {path.name for path in folder.iterdir()} == expected | {"alignment.ctm"}
    ctm = [line.split(" ") for line in (folder / "alignment.ctm").read_text().splitlines()]
    for utterance in utterances:
        row = json.loads((folder / f"{utterance.id}.json").read_text())
        check_json(row, utterance)
        assert (folder / f"{utterance.id}.png").read_bytes().startswith(b"\x89PNG")
        lines = [line for line in ctm if line[0] == utterance.id]
        assert [line[4] for line in lines] == utterance.text.split()
        for line, word in zip(lines, row["words"], strict=True):
            assert line[1] == "1" and float(line[2]) == pytest.approx(word["start_s"])
            assert float(line[2]) + float(line[3]) == pytest.approx(word["end_s"])


def test_text_and_file_on_standard_output(align, utterance, capsys):
    assert align("--text", utterance.text, utterance.audio) == 0
    lines = [line.split(" ") for line in capsys.readouterr().out.splitlines()]
    assert [line[4] for line in lines] == utterance.text.split()
    assert {line[0] for line in lines} == {utterance.id}
    assert align("--text", utterance.text, utterance.audio, "--format", "json") == 0
    check_json(json.loads(capsys.readouterr().out), utterance)
    assert align("--text", "", utterance.audio) == 0
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("topology", ["modified", "constrained", "one_sym_per_frame"])
def test_topology(align, utterance, tmp_path, topology):
    options = ["--topology", topology, "--format", "json,png", "--output-dir", tmp_path]
    assert align("--text", utterance.text, utterance.audio, *options) == 0
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".png"}
    row = json.loads((tmp_path / f"{utterance.id}.json").read_text())
    check_json(row, utterance, topology=topology)
    frames = [token["frame"] for token in row["tokens"]]
    assert len(set(frames)) == len(frames)


def test_a_part_of_a_file(align, utterance, tmp_path, capsys):
    """What a manifest cuts out of a longer file is aligned as the file of its own."""
    samples, rate = soundfile.read(utterance.audio)
    padded = [*(0.1 for _ in range(rate)), *samples, *(0.1 for _ in range(rate))]
    soundfile.write(tmp_path / "long.wav", padded, rate)
    row = Utterance(
        id=utterance.id,
        audio=str(tmp_path / "long.wav"),
        offset_s=1.0,
        duration_s=utterance.duration_s,
        text=utterance.text,
    )
    write_manifest(tmp_path / "part.jsonl", [row])
    assert align("--manifest", tmp_path / "part.jsonl") == 0
    part = capsys.readouterr().out
    assert align("--text", utterance.text, utterance.audio) == 0
    assert capsys.readouterr().out == part


def test_a_topology_that_the_joiner_does_not_fit_is_an_error(align, tones, capsys):
    arguments = ["--manifest", tones / "test.jsonl", "--format", "ctm", "--topology", "tdt-0-1-2"]
    assert align(*arguments) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "topology: 'tdt-0-1-2' needs a joiner with 3 logits" in line


def test_goes_on_after_what_cannot_be_aligned(align, tones, tmp_path, capsys):
    rows = read_manifest(tones / "test.jsonl")[:2]
    rows += [
        Utterance(id="symbol", audio=rows[0].audio, duration_s=0.1, text="ab x"),
        Utterance(id="short", audio=rows[0].audio, duration_s=0.05, text="abcabc"),
        Utterance(id="missing", audio=str(tmp_path / "none.wav"), duration_s=0.1, text="a"),
    ]
    write_manifest(tmp_path / "mixed.jsonl", rows)
    arguments = ["--manifest", tmp_path / "mixed.jsonl", "--output-dir", tmp_path / "out"]
    assert align(*arguments, "--format", "ctm", "--topology", "modified") == 1
    captured = capsys.readouterr()
    assert "2 of 5 utterances aligned" in captured.out
    problems = captured.err.splitlines()
    assert "symbol: character 'x' of 'ab x' is not among" in problems[0]
    assert "short: the audio is too short for its text: 2 encoder frames" in problems[1]
    assert "missing: no audio file at" in problems[2]
    names = {line.split()[0] for line in (tmp_path / "out/alignment.ctm").read_text().splitlines()}
    assert names == {rows[0].id, rows[1].id}
    # A lattice of the regular topology has room for any text.
    assert align(*arguments, "--format", "ctm") == 1
    assert "3 of 5 utterances aligned" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give either --text TEXT and one audio FILE, or --manifest PATH"),
        (["a.wav"], "give either --text TEXT and one audio FILE"),
        (["--text", "a"], "give either --text TEXT and one audio FILE"),
        (["--manifest", "m", "a.wav"], "give neither FILE nor --text"),
        (["--manifest", "m", "--text", "a"], "give neither FILE nor --text"),
        (
            ["--manifest", "m", "--format", "txt"],
            "--format: expected some of json, ctm, png; got 'txt'",
        ),
        (["--manifest", "m", "--format", "png"], "--format png needs --output-dir"),
        (["--manifest", "m", "--format", "ctm,json"], "--format ctm,json needs --output-dir"),
        (["--manifest", "m", "--topology", "ctc"], "--topology: expected one of ('regular', "),
    ],
)
def test_usage(align, capsys, arguments, message):
    with pytest.raises(SystemExit) as exit_info:
        align(*arguments)
    assert exit_info.value.code == 2
    assert message in capsys.readouterr().err


def test_says_what_is_wrong_with_its_files(align, tones, tmp_path, capsys):
    def complaint(*arguments):
        assert align(*arguments) == 1
        return capsys.readouterr().err

    assert "no audio file at" in complaint("--text", "a", tmp_path / "none.wav")
    text = tmp_path / "text.wav"
    text.write_text("no audio")
    assert "cannot be read as audio" in complaint("--text", "a", text)
    soundfile.write(tmp_path / "nothing.wav", [], 16000)
    assert "nothing.wav holds no samples" in complaint("--text", "a", tmp_path / "nothing.wav")
    assert "No such file" in complaint("--manifest", tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").write_text("")
    assert "holds no utterances" in complaint("--manifest", tmp_path / "empty.jsonl")
    wave = tones / "test-0.wav"
    assert "no checkpoint at" in complaint("--text", "a", wave, "--checkpoint", tmp_path / "no")
    assert "exists" in complaint("--text", "a", wave, "--output-dir", text)


def test_help(capsys):
    with pytest.raises(SystemExit) as exit_info:
        main(["--help"])
    assert exit_info.value.code == 0
    assert "--output-dir" in capsys.readouterr().out
