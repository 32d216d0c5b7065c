# SPDX-License-Identifier: Apache-2.0
import pytest
import soundfile
import torch

from transducer_toolkit.cli.transcribe import main


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
