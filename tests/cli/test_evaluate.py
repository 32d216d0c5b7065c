# SPDX-License-Identifier: Apache-2.0
import pytest

from transducer_toolkit.cli.evaluate import main


def test_evaluate_prints_the_error_rates(tmp_path, console, trained, data_overrides, capsys):
    checkpoint = trained / "checkpoints" / "best.ckpt"
    console(main, tmp_path, f"checkpoint={checkpoint}", *data_overrides, "trainer.accelerator=cpu")
    out = capsys.readouterr().out
    assert "test set" in out and "tones" in out
    assert out.split("test set")[1].splitlines()[0].endswith("delay ms   median")
    run_dir = tmp_path / "outputs" / "evaluate" / "run"
    assert (run_dir / "pictures" / "utterance.png").stat().st_size > 0
    # What the training itself reported.
    transcripts = "transcripts/tones.tsv"
    assert (run_dir / transcripts).read_text() == (trained / transcripts).read_text()


def test_evaluate_needs_a_checkpoint(tmp_path, console, data_overrides, capsys):
    with pytest.raises(SystemExit):
        console(main, tmp_path, *data_overrides)
    assert "checkpoint" in capsys.readouterr().err
