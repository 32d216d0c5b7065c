# SPDX-License-Identifier: Apache-2.0
"""Atomic checkpoints, and the last checkpoint of a training, whatever ends it."""

from __future__ import annotations

import copy
import io
import logging
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from fsspec.implementations.local import LocalFileSystem
from lightning import LightningModule, Trainer
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch.optim import Optimizer

from transducer_toolkit.inference.trust import load_plain
from transducer_toolkit.ops.checks import check_number

__all__ = ["AtomicCheckpointIO", "LastCheckpoint"]

logger = logging.getLogger(__name__)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint to a temporary file beside the target, then renames it.

    A reader therefore sees the old file or the new one, but never a part of one, even after a
    crash. Loading never runs code from a checkpoint.

    Lightning's own writer prepares the file in the system's temporary folder. If that folder is on
    another file system, the final move is a copy, and a crash can truncate it. Lightning still
    writes addresses with a scheme, such as ``s3://``.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None
    ) -> None:
        """Saves a checkpoint.

        Raises:
            OSError: if the file cannot be written, for example because the disk is full. An older
                file at ``path`` stays as it is.
        """
        if "://" in str(path) or storage_options is not None:
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        path = Path(path)
        # Into memory first: torch's archive writer aborts the process if a write fails.
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        partial = path.with_name(f".{path.name}.partial")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with partial.open("wb") as file:
                file.write(buffer.getbuffer())
                file.flush()
                # Without it, a power failure can leave a renamed file without content.
                os.fsync(file.fileno())
            partial.replace(path)
        except OSError as error:
            size_mib = buffer.tell() / 2**20
            kept = "; the previous checkpoint is intact" if path.exists() else ""
            message = f"{error.strerror}, checkpoint of {size_mib:.1f} MiB not written{kept}"
            raise OSError(error.errno, message, str(path)) from error
        finally:
            partial.unlink(missing_ok=True)

    def load_checkpoint(
        self,
        path: str | Path,
        map_location: Any = lambda storage, location: storage,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Loads a checkpoint without running code from it.

        ``weights_only`` is ignored: the file may hold only tensors and plain values. (Lightning
        itself applies torch's default, and unpickles anything from an ``http://`` address.)

        Raises:
            FileNotFoundError: if the file does not exist.
            ValueError: if the file is damaged, or holds objects other than tensors and plain
                values.
        """
        filesystem = get_filesystem(path)
        if not filesystem.exists(str(path)):
            raise FileNotFoundError(f"no checkpoint at {path}")
        with filesystem.open(str(path), "rb") as source:
            # A remote file may not be seekable, but load_plain seeks.
            is_local = isinstance(filesystem, LocalFileSystem)
            return load_plain(source if is_local else io.BytesIO(source.read()), path, map_location)


class LastCheckpoint(Checkpoint):
    """Writes ``last.ckpt`` after each validation, at intervals, and when the training ends.

    ``ModelCheckpoint(save_last=True)`` writes the file only if the validation was the best so far.

    Between validations, the file is written after an optimizer step, once all processes agree. It
    is not written if a validation follows the step, because a resumed training would skip that
    validation. List this callback after the one that keeps the best checkpoint, whose best score
    is part of the last checkpoint.

    The last checkpoint contains the last optimizer step, whatever ends the training:

    - ``max_steps``, ``max_epochs``, ``max_time``, or another reason to stop. If it falls between
      two accumulated batches, the step is finished first.
    - SIGTERM and SIGINT (Ctrl-C): the current step is finished, then the process ends with exit
      status 143 or 130. A second Ctrl-C raises ``KeyboardInterrupt`` at once.
    - SIGUSR1, the warning that ``sbatch --signal=SIGUSR1@120`` enables in Slurm: the current step
      is finished, then the job is requeued.
    - SIGUSR2: the current step is finished, then the handler runs that was installed before, for
      example by submitit. Without such a handler, SIGUSR2 is not handled.
    - an exception: the checkpoint holds the weights and the position after the last complete step.
      It is not written if the optimizer was interrupted in the middle of a step, or if a strategy
      shards the weights, because the other processes may not take part.

    Args:
        path: file to write.
        every_minutes: minutes between two checkpoints, or None.
        every_n_steps: optimizer steps between two checkpoints, or None.

    Attributes:
        saved_step: optimizer step of the newest checkpoint that this run wrote; None before.

    Raises:
        TypeError: if an interval is not a number.
        ValueError: if an interval is not positive.
    """

    def __init__(
        self, path: str, *, every_minutes: float | None = None, every_n_steps: int | None = None
    ) -> None:
        for name, value in (("every_minutes", every_minutes), ("every_n_steps", every_n_steps)):
            if value is None:
                continue
            check_number(value, name)
            if not value > 0:  # also refuses NaN
                raise ValueError(f"{name}: expected a positive number or None, got {value}")
        self.path = path
        self.every_s = None if every_minutes is None else 60 * every_minutes
        self.every_n_steps = every_n_steps
        self.saved_step: int | None = None
        self._saved_at_s = 0.0
        self._saved_at_step = 0
        self._step = 0  # trainer.global_step after the previous batch
        self._position: dict[str, Any] = {}  # entries of a checkpoint, after the previous step
        self._stepping_from = -1  # trainer.global_step before the newest call of the optimizer
        self._stops = False  # whether the training stops after the current step
        self._received = 0  # number of the signal, 0 for none
        self._previous: dict[int, Any] = {}  # the replaced handlers, by signal number

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._saved_at_s = time.monotonic()
        self._saved_at_step = self._step = trainer.global_step
        self._received = 0
        # Not earlier: Lightning installs its handlers just before this call and removes them at
        # the end. Its handlers communicate or save in the middle of a step.
        signals = [signal.SIGTERM, signal.SIGINT]
        environment = _cluster_environment(trainer)
        # With one device, Lightning sets no cluster environment.
        if environment is None and SLURMEnvironment.detect():
            environment = SLURMEnvironment()
        if isinstance(environment, SLURMEnvironment) and environment.auto_requeue:
            signals.append(environment.requeue_signal or signal.SIGUSR1)
        if callable(signal.getsignal(signal.SIGUSR2)):
            signals.append(signal.SIGUSR2)
        try:
            self._previous = {number: signal.signal(number, self._receive) for number in signals}
        except ValueError:  # not the main thread
            self._previous = {}

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        self._stepping_from = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self._step:  # still accumulating: a checkpoint holds no gradients
            self._stops |= trainer.should_stop
            trainer.should_stop = False
            return
        self._step = trainer.global_step
        self._position = _position(trainer)
        trainer.should_stop |= self._stops
        received, is_due = self._agree(trainer)
        is_due |= _ends(trainer) and not trainer.is_last_batch
        if (received or is_due) and not _validates_next(trainer, batch_idx):
            self._save(trainer)
            if received:
                self._stop(trainer, received)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._save(trainer)
            if received := self._agree(trainer)[0]:
                self._stop(trainer, received)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        is_saved = self._saved_at_step == trainer.global_step
        if trainer.is_last_batch:
            if not trainer.enable_validation or (_ends(trainer) and not is_saved):
                self._save(trainer)
        elif not is_saved:  # stopped within the epoch
            self._save_position(trainer)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        if trainer.state.fn != TrainerFn.FITTING or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        if self._step == self._saved_at_step or not trainer.is_global_zero:
            return
        if self._stepping_from == trainer.global_step:
            logger.warning("stopped in the middle of step %d: it is not saved", self._step + 1)
            return
        if not isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy):
            return
        try:
            self._save_position(trainer)
        except Exception as error:  # the first exception is the one to raise
            logger.error("step %d could not be saved: %s", self._step, error)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            if self._received:
                raise KeyboardInterrupt
            # In a thread: the signal may have interrupted another message.
            said = "Ctrl-C: stopping after this step; press it again to stop at once"
            threading.Thread(target=logger.warning, args=(said,)).start()
        self._received = number

    def _agree(self, trainer: Trainer) -> tuple[int, bool]:
        """Returns a signal that any process received (or 0), and whether a checkpoint is due."""
        elapsed_s = time.monotonic() - self._saved_at_s
        steps = trainer.global_step - self._saved_at_step
        is_due = (self.every_s is not None and elapsed_s >= self.every_s) or (
            self.every_n_steps is not None and steps >= self.every_n_steps
        )
        if trainer.world_size == 1:
            return self._received, is_due
        flags = torch.tensor([self._received, int(is_due)], device=trainer.strategy.root_device)
        received, due = trainer.strategy.reduce(flags, reduce_op="max").tolist()
        return received, bool(due)

    def _save(self, trainer: Trainer) -> None:
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        trainer.save_checkpoint(self.path, weights_only=False)
        self._saved_at_s, self._saved_at_step = time.monotonic(), trainer.global_step
        self.saved_step = trainer.global_step

    def _save_position(self, trainer: Trainer) -> None:
        """Writes the checkpoint with the position after the previous optimizer step."""
        # Not trainer.save_checkpoint: it waits for the other processes.
        checkpoint = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
        checkpoint.update(copy.deepcopy(self._position))
        trainer.strategy.save_checkpoint(checkpoint, self.path)
        self.saved_step = self._saved_at_step = self._step

    def _stop(self, trainer: Trainer, number: int) -> None:
        name = signal.Signals(number).name
        logger.warning("%s: step %d is saved in %s", name, trainer.global_step, self.path)
        for sink in trainer.loggers:
            sink.finalize("stopped")
        previous: Callable[[int, None], Any] | None = self._previous.get(number)
        if number == signal.SIGUSR2 and callable(previous):
            # In the main process, submitit's handler requeues the job and exits. In the others it
            # returns, and they sleep until Slurm ends them.
            previous(number, None)
            time.sleep(60)
        elif number not in (signal.SIGTERM, signal.SIGINT) and trainer.is_global_zero:
            job = os.environ["SLURM_JOB_ID"]
            if array := os.environ.get("SLURM_ARRAY_JOB_ID"):
                job = f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"
            logger.warning("requeueing Slurm job %s", job)
            subprocess.run(["scontrol", "requeue", job], check=True)
        # Exit status 0 for a process that the main process started: if one of them fails, the main
        # process kills the others at once, perhaps before they have finished.
        environment = _cluster_environment(trainer)
        started_here = environment is not None and not environment.creates_processes_externally
        status = 128 + (signal.SIGINT if number == signal.SIGINT else signal.SIGTERM)
        raise SystemExit(0 if started_here and trainer.local_rank > 0 else status)


def _position(trainer: Trainer) -> dict[str, Any]:
    """Returns the entries of a checkpoint that say how far the training is."""
    datamodule = trainer.datamodule  # type: ignore[attr-defined]
    position = {
        "epoch": trainer.current_epoch,
        "global_step": trainer.global_step,
        "loops": {"fit_loop": trainer.fit_loop.state_dict()},
    }
    if datamodule is not None:
        position[type(datamodule).__qualname__] = datamodule.state_dict()
    return copy.deepcopy(position)


def _ends(trainer: Trainer) -> bool:
    """Returns whether the training ends with this step, or with this epoch at its end."""
    if trainer.should_stop:
        return bool(trainer.fit_loop._can_stop_early)
    if trainer.max_steps != -1 and trainer.global_step >= trainer.max_steps:
        return True
    is_last_epoch = trainer.max_epochs not in (None, -1) and (
        trainer.current_epoch + 1 >= trainer.max_epochs
    )
    return bool(is_last_epoch and trainer.is_last_batch)


def _cluster_environment(trainer: Trainer) -> Any:
    return getattr(trainer.strategy, "cluster_environment", None)


def _validates_next(trainer: Trainer, batch_idx: int) -> bool:
    """Returns whether Lightning may validate after this batch."""
    if not trainer.enable_validation:
        return False
    if trainer.is_last_batch:  # if no validation follows, on_train_epoch_end saves
        return True
    epochs = trainer.check_val_every_n_epoch
    if epochs is not None and (trainer.current_epoch + 1) % epochs:
        return False
    if trainer.should_stop:  # Lightning validates before it stops
        return bool(trainer.fit_loop._can_stop_early)
    # None: Lightning validates by time. Infinity: it validates at the end of an epoch.
    every = trainer.val_check_batch
    if trainer.check_val_every_n_epoch is None:
        batch_idx = trainer.fit_loop.total_batch_idx
    return every is not None and (batch_idx + 1) % every == 0
