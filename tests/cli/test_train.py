# SPDX-License-Identifier: Apache-2.0
import csv
import json
import subprocess
import sys

import pytest
import torch

from transducer_toolkit.cli.train import main
from transducer_toolkit.data.manifest import read_manifest
from transducer_toolkit.inference.recognizer import Recognizer

MODES = ("packed", "full", "fused", "simple", "smoothed", "pruned", "fused_pruned", "torchaudio")

EXPECTED_FILES = [
    "checkpoints/best.ckpt",
    "checkpoints/last.ckpt",
    "pictures/learning_curves.png",
    "pictures/utterance.png",
    "transcripts/tones.tsv",
    "metrics/metrics.csv",
    "results.json",
    "train.log",
    ".hydra/config.yaml",
]


def loss_of(run_dir):
    """Training loss by step, as logged."""
    with open(run_dir / "metrics" / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    return {int(row["step"]): float(row["train/loss"]) for row in rows if row["train/loss"]}


def test_a_run_leaves_everything_behind(trained, tones):
    for name in EXPECTED_FILES:
        assert (trained / name).stat().st_size > 0, name
    assert list((trained / "tensorboard").glob("events.*"))
    results = json.loads((trained / "results.json").read_text())
    assert results["optimizer_steps"] == 8
    assert set(results["test_wer"]) == {"tones"}
    delay = results["symbol_delay_ms"]["tones"]
    words = [row.text.split() for row in read_manifest(tones / "test.jsonl")]
    assert delay["words"] == sum(map(len, words))
    assert all(-1000 < delay[name] < 1500 for name in ("mean", "median"))
    with open(trained / "metrics" / "metrics.csv") as file:
        logged = [row["test/symbol_delay_ms/tones"] for row in csv.DictReader(file)]
    assert [float(value) for value in logged if value] == [pytest.approx(delay["mean"])]
    rows = (trained / "transcripts" / "tones.tsv").read_text().splitlines()
    assert rows[0] == "id\treference\thypothesis" and len(rows) == 7
    log = (trained / "train.log").read_text()
    assert "validation WER" in log and "  ref " in log and "  hyp " in log


def test_checkpoints_load_with_weights_only(trained):
    for name in ("best", "last"):
        checkpoint = torch.load(trained / "checkpoints" / f"{name}.ckpt", weights_only=True)
        assert checkpoint["recognizer"]["symbols"] == ["<blk>", "\u2581", "a", "b", "c"]


def test_the_same_seed_gives_the_same_training(tmp_path, console, train_overrides, trained):
    console(main, tmp_path, *train_overrides, "test=false")
    again = tmp_path / "outputs" / "transducer" / "run"
    assert loss_of(again) == loss_of(trained)
    assert not (again / "transcripts").exists()


def test_resume_continues_where_it_stopped(tmp_path, console, train_overrides, trained):
    options = [*train_overrides, "scheduler=constant"]
    console(main, tmp_path, *options, "name=whole")
    console(main, tmp_path, *options, "name=first", "trainer.max_epochs=1")
    outputs = tmp_path / "outputs"
    console(
        main, tmp_path, *options, "name=second", "ckpt_path=outputs/first/run/checkpoints/last.ckpt"
    )
    whole, first, second = (
        loss_of(outputs / name / "run") for name in ("whole", "first", "second")
    )
    assert list(first) == [0, 1, 2, 3] and list(second) == [4, 5, 6, 7]
    assert {**first, **second} == pytest.approx(whole, rel=1e-4)
    # The learning curves are those of the whole training.
    last = torch.load(outputs / "second/run/checkpoints/last.ckpt", weights_only=True)
    history = last["callbacks"]["LearningCurves"]["history"]
    assert len(history["train/loss"]) == 8 and len(history["val/wer"]) == 2


def test_fast_dev_run(tmp_path, console, train_overrides, capsys):
    console(main, tmp_path, *train_overrides, "+trainer.fast_dev_run=true")
    out = capsys.readouterr().out
    assert "test set" in out and "tones" in out


def test_checkpoints_carry_the_topology_of_the_loss(tmp_path, console, train_overrides, trained):
    options = ["loss.topology=one_sym_per_frame", "test=false", "trainer.max_epochs=1"]
    console(main, tmp_path, *train_overrides, *options)
    paths = [trained, tmp_path / "outputs" / "transducer" / "run"]
    topologies = [
        torch.load(path / "checkpoints/last.ckpt", weights_only=True)["recognizer"]["topology"]
        for path in paths
    ]
    assert topologies == ["regular", "one_sym_per_frame"]


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_trains_decodes_and_starts_from_another(mode, tmp_path, console, train_overrides,
                                                           trained):  # fmt: skip
    start = f"init_from={trained}/checkpoints/best.ckpt"
    options = [f"loss={mode}", start]
    if mode != "torchaudio":
        options.append("loss.delay_penalty=0.01")
    console(main, tmp_path, *train_overrides, *options)
    folder = tmp_path / "outputs" / "transducer" / "run"
    report = json.loads((folder / "results.json").read_text())
    assert report["test_wer"]["tones"] >= 0 and 0 < report["loss_part_of_step"] < 1
    assert report["peak_memory_mib"] >= 0
    # The checkpoint restores the joiner that was trained, and what was not found is named.
    recognizer = Recognizer.from_checkpoint(folder / "checkpoints" / "best.ckpt")
    is_additive = mode in ("simple", "smoothed")
    assert type(recognizer.model.joiner).__name__ == ("AdditiveJoiner" if is_additive else "Joiner")
    log = (folder / "train.log").read_text()
    assert "weights taken over from" in log
    assert ("not in the checkpoint, or of another size" in log) == (is_additive or "pruned" in mode)
    assert ("in the checkpoint, but not used: model.joiner" in log) == is_additive


def test_start_from_needs_a_checkpoint_that_fits(
    tmp_path, console, train_overrides, trained, capsys
):
    with pytest.raises(SystemExit):
        console(main, tmp_path, *train_overrides, "init_from=nowhere.ckpt")
    assert "no checkpoint at nowhere.ckpt" in capsys.readouterr().err


def test_multirun_gives_each_job_a_folder(tmp_path, console, train_overrides):
    console(main, tmp_path, "--multirun", *train_overrides, "loss=packed,torchaudio", "test=false")
    folders = [tmp_path / "outputs" / "transducer" / "run" / job for job in ("0", "1")]
    packed, torchaudio = map(loss_of, folders)
    assert packed == pytest.approx(torchaudio, rel=1e-3)
    assert packed != torchaudio


def test_multirun_refuses_to_start_processes(tmp_path, console, train_overrides, capsys):
    with pytest.raises(SystemExit):
        options = ["trainer=ddp", "trainer.devices=2"]
        console(main, tmp_path, "--multirun", *train_overrides, *options)
    assert "--multirun cannot start the processes of trainer=ddp" in capsys.readouterr().err


def test_global_normalization_estimates_its_statistics(tmp_path, console, train_overrides):
    options = ["model.encoder.normalization=global", "test=false", "trainer.max_epochs=1"]
    console(main, tmp_path, *train_overrides, *options)
    path = tmp_path / "outputs" / "transducer" / "run" / "checkpoints" / "last.ckpt"
    weights = torch.load(path, weights_only=True)["state_dict"]
    assert bool(weights["model.encoder.normalizer.has_statistics"])
    assert (weights["model.encoder.normalizer.std"] > 0.1).all()


def test_lstm_predictor(tmp_path, console, train_overrides):
    options = [o for o in train_overrides if not o.startswith("model.predictor")]
    console(main, tmp_path, *options, "model=conv_lstm_lstm", "+trainer.fast_dev_run=true")


def test_a_loss_that_is_not_finite_ends_the_training(tmp_path, console, train_overrides):
    with pytest.raises(SystemExit), pytest.MonkeyPatch.context() as patch:
        patch.setenv("HYDRA_FULL_ERROR", "0")
        console(main, tmp_path, *train_overrides, "optimizer.lr=1e30", "optimizer.fused=false")


def test_help_is_quick_because_it_imports_nothing_heavy(tmp_path):
    code = "import sys; import transducer_toolkit.cli.train; print('lightning' in sys.modules)"
    output = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, check=True, text=True
    )
    assert output.stdout.strip() == "False"
