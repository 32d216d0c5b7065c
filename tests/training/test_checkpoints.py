# SPDX-License-Identifier: Apache-2.0
import functools
import http.server
import os
import pickle
import signal
import threading
import zipfile
from datetime import timedelta

import pytest
import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch.utils.data import DataLoader

from tests.full_disk import full_disk
from transducer_toolkit.training.callbacks import AverageWeights
from transducer_toolkit.training.checkpoints import AtomicCheckpointIO, LastCheckpoint


def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(tmp_path):
    path = tmp_path / "checkpoints" / "last.ckpt"
    io = AtomicCheckpointIO()
    io.save_checkpoint({"step": 1, "w": torch.zeros(10)}, path)
    large = {"step": 2, "w": torch.zeros(10**5)}
    before = r"checkpoint of 0\.4 MiB not written; the previous checkpoint is intact"
    with full_disk(), pytest.raises(OSError, match=before) as e:
        io.save_checkpoint(large, path)
    assert e.value.filename == str(path)
    assert io.load_checkpoint(path, weights_only=True)["step"] == 1
    none = r"checkpoint of 0\.4 MiB not written: "
    with full_disk(), pytest.raises(OSError, match=none) as e:
        io.save_checkpoint(large, path.with_name("other.ckpt"))
    assert [file.name for file in path.parent.iterdir()] == ["last.ckpt"]


def test_what_a_killed_process_left_is_written_over(tmp_path):
    path = tmp_path / "last.ckpt"
    (tmp_path / ".last.ckpt.partial").write_bytes(b"half")
    AtomicCheckpointIO().save_checkpoint({"step": 1}, str(path))
    assert AtomicCheckpointIO().load_checkpoint(path, weights_only=True) == {"step": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]


class Bomb:
    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def test_loading_runs_no_code_whoever_asks_and_wherever_it_lies(tmp_path):
    """Lightning would unpickle anything that comes over HTTP."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    torch.save({"step": Bomb(tmp_path / "exploded")}, tmp_path / "bomb.ckpt")
    torch.save({"step": 3}, tmp_path / "good.ckpt")
    handler = functools.partial(Quiet, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        for place in (tmp_path, f"http://127.0.0.1:{server.server_port}"):
            for weights_only in (None, True, False):
                with pytest.raises(ValueError, match=r"bomb\.ckpt is not a checkpoint of"):
                    AtomicCheckpointIO().load_checkpoint(
                        f"{place}/bomb.ckpt", weights_only=weights_only
                    )
            assert AtomicCheckpointIO().load_checkpoint(f"{place}/good.ckpt") == {"step": 3}
            with pytest.raises(FileNotFoundError, match="no checkpoint at"):
                AtomicCheckpointIO().load_checkpoint(f"{place}/none.ckpt")
        server.shutdown()
    assert not (tmp_path / "exploded").exists()
    pickle.loads(pickle.dumps(Bomb(tmp_path / "exploded")))
    assert (tmp_path / "exploded").exists()  # it would


class Line(LightningModule):
    """One weight, 6 batches an epoch."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def training_step(self, batch, batch_idx):
        return (self.weight - batch).square().sum()

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Send(Callback):
    """A signal to this process, at the end of a batch."""

    def __init__(self, name, after):
        self.signal = getattr(signal, name)
        self.after = after

    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step == self.after:
            os.kill(os.getpid(), self.signal)


class Saves(LastCheckpoint):
    """Also remembers the steps it saved."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.steps = []

    def _save(self, trainer):
        super()._save(trainer)
        self.steps.append(trainer.global_step)


def train(tmp_path, *, validate=True, stop=None, trainer_options=None, **options):
    """Steps that were saved; ``stop``: the signal to send after how many batches."""
    saves = Saves(str(tmp_path / "last.ckpt"), **options)
    callbacks = [saves]
    if stop is not None:
        callbacks.insert(0, Send(*stop))
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=2,
        callbacks=callbacks,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **(trainer_options or {}),
    )
    data = DataLoader(torch.ones(6, 1))
    trainer.fit(Line(), data, data if validate else None)
    return saves.steps


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({}, [6, 12]),
        ({"validate": False}, [6, 12]),
        ({"every_n_steps": 2}, [2, 4, 6, 8, 10, 12]),
        ({"every_n_steps": 4}, [4, 6, 10, 12]),
        ({"every_minutes": 1e-9}, list(range(1, 13))),
        # Every batch, but none in mid-accumulation.
        (
            {"every_n_steps": 1, "trainer_options": {"accumulate_grad_batches": 2}},
            [1, 2, 3, 4, 5, 6],
        ),
        # Where a validation follows, after that.
        ({"every_minutes": 60, "trainer_options": {"val_check_interval": 3}}, [3, 6, 9, 12]),
        ({"every_n_steps": 1, "trainer_options": {"fast_dev_run": True}}, None),
    ],
)
def test_when_it_is_written(tmp_path, options, steps):
    found = train(tmp_path, **options)
    if steps is None:
        assert not (tmp_path / "last.ckpt").exists()
        return
    assert found == steps
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == steps[-1]


class Fail(Callback):
    """Raises an error in a hook, after so many batches."""

    def __init__(self, hook, after, error=RuntimeError):
        self.after, self.error, self.batches = after, error, 0
        setattr(self, hook, self.fail)

    def on_train_batch_start(self, *args):
        self.batches += 1

    def fail(self, *args):
        if self.batches > self.after:
            raise self.error("a fault of the test")


class Optimizer(torch.optim.SGD):
    """Fails in the middle of its fourth step."""

    steps = 0

    def step(self, closure=None):
        loss = closure()
        Optimizer.steps += 1
        if Optimizer.steps == 4:
            raise RuntimeError("a fault of the test")
        super().step()
        return loss


def progress(path):
    checkpoint = torch.load(path, weights_only=True)
    batches = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]
    return checkpoint["global_step"], batches["processed"]


def fit(tmp_path, *callbacks, module=None, **options):
    trainer = Trainer(
        accelerator="cpu",
        callbacks=[*callbacks, LastCheckpoint(str(tmp_path / "last.ckpt"))],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **{"max_epochs": 2, **options},
    )
    data = DataLoader(torch.ones(6, 1))
    trainer.fit(module or Line(), data, data)
    return trainer


@pytest.mark.parametrize(
    ("hook", "accumulate", "expected"),
    [
        ("on_before_backward", 1, (4, 4)),
        ("on_after_backward", 1, (4, 4)),
        ("on_before_zero_grad", 1, (4, 4)),
        # The batches since the last step are repeated.
        ("on_before_backward", 3, (1, 3)),
        ("on_after_backward", 2, (2, 4)),
    ],
)
@pytest.mark.parametrize("error", [RuntimeError, MemoryError, KeyboardInterrupt])
def test_an_exception_leaves_the_last_complete_step(tmp_path, hook, accumulate, expected, error):
    with pytest.raises((error, SystemExit)):
        fit(tmp_path, Fail(hook, 4, error), accumulate_grad_batches=accumulate)
    assert progress(tmp_path / "last.ckpt") == expected
    # It goes on from there, to the end of both epochs.
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        accumulate_grad_batches=accumulate,
    )
    data = DataLoader(torch.ones(6, 1))
    trainer.fit(Line(), data, data, ckpt_path=tmp_path / "last.ckpt")
    assert trainer.global_step == 12 // accumulate


def test_a_step_that_the_optimizer_did_not_finish_is_not_saved(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(Optimizer, "steps", 0)
    module = Line()
    module.configure_optimizers = lambda: Optimizer(module.parameters(), lr=0.1)
    with pytest.raises(RuntimeError, match="a fault of the test"):
        fit(tmp_path, module=module)
    assert not (tmp_path / "last.ckpt").exists()
    assert "stopped in the middle of step 4: it is not saved" in caplog.text


def test_the_first_exception_is_raised_if_the_disk_is_full(tmp_path, caplog, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(SingleDeviceStrategy, "save_checkpoint", full)
    with pytest.raises(RuntimeError, match="a fault of the test"):
        fit(tmp_path, Fail("on_after_backward", 4))
    assert "step 4 could not be saved" in caplog.text and "No space left" in caplog.text


@pytest.mark.parametrize("accumulate", [1, 2, 3])
def test_max_time_finishes_the_step(tmp_path, accumulate):
    class Clock(Timer):
        def time_elapsed(self, stage="train"):
            return float(self.trainer.fit_loop.epoch_loop.batch_progress.total.processed)

        def setup(self, trainer, *args, **kwargs):
            self.trainer = trainer
            super().setup(trainer, *args, **kwargs)

    trainer = fit(
        tmp_path,
        Clock(timedelta(seconds=4), verbose=False),
        accumulate_grad_batches=accumulate,
        check_val_every_n_epoch=5,
        max_epochs=9,
    )
    step = -(-4 // accumulate)
    assert trainer.global_step == step
    assert progress(tmp_path / "last.ckpt") == (step, step * accumulate)


def test_an_exception_in_a_validation_of_the_average_saves_the_present_weights(tmp_path):
    average = AverageWeights(decay=0.9)
    module = Line()
    with pytest.raises(RuntimeError):
        fit(tmp_path, average, Fail("on_validation_batch_start", 5), module=module)
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    weight, mean = torch.zeros(1), torch.zeros(1)
    for step in range(6):
        weight = weight - 0.1 * 2 * (weight - 1)
        fraction = max(0.1, 9 / (step + 10)) if step > 0 else 1.0  # torch copies the first
        mean = mean + fraction * (weight - mean)
    assert float(checkpoint["current_model_state"]["weight"]) == pytest.approx(float(weight))
    assert float(checkpoint["state_dict"]["weight"]) == pytest.approx(float(mean))


def test_intervals_are_positive():
    with pytest.raises(ValueError, match=r"every_minutes: expected a positive number.* got 0"):
        LastCheckpoint("x", every_minutes=0)
    with pytest.raises(ValueError, match=r"every_n_steps: expected a positive number.* got -1"):
        LastCheckpoint("x", every_n_steps=-1)
    with pytest.raises(ValueError, match=r"every_minutes: expected a positive number.* got nan"):
        LastCheckpoint("x", every_minutes=float("nan"))


def test_sigterm_ends_after_a_saved_step_and_handlers_return(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as end:
        train(tmp_path, stop=("SIGTERM", 4))
    assert end.value.code == 143 and signal.getsignal(signal.SIGTERM) == before
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 4


def test_sigterm_before_a_validation_waits_for_it(tmp_path):
    with pytest.raises(SystemExit):
        train(tmp_path, stop=("SIGTERM", 6))
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    validated = checkpoint["loops"]["fit_loop"]["epoch_loop.val_loop.batch_progress"]
    assert checkpoint["global_step"] == 6 and validated["current"]["completed"] == 6


@pytest.mark.parametrize("array", [False, True])
def test_slurms_warning_requeues_the_job(tmp_path, monkeypatch, array):
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/called\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    variables = {"JOB_ID": "77", "NTASKS": "1", "PROCID": "0", "LOCALID": "0", "NODEID": "0"}
    if array:
        variables |= {"ARRAY_JOB_ID": "70", "ARRAY_TASK_ID": "5"}
    for name, value in variables.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    with pytest.raises(SystemExit) as end:
        train(tmp_path, stop=("SIGUSR1", 4), trainer_options={"devices": 1})
    assert end.value.code == 143
    job = "70_5" if array else "77"
    assert (tmp_path / "called").read_text() == f"requeue {job}\n"
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 4


def test_the_handler_of_a_launcher_is_called_after_the_checkpoint(tmp_path):
    saved = []

    def requeue(number, frame):
        saved.append(torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"])
        raise SystemExit(7)

    before = signal.signal(signal.SIGUSR2, requeue)
    try:
        with pytest.raises(SystemExit) as end:
            train(tmp_path, stop=("SIGUSR2", 4))
        assert end.value.code == 7 and saved == [4]
        assert signal.getsignal(signal.SIGUSR2) is requeue
    finally:
        signal.signal(signal.SIGUSR2, before)


def test_forged_archives_are_named(tmp_path):
    path = tmp_path / "forged.ckpt"
    for content in (b"", b"garbage", b"\x80\x02K\x01"):
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", content)
            archive.writestr("archive/version", b"3\n")
        with pytest.raises(ValueError, match=r"forged\.ckpt is not a checkpoint of"):
            AtomicCheckpointIO().load_checkpoint(path)
