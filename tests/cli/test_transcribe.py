# SPDX-License-Identifier: Apache-2.0
import io
import json
import os
import re
import sys
from functools import partial

import numpy as np
import pytest
import soundfile
import torch

from transducer_toolkit.cli.transcribe import main
from transducer_toolkit.data.audio import read_audio
from transducer_toolkit.decoding import BeamSearch
from transducer_toolkit.inference.recognizer import Recognizer


@pytest.fixture
def checkpoint(trained):
    return trained / "checkpoints" / "best.ckpt"


def test_prints_file_tab_text(checkpoint, tones, trained, capsys):
    files = [str(tones / f"test-{index}.wav") for index in range(6)]
    assert main(["--checkpoint", str(checkpoint), *files]) == 0
    rows = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert [row[0] for row in rows] == files
    # One file at a time gives what the batches of the test gave.
    table = [line.split("\t") for line in (trained / "transcripts/tones.tsv").open()][1:]
    assert [row[1] for row in rows] == [row[2].rstrip("\n") for row in table]


def test_reads_other_rates_and_channels(checkpoint, tones, tmp_path):
    samples, _ = soundfile.read(tones / "test-0.wav")
    soundfile.write(tmp_path / "stereo.flac", samples[:, None].repeat(2, 1), 44100)
    assert main(["--checkpoint", str(checkpoint), str(tmp_path / "stereo.flac")]) == 0


def test_goes_on_after_a_bad_file(checkpoint, tones, tmp_path, capsys):
    (tmp_path / "text.wav").write_text("no audio")
    files = [tmp_path / "missing.wav", tmp_path / "text.wav", tones / "test-0.wav"]
    assert main(["--checkpoint", str(checkpoint), *map(str, files)]) == 1
    captured = capsys.readouterr()
    assert len(captured.out.splitlines()) == 1
    assert "missing.wav" in captured.err and "cannot be read as audio" in captured.err
    assert "1 of 3 files" in captured.err


def test_a_pipe_or_a_device_that_is_not_there_is_refused(checkpoint, tones, tmp_path, capsys):
    os.mkfifo(tmp_path / "pipe.wav")  # to open it would wait for a writer
    arguments = ["--checkpoint", str(checkpoint)]
    assert main([*arguments, str(tmp_path / "pipe.wav")]) == 1
    assert "pipe.wav cannot be read as audio: it is no regular file" in capsys.readouterr().err
    assert main([*arguments, str(tones / "test-0.wav"), "--device", "abacus"]) == 1
    assert "device 'abacus' cannot be used" in capsys.readouterr().err


def test_says_what_is_wrong_with_a_checkpoint(tones, tmp_path, capsys):
    wave = str(tones / "test-0.wav")

    def complaint(path):
        assert main(["--checkpoint", str(path), wave]) == 1
        return capsys.readouterr().err

    assert "no checkpoint at" in complaint(tmp_path / "none.ckpt")
    assert "is not a checkpoint of transducer-train" in complaint(wave)
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    assert "holds no 'recognizer' entry" in complaint(tmp_path / "other.ckpt")
    torch.save({"recognizer": {"format_version": 99}}, tmp_path / "future.ckpt")
    assert "has the recognizer format 99" in complaint(tmp_path / "future.ckpt")


def test_help(capsys):
    with pytest.raises(SystemExit) as exit_info:
        main(["--help"])
    assert exit_info.value.code == 0
    assert "--checkpoint" in capsys.readouterr().out


@pytest.fixture
def transcribe(checkpoint, capsys):
    """Run the command; returns exit status, standard output, standard error."""

    def run(*arguments):
        status = main(["--checkpoint", str(checkpoint), *map(str, arguments)])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


def test_folders_formats_and_output(transcribe, tones, tmp_path):
    folder = tmp_path / "recordings" / "deep"
    folder.mkdir(parents=True)
    (folder.parent / "readme.txt").write_text("no audio")
    for index in range(2):
        (folder / f"{index}.WAV").write_bytes((tones / f"test-{index}.wav").read_bytes())
    status, out, err = transcribe(folder.parent, "--format", "json")
    rows = [json.loads(line) for line in out.splitlines()]
    assert status == 0 and [row["audio"] for row in rows] == [
        str(folder / "0.WAV"),
        str(folder / "1.WAV"),
    ]
    for row in rows:
        assert row["text"] == " ".join(word["word"] for word in row["words"])
        assert all(0 <= word["confidence"] <= 1 for word in row["words"])
    assert "2 of 2 files" in err and "real-time factor" in err

    # One file for each recording in a folder, or one for all of them.
    assert transcribe(folder.parent, "--format", "srt", "--output", f"{tmp_path}/srt/")[0] == 0
    assert (tmp_path / "srt" / "deep" / "1.srt").exists()
    status, out, _ = transcribe(folder.parent, "--format", "ctm", "--output", tmp_path / "all.ctm")
    num_words = sum(len(row["words"]) for row in rows)
    assert (status, out) == (0, "")
    assert len((tmp_path / "all.ctm").read_text().splitlines()) == num_words > 0


def test_search_and_windows_are_options(transcribe, checkpoint, tones):
    wave = tones / "test-0.wav"
    assert transcribe(wave, "--max-symbols-per-frame", 1)[0] == 0
    one = ("--max-symbols-per-frame", 1)
    status, found, _ = transcribe(wave, "--beam", 2, *one)
    expected = Recognizer.from_checkpoint(
        checkpoint, search=partial(BeamSearch, beam=2, max_symbols_per_frame=1)
    ).transcribe([read_audio(wave)])
    assert (status, found) == (0, f"{wave}\t{expected[0]}\n")
    for name in ("beam", "modified_beam"):
        assert transcribe(wave, "--search", name, "--beam", 2, *one)[1] == found
    with_default = Recognizer.from_checkpoint(checkpoint, search=BeamSearch)
    assert (
        transcribe(wave, "--search", "beam")[1].split("\t")[1].rstrip("\n")
        == (with_default.transcribe([read_audio(wave)])[0])
    )
    assert with_default.search.topology.name == "regular"
    assert transcribe(wave, "--window-s", 1, "--overlap-s", 0.5)[0] == 0


def test_hotwords_are_options(transcribe, tones, tmp_path):
    wave, names = tones / "test-0.wav", tmp_path / "names.txt"
    names.write_text("cbc\n")
    _, plain, _ = transcribe(wave)
    assert transcribe(wave, "--hotwords", names, "--hotwords-score", 0)[1] == plain
    for search in (["--max-symbols-per-frame", 1], ["--search", "modified_beam"]):
        options = [*search, "--hotwords", names, "--hotwords-score", 20]
        status, out, _ = transcribe(wave, *options)
        assert status == 0 and "cbc" in out and "cbc" not in plain
    status, out, err = transcribe(wave, "--internal-lm", "model", "--internal-lm-weight", 50)
    assert status == 0 and out != plain
    names.write_text("AAA\n")
    status, _, err = transcribe(wave, "--hotwords", names)
    assert status == 1 and "names.txt, line 1: character 'A'" in err and "Traceback" not in err
    assert transcribe(wave, "--hotwords", names, "--hotwords-case", "variants")[0] == 0
    status, _, err = transcribe(wave, "--lm", names)
    assert status == 1 and r"names.txt, line 1: expected \data\, got 'AAA'" in err


def test_output_that_cannot_be_is_refused(transcribe, tones, tmp_path):
    waves = [tones / "test-0.wav", tones / "test-1.wav"]
    status, _, err = transcribe(*waves, "--format", "srt", "--output", tmp_path / "all.srt")
    assert status == 1 and "must be a folder" in err
    assert transcribe(*waves, "--format", "srt")[0] == 1
    (tmp_path / "test-0.flac").write_bytes(b"")
    status, _, err = transcribe(waves[0], tmp_path / "test-0.flac", "--output", f"{tmp_path}/o/")
    assert status == 1 and "would both be written to" in err
    (tmp_path / "none").mkdir()
    status, _, err = transcribe(tmp_path / "none")
    assert status == 1 and "no audio files in the folder" in err


def test_channels(transcribe, tones, tmp_path):
    left, right = (soundfile.read(tones / f"test-{k}.wav")[0] for k in range(2))
    size = min(len(left), len(right))
    stereo = tmp_path / "stereo.wav"
    soundfile.write(stereo, np.stack([left[:size], right[:size]], axis=1), 16000)
    texts = []
    for channel, samples in enumerate((left, right)):
        soundfile.write(tmp_path / f"{channel}.wav", samples[:size], 16000)
        _, alone, _ = transcribe(tmp_path / f"{channel}.wav")
        texts.append(alone.rstrip("\n").split("\t")[1])
        _, out, _ = transcribe(stereo, "--channel", channel)
        assert out == f"{stereo}\t{texts[-1]}\n"
    status, out, _ = transcribe(stereo, "--channel", "each")
    assert status == 0
    assert out == "".join(f"{stereo}\t{k}\t{text}\n" for k, text in enumerate(texts))
    assert transcribe(stereo, "--channel", "each", "--output", f"{tmp_path}/out/")[0] == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "stereo.channel0.txt",
        "stereo.channel1.txt",
    ]
    status, _, err = transcribe(stereo, "--channel", "each", "--format", "srt")
    assert status == 1 and "with --channel each --output must be a folder" in err
    status, _, err = transcribe(stereo, "--channel", 2)
    assert status == 1 and "there is no channel=2" in err
    status, _, err = transcribe(tmp_path / "none.wav", "--channel", "each")
    assert status == 1 and "no audio file" in err
    # Opposite phases cancel each other.
    soundfile.write(stereo, np.stack([left, -left], axis=1), 16000)
    status, _, err = transcribe(stereo)
    assert status == 1 and "channels cancel each other" in err


@pytest.mark.parametrize(
    ("name", "start"),
    [
        ("a.srt", r"1\n00:"),
        ("a.json", r'\{"audio": '),
        ("a.CTM", r"/\S+ 1 \d"),
        ("a.txt", r"/\S+\t"),
    ],
)
def test_the_suffix_of_the_output_chooses_the_format(checkpoint, tones, tmp_path, name, start):
    wave = str(tones / "test-1.wav")
    arguments = ["--checkpoint", str(checkpoint), wave, "--output", str(tmp_path / name)]
    assert main(arguments) == 0
    written = (tmp_path / name).read_text()
    assert re.match(start, written)
    assert main([*arguments, "--format", "json"]) == 0
    assert json.loads((tmp_path / name).read_text())["audio"] == wave


@pytest.mark.parametrize("place", [1, 2])
def test_an_empty_argument_is_named(place, checkpoint, capsys):
    arguments = ["--checkpoint", str(checkpoint), "a.wav"]
    arguments[place] = ""
    assert main(arguments) == 1
    message = f"argument {place + 1} after {arguments[place - 1]!r} is empty; remove it, or set the"
    assert f"transducer-transcribe: {message}" in capsys.readouterr().err


def test_the_folder_of_a_run_is_no_checkpoint(trained, tmp_path, capsys):
    assert main(["--checkpoint", str(trained), "a.wav"]) == 1
    best = trained / "checkpoints" / "best.ckpt"
    message = f"no checkpoint at {trained}: it is a folder, give a file, such as {best}"
    assert message in capsys.readouterr().err
    assert main(["--checkpoint", str(tmp_path), "a.wav"]) == 1
    assert "it is a folder, and it contains no checkpoint" in capsys.readouterr().err


def test_a_folder_is_transcribed_in_batches(checkpoint, tones, capsys, monkeypatch):
    sizes = []
    recognize = Recognizer.recognize
    monkeypatch.setattr(
        Recognizer, "recognize", lambda self, x: sizes.append(len(x)) or recognize(self, x)
    )
    assert main(["--checkpoint", str(checkpoint), str(tones)]) == 0
    num_files = len(list(tones.glob("*.wav")))
    assert sum(sizes) == num_files > 20 and len(sizes) < num_files / 10
    paths = [line.split("\t")[0] for line in capsys.readouterr().out.splitlines()]
    assert paths == sorted(map(str, tones.glob("*.wav")))

    num_batches = len(sizes)
    sizes.clear()
    options = ["--batch-size", "1", "--window-s", "2", "--overlap-s", "1", "--cut", "windows"]
    assert main(["--checkpoint", str(checkpoint), *options, str(tones)]) == 0
    assert sum(sizes) >= num_files and len(sizes) > 3 * num_batches


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--search", "greedy", "--beam", "3"], "--beam is an option of --search beam"),
        (["--beam", "0"], "--beam must be at least 1, got 0"),
        (["--beam", "3", "--max-symbols-per-frame", "0"], "-per-frame must be at least 1, got 0"),
        (["--window-s", "10", "--overlap-s", "6"], "--overlap-s at most half of it, got 10 and 6"),
        (["--window-s", "inf"], "--window-s must be at least 1"),
        (["--channel", "left"], "expected mix, each or a number from 0, got 'left'"),
        (["--batch-size", "0"], "--batch-size must be at least 1, got 0"),
        (["--cut", "words"], "invalid choice: 'words'"),
        (["--lm-weight", "1"], "--lm-weight is an option of --lm"),
        (["--hotwords-score", "1"], "--hotwords-score is an option of --hotwords"),
        (["--num-threads", "0"], "argument --num-threads: must be at least 1, got 0"),
    ],
)
def test_options_that_do_not_fit_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit):
        main(["--checkpoint", "best.ckpt", "a.wav", *arguments])
    assert message in capsys.readouterr().err


def test_a_terminal_gets_a_progress_bar_on_standard_error(checkpoint, tones, monkeypatch, capsys):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr("sys.stderr", Terminal())
    monkeypatch.setenv("TERM", "xterm")
    wave = str(tones / "test-0.wav")
    assert main(["--checkpoint", str(checkpoint), wave, wave + ".none"]) == 1
    shown = sys.stderr.getvalue()
    assert "━" in shown and "noaudiofileat" in "".join(shown.split())  # long lines are wrapped
    assert capsys.readouterr().out.startswith(wave + "\t")
