# SPDX-License-Identifier: Apache-2.0
"""Conformer, CTC, averaging, accumulation and schedules from the command line."""

import csv
import json

import pytest
import torch

from tests.cli.conftest import with_pictures
from transducer_toolkit.cli.train import main
from transducer_toolkit.inference.recognizer import Recognizer

CONFORMER = [
    "model=conformer_s",
    "model.encoder.num_layers=1",
    "model.encoder.kernel_size=3",
]


def checkpoint_of(run_dir, name):
    return torch.load(run_dir / "checkpoints" / f"{name}.ckpt", weights_only=True)


@pytest.fixture(scope="module")
def conformer(tmp_path_factory, console, train_overrides):
    """The run folder of a Conformer, trained with everything."""
    folder = tmp_path_factory.mktemp("conformer")
    options = ["ctc.weight=0.3", "averaging=ema", "scheduler=noam"]
    options += ["trainer.accumulate_grad_batches=2", "scheduler.warmup_steps=2"]
    console(main, folder, *with_pictures(train_overrides), *CONFORMER, *options)
    return folder / "outputs" / "transducer" / "run"


def test_a_conformer_trains_with_everything(conformer):
    assert json.loads((conformer / "results.json").read_text())["optimizer_steps"] == 4
    with open(conformer / "metrics" / "metrics.csv") as file:
        rows = [row for row in csv.DictReader(file) if row["train/loss"]]
    assert rows and all(float(row["train/ctc"]) > 0 for row in rows)
    history = checkpoint_of(conformer, "last")["callbacks"]["LearningCurves"]["history"]
    assert [step for step, _ in history["train/loss"]] == [1, 2, 3, 4]


def test_the_recognizer_has_the_average_and_no_ctc_layer(conformer):
    checkpoint = checkpoint_of(conformer, "best")
    assert "ctc.output.weight" in checkpoint["state_dict"]
    recognizer = Recognizer.from_checkpoint(conformer / "checkpoints" / "best.ckpt")
    names = recognizer.model.state_dict().keys()
    assert not any("ctc" in name for name in names)
    present = checkpoint["current_model_state"]
    for name, value in recognizer.model.state_dict().items():
        assert torch.equal(value, checkpoint["state_dict"][f"model.{name}"])
    assert any(not torch.equal(value, checkpoint["state_dict"][k]) for k, value in present.items())


def test_resume_with_average_and_ctc(conformer, tmp_path, console, train_overrides):
    options = ["ctc.weight=0.3", "averaging=ema", "scheduler=constant", "trainer.max_epochs=3"]
    path = conformer / "checkpoints" / "last.ckpt"
    resume = [*options, "trainer.accumulate_grad_batches=2", "test=false", f"ckpt_path={path}"]
    console(main, tmp_path, *train_overrides, *CONFORMER, *resume)
    run_dir = tmp_path / "outputs" / "transducer" / "run"
    assert checkpoint_of(run_dir, "last")["global_step"] == 6
    assert checkpoint_of(run_dir, "last")["averaging_state"]["n_averaged"] == 6


def test_off_by_default(trained):
    checkpoint = checkpoint_of(trained, "last")
    assert "current_model_state" not in checkpoint
    assert not any(name.startswith("ctc") for name in checkpoint["state_dict"])
    with open(trained / "metrics" / "metrics.csv") as file:
        assert "train/ctc" not in next(csv.reader(file))


def test_a_checkpoint_with_ctc_starts_a_training_without(
    conformer, tmp_path, console, train_overrides
):
    start = f"init_from={conformer}/checkpoints/best.ckpt"
    options = [start, "model/predictor=lstm", "averaging=last", "+trainer.fast_dev_run=true"]
    console(main, tmp_path, *train_overrides, *CONFORMER, *options)
    log = (tmp_path / "outputs" / "transducer" / "run" / "train.log").read_text()
    assert "in the checkpoint, but not used: ctc.output.bias, ctc.output.weight" in log
