# SPDX-License-Identifier: Apache-2.0
"""Averages of the weights over the steps of a training."""

from __future__ import annotations

from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from transducer_toolkit.ops.checks import check_number


class AverageWeights(WeightAveraging):
    """Validate, test and save with an average of the weights, while training goes on without it.

    After n averaged steps the next one counts ``max(1 - decay, 9 / (n + 10))``: an exponential
    moving average that soon forgets the first weights. Without ``decay`` it counts
    ``1 / (n + 1)``: their mean. Until the first step that is averaged the average is the present
    weights. It covers the parameters of model, loss stage and CTC layer; buffers, such as feature
    statistics, are copied. Checkpoints hold the average as ``state_dict``, what a
    :class:`~transducer_toolkit.inference.recognizer.Recognizer` reads, and the present weights
    for a resumed training.

    Args:
        decay: of the moving average, in (0, 1); None is the mean.
        start_fraction: part of the training's steps before the first that is averaged, in [0, 1).

    Raises:
        TypeError: if an argument is no number.
        ValueError: if one is out of range.

    Example:
        >>> average = AverageWeights(decay=0.999)
    """

    def __init__(self, *, decay: float | None = 0.999, start_fraction: float = 0.0) -> None:
        if decay is not None:
            check_number(decay, "decay")
            if not 0 < decay < 1:
                raise ValueError(f"decay must be in (0, 1) or None, got {decay}")
        check_number(start_fraction, "start_fraction")
        if not 0 <= start_fraction < 1:
            raise ValueError(f"start_fraction must be in [0, 1), got {start_fraction}")
        super().__init__(use_buffers=False, multi_avg_fn=self._average)
        self.decay = decay
        self.start_fraction = start_fraction
        self._first_step = 0

    @torch.no_grad()
    def _average(self, averages: Any, present: Any, num_averaged: Tensor | int) -> None:
        count = int(num_averaged)
        weight = 1 / (count + 1) if self.decay is None else max(1 - self.decay, 9 / (count + 10))
        torch._foreach_lerp_(averages, present, weight)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        # Lightning would take the module's device, which until later is the CPU.
        self._device = trainer.strategy.root_device
        super().setup(trainer, pl_module, stage)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._first_step = int(self.start_fraction * trainer.estimated_stepping_batches)

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        return step_idx is not None and step_idx >= self._first_step

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._follow(pl_module)
        super().on_validation_epoch_start(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._follow(pl_module)
        super().on_train_end(trainer, pl_module)

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._follow(pl_module)
        super().on_save_checkpoint(trainer, pl_module, checkpoint)

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        # Lightning would put the present weights in place of the average also for a test.
        if trainer.state.fn == TrainerFn.FITTING:
            super().on_load_checkpoint(trainer, pl_module, checkpoint)

    def _follow(self, pl_module: LightningModule) -> None:
        """Before the first step that is averaged: take over the present weights."""
        average = self._average_model
        if average is not None and average.n_averaged == 0:
            average.module.load_state_dict(pl_module.state_dict())
