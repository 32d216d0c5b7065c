# SPDX-License-Identifier: Apache-2.0
"""Trainings that are killed, told to stop, and resumed."""

import csv
import json
import os
import signal
import subprocess
from pathlib import Path

import pytest
import torch

from tests.fork_server import python
from tests.training.recorder import recorded
from transducer_toolkit.cli import resume
from transducer_toolkit.cli.train import main
from transducer_toolkit.training.checkpoints import LastCheckpoint

ROOT = Path(__file__).parents[2]
RECORD = "+callbacks.record._target_=tests.training.recorder.RecordBatches"


def run(folder, *overrides):
    """A training in a process of its own; its run folder is called "run"."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "TRANSDUCER_TOOLKIT_RUN_ID": "run",
    }
    command = [python(), "-m", "transducer_toolkit.cli.train", *map(str, overrides)]
    return subprocess.run(
        command, cwd=folder, env=environment, timeout=600, capture_output=True, text=True
    )


def weights(run_dir):
    checkpoint = torch.load(run_dir / "checkpoints" / "last.ckpt", weights_only=True)
    return checkpoint["state_dict"] | {"step": torch.tensor(checkpoint["global_step"])}


@pytest.fixture(scope="session")
def options(train_overrides):
    return [
        *train_overrides,
        "name=tones",
        "test=false",
        RECORD,
        "callbacks.last_checkpoint.every_n_steps=1",
        "data.num_workers=1",  # workers fetch ahead of the training
        "model.encoder.dropout=0.1",
    ]


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory, console, options):
    folder = tmp_path_factory.mktemp("uninterrupted")
    console(main, folder, *options, f"+callbacks.record.path={folder}/batches")
    return recorded(folder / "batches"), weights(folder / "outputs/tones/run")


@pytest.mark.parametrize("name", ["SIGKILL", "SIGTERM"])
def test_a_training_stopped_in_mid_epoch_goes_on_with_the_next_batch(
    tmp_path, console, options, uninterrupted, name
):
    batches, final = uninterrupted
    assert [row[:2] for row in batches] == [[epoch, i] for epoch in (0, 1) for i in range(4)]
    record = f"+callbacks.record.path={tmp_path}/batches"
    # In the second epoch. The recorder comes before the checkpoint: a SIGKILL loses its step.
    kill = ["+callbacks.record.kill_after=7", f"+callbacks.record.signal_name={name}"]
    if name == "SIGKILL":
        stopped = run(tmp_path, *options, record, *kill)
        assert stopped.returncode == -signal.SIGKILL, stopped.stderr
    else:
        with pytest.raises(SystemExit) as error:
            console(main, tmp_path, *options, record, *kill)
        assert error.value.code == 143
    run_dir = tmp_path / "outputs/tones/run"
    done = 6 if name == "SIGKILL" else 7
    assert int(weights(run_dir)["step"]) == done
    console(main, tmp_path, *options, record)  # the same command
    assert recorded(tmp_path / "batches") == batches[:7] + batches[done:]
    found = weights(run_dir)
    assert found.keys() == final.keys()
    assert all(torch.equal(found[key], final[key]) for key in final)
    # Nothing of the first part is lost, and nothing half-written left.
    logged = []
    for path in (run_dir / "metrics/metrics.1.csv", run_dir / "metrics/metrics.csv"):
        with path.open() as file:
            logged += [int(row["step"]) for row in csv.DictReader(file) if row["train/loss"]]
    # (Lightning logs a step after its last hook: not the one that was stopped, nor what a SIGKILL
    # left in a buffer.)
    assert logged[-1] == 7 and (name == "SIGKILL" or logged == [0, 1, 2, 3, 4, 5, 7])
    assert sorted(path.name for path in (run_dir / "checkpoints").iterdir()) == [
        "best.ckpt",
        "last.ckpt",
    ]
    log = (run_dir / "train.log").read_text()
    assert "resuming from" in log and ("SIGTERM: step 7 is saved in" in log) == (name == "SIGTERM")


# Nothing but the end itself writes a checkpoint.
ONLY_AT_THE_END = [
    "callbacks.last_checkpoint.every_n_steps=null",
    "callbacks.last_checkpoint.every_minutes=null",
]
ENDS = {
    # name: options that end the training, the step of the checkpoint, exit status (None: success)
    "SIGINT": (["+callbacks.record.kill_after=7", "+callbacks.record.signal_name=SIGINT"], 7, 130),
    "SIGTERM": (
        ["+callbacks.record.kill_after=3", "+callbacks.record.signal_name=SIGTERM"],
        3,
        143,
    ),
    "an exception before a step": (
        ["+callbacks.record.kill_after=6", "+callbacks.record.raise_in=on_train_batch_start"],
        6,
        1,
    ),
    "an exception in the gradient": (
        ["+callbacks.record.kill_after=2", "+callbacks.record.raise_in=on_after_backward"],
        2,
        1,
    ),
    "an exception in a validation": (
        ["+callbacks.record.kill_after=4", "+callbacks.record.raise_in=on_validation_batch_start"],
        4,
        1,
    ),
}


@pytest.mark.parametrize("validates", [True, False])
@pytest.mark.parametrize("name", ENDS)
def test_whatever_ends_a_training_its_last_step_is_saved(
    tmp_path, console, options, uninterrupted, name, validates, capsys
):
    batches, final = uninterrupted
    end, step, status = ENDS[name]
    if not validates:
        if "validation" in name:
            pytest.skip("there is none")
        end = [*end, "+trainer.limit_val_batches=0"]
    record = f"+callbacks.record.path={tmp_path}/batches"
    with pytest.raises(SystemExit) as error:
        console(main, tmp_path, *options, *ONLY_AT_THE_END, record, *end)
    assert error.value.code == status
    path = "outputs/tones/run/checkpoints/last.ckpt"
    said = capsys.readouterr().out.splitlines()
    assert said[-1] == (
        f"step {step} is saved in {path}; to go on, repeat the command with ckpt_path={path}"
    )
    run_dir = tmp_path / "outputs/tones/run"
    assert int(weights(run_dir)["step"]) == step
    # The same command goes on, if nothing else has changed.
    again = [] if validates else ["+trainer.limit_val_batches=0"]
    console(main, tmp_path, *options, *ONLY_AT_THE_END, record, *again)
    assert recorded(tmp_path / "batches") == batches
    found = weights(run_dir)
    assert found.keys() == final.keys()
    assert all(torch.equal(found[key], final[key]) for key in final)
    report = json.loads((run_dir / "results.json").read_text())
    assert (report["optimizer_steps"], report["optimizer_steps_of_this_run"]) == (8, 8 - step)
    assert report["training_s"] >= report["training_s_of_this_run"] > 0


@pytest.mark.parametrize(
    ("limits", "step", "reached"),
    [
        (["trainer.max_epochs=1", "+trainer.check_val_every_n_epoch=2"], 4, "max_epochs"),
        (["trainer.max_epochs=3", "+trainer.check_val_every_n_epoch=2"], 12, "max_epochs"),
        (["trainer.max_epochs=10", "+trainer.max_steps=5"], 5, "max_steps"),
        (["trainer.max_epochs=10", "+trainer.max_steps=4"], 4, "max_steps"),
        (["trainer.max_epochs=-1", "+trainer.max_steps=3"], 3, "max_steps"),
        (["trainer.max_epochs=2", "+trainer.limit_val_batches=0"], 8, "max_epochs"),
        (["trainer.max_epochs=9", "+trainer.max_steps=6", "+trainer.val_check_interval=3",
          "+trainer.check_val_every_n_epoch=3"], 6, "max_steps"),
        (["trainer.max_epochs=1", "trainer.accumulate_grad_batches=3",
          "+trainer.limit_val_batches=0"], 2, "max_epochs"),
        (["trainer.max_epochs=2", "averaging=ema", "+trainer.max_steps=3"], 3, "max_steps"),
    ],
)  # fmt: skip
def test_a_limit_ends_a_training_with_a_checkpoint(
    tmp_path, console, train_overrides, limits, step, reached, capsys
):
    console(main, tmp_path, *train_overrides, *ONLY_AT_THE_END, "name=tones", *limits)
    path = "outputs/tones/run/checkpoints/last.ckpt"
    checkpoint = torch.load(tmp_path / path, weights_only=True)
    assert checkpoint["global_step"] == step
    assert ("current_model_state" in checkpoint) == ("averaging=ema" in limits)
    if "current_model_state" in checkpoint:  # the present weights and not twice the average
        present, average = checkpoint["current_model_state"], checkpoint["state_dict"]
        assert any(not torch.equal(present[name], average[name]) for name in present)
    assert capsys.readouterr().out.splitlines()[-1] == (
        f"step {step} is saved in {path}; to go on, repeat the command with ckpt_path={path} and "
        f"a larger trainer.{reached}"
    )


def test_a_training_goes_on_in_the_middle_of_the_epoch_that_a_limit_ended(
    tmp_path, console, options, capsys
):
    plain = [*options, *ONLY_AT_THE_END, "scheduler=constant"]
    console(main, tmp_path, *plain, f"+callbacks.record.path={tmp_path}/whole", "name=whole")
    record = f"+callbacks.record.path={tmp_path}/parts"
    console(main, tmp_path, *plain, record, "+trainer.max_steps=6")
    path = "outputs/tones/run/checkpoints/last.ckpt"
    console(main, tmp_path, *plain, record, "name=more", f"ckpt_path={path}")
    assert recorded(tmp_path / "parts") == recorded(tmp_path / "whole")
    whole, parts = (weights(tmp_path / f"outputs/{name}/run") for name in ("whole", "more"))
    assert all(torch.equal(parts[key], whole[key]) for key in whole)
    out = capsys.readouterr().out
    assert "2 steps in" in out and "; 8 steps in" in out


def test_a_second_ctrl_c_ends_at_once():
    last = LastCheckpoint("last.ckpt")
    last._receive(signal.SIGINT, None)
    with pytest.raises(KeyboardInterrupt):
        last._receive(signal.SIGINT, None)
    last._received = 0
    last._receive(signal.SIGTERM, None)  # a second SIGTERM changes nothing
    last._receive(signal.SIGTERM, None)
    assert last._received == signal.SIGTERM


def test_which_checkpoint(tmp_path):
    run_dir = tmp_path / "outputs" / "digits" / "now"
    other, job = (tmp_path / "outputs" / "digits" / name for name in ("before", "sweep/3"))

    def found(wanted):
        return resume.find_checkpoint(wanted, run_dir, name="digits")

    assert found(None) is None and found("auto") is None
    with pytest.raises(FileNotFoundError, match=r"no run of the name 'digits' has a checkpoints"):
        found("last")
    for age, folder in enumerate((job, other)):
        path = folder / "checkpoints" / "last.ckpt"
        path.parent.mkdir(parents=True)
        path.touch()
        os.utime(path, (1000 - age, 1000 - age))
    assert found("last") == str(job / "checkpoints" / "last.ckpt") and found("auto") is None
    own = run_dir / "checkpoints" / "last.ckpt"
    own.parent.mkdir(parents=True)
    own.touch()
    assert found("auto") == str(own) == found("last") == found(str(own))
    with pytest.raises(FileNotFoundError, match=r"no file at nowhere\.ckpt"):
        found("nowhere.ckpt")


def test_metrics_are_kept_by_one_process(tmp_path, monkeypatch):
    folder = tmp_path / "metrics"
    folder.mkdir()
    for number in (1, 2):
        (folder / "metrics.csv").write_text(str(number))
        monkeypatch.setenv("LOCAL_RANK", "1")
        resume.keep_metrics(tmp_path)
        monkeypatch.delenv("LOCAL_RANK")
        resume.keep_metrics(tmp_path)
        assert (folder / f"metrics.{number}.csv").read_text() == str(number)
        assert not (folder / "metrics.csv").exists()
    resume.keep_metrics(tmp_path)
    assert json.loads((folder / "metrics.2.csv").read_text()) == 2
