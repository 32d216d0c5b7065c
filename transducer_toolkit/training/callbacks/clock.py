# SPDX-License-Identifier: Apache-2.0
"""A callback that measures the time and the memory of training steps."""

from __future__ import annotations

import time
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor

from transducer_toolkit.training import memory
from transducer_toolkit.training.stages import LossInput


class StepClock(Callback):
    """Measures the wall time and the memory of training steps, without validation and start-up.

    Logs ``train/seconds_per_step``, the mean since the value before.

    Attributes:
        seconds_per_step: mean wall time of an optimizer step so far, including data loading and all
            accumulated batches; None before a batch after the first NUM_IGNORED_BATCHES.
        training_s: wall time of this run from the start of the training to its end, including
            validation.
        total_s: ``training_s`` plus that of the earlier runs, if the training was resumed.
        num_steps: optimizer steps of this run.
        loss_part: fraction of the steps' time that the joiner and the loss take, forward and
            backward; None as for ``seconds_per_step``. It is valid on the CPU only, because CUDA
            kernels run asynchronously.
        peak_memory_mib: peak memory during the training, minus the memory in use at its start. On
            the CPU it is the resident memory of this process, on CUDA the memory of torch's
            allocator. 0 if the system does not report it.
    """

    # The first batches are slower: memory is allocated and the data workers start.
    NUM_IGNORED_BATCHES = 5

    def __init__(self) -> None:
        self.training_s = 0.0
        self.num_steps = 0
        self._earlier_s = 0.0  # training_s of the earlier runs
        self._first_step = 0
        self._sum_s = 0.0
        self._num_batches = 0
        self._logged_s = 0.0  # of the batches since the last logged value
        self._num_logged = 0
        self._batches_per_step = 1
        self._num_seen = 0
        self._last: float | None = None
        self._start: float | None = None  # None before and after the training
        self._loss_s = 0.0
        self._loss_of_step_s = 0.0
        self._mark = 0.0  # when the joiner and the loss last began forward or backward
        self._memory_before = 0
        self.peak_memory_mib = 0.0
        self._hooks: list[Any] = []

    @property
    def seconds_per_step(self) -> float | None:
        if self._num_batches == 0:
            return None
        return self._batches_per_step * self._sum_s / self._num_batches

    @property
    def total_s(self) -> float:
        running_s = 0.0 if self._start is None else time.perf_counter() - self._start
        return self._earlier_s + self.training_s + running_s

    def state_dict(self) -> dict[str, Any]:
        return {"training_s": self.total_s}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # For a test, Lightning loads the state of the best checkpoint.
        if self.training_s == 0.0:
            self._earlier_s = float(state_dict["training_s"])

    @property
    def loss_part(self) -> float | None:
        return self._loss_s / self._sum_s if self._sum_s else None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        loss = getattr(pl_module, "loss", None)
        if isinstance(loss, torch.nn.Module):
            self._hooks = [
                loss.register_forward_pre_hook(self._before_loss),
                loss.register_forward_hook(self._after_loss),
            ]
        self._batches_per_step = trainer.accumulate_grad_batches
        self._memory_before = memory.reset_peak(pl_module.device)
        self._first_step = trainer.global_step
        self._start = time.perf_counter()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._start is not None:
            self.training_s = time.perf_counter() - self._start
        self._start = None
        self.num_steps = trainer.global_step - self._first_step
        peak = memory.peak(pl_module.device) - self._memory_before
        self.peak_memory_mib = max(0, peak) / 2**20
        for hook in self._hooks:
            hook.remove()

    def _before_loss(self, stage: torch.nn.Module, arguments: tuple[LossInput]) -> None:
        self._mark = time.perf_counter()

    def _after_loss(self, stage: torch.nn.Module, arguments: tuple[LossInput], out: Any) -> None:
        if not stage.training:
            return
        self._loss_of_step_s += time.perf_counter() - self._mark
        batch = arguments[0]
        is_over = False

        def leaves_the_loss(_: Tensor) -> None:
            # Only the first of the two gradients counts. Autograd runs the newest nodes first, so
            # the backward of the joiner and the loss is complete when the first gradient arrives.
            # The second arrives after the backward of the predictor.
            nonlocal is_over
            if not is_over:
                self._loss_of_step_s += time.perf_counter() - self._mark
            is_over = True

        for tensor in (batch.encoder_out, batch.predictor_out):
            if tensor.requires_grad:
                tensor.register_hook(leaves_the_loss)

    def on_before_backward(self, *args: Any, **kwargs: Any) -> None:
        self._mark = time.perf_counter()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._last = None

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._last = None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        now = time.perf_counter()
        self._num_seen += 1
        if self._last is not None:
            self._logged_s += now - self._last
            self._num_logged += 1
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if trainer.global_step % every == 0 and self._num_logged:
            seconds = self._batches_per_step * self._logged_s / self._num_logged
            pl_module.log("train/seconds_per_step", seconds)
            self._logged_s, self._num_logged = 0.0, 0
        if self._last is not None and self._num_seen > self.NUM_IGNORED_BATCHES:
            self._sum_s += now - self._last
            self._loss_s += self._loss_of_step_s
            self._num_batches += 1
        self._loss_of_step_s = 0.0
        self._last = now
