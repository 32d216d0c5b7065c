# SPDX-License-Identifier: Apache-2.0
import json

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

    # The errors of the utterances add up to those of the set.
    results = json.loads((run_dir / "results.json").read_text())
    total = results["test_sets"]["tones"]
    rows = [json.loads(line) for line in (run_dir / "errors" / "tones.jsonl").open()]
    assert len(rows) == 6 and "CER %" in out and total["rtf"] > 0
    for unit in ("words", "characters"):
        for kind in ("substitutions", "deletions", "insertions", "reference"):
            assert total[unit][kind] == sum(row[unit][kind] for row in rows)
        errors = sum(total[unit][kind] for kind in ("substitutions", "deletions", "insertions"))
        assert total[unit]["rate"] == errors / total[unit]["reference"]
    assert total["duration_s"] == pytest.approx(sum(row["duration_s"] for row in rows), abs=0.01)


def test_the_search_is_chosen_on_the_command_line(tmp_path, console, trained, data_overrides):
    def transcripts(name, *overrides):
        (tmp_path / name).mkdir()
        checkpoint = f"checkpoint={trained}/checkpoints/best.ckpt"
        arguments = [checkpoint, *data_overrides, "trainer.accelerator=cpu", *overrides]
        console(main, tmp_path / name, *arguments, "~callbacks.utterance_picture")
        run_dir = tmp_path / name / "outputs" / "evaluate" / "run"
        search = json.loads((run_dir / "results.json").read_text())["search"]
        return (run_dir / "transcripts" / "tones.tsv").read_text(), search

    one_a_frame, search = transcripts("greedy", "search.max_symbols_per_frame=1")
    assert search["max_symbols_per_frame"] == 1
    beam_of_one, search = transcripts("beam", "search=modified_beam", "search.beam=1")
    assert search["beam"] == 1 and search["_target_"].endswith("ModifiedBeamSearch")
    assert beam_of_one == one_a_frame


def test_evaluate_needs_a_checkpoint(tmp_path, console, data_overrides, capsys):
    with pytest.raises(SystemExit):
        console(main, tmp_path, *data_overrides)
    assert "checkpoint" in capsys.readouterr().err
