# SPDX-License-Identifier: Apache-2.0
"""A callback that averages the weights over the steps of a training."""

from __future__ import annotations

from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from transducer_toolkit.ops.checks import check_number


class AverageWeights(WeightAveraging):
    """Validates, tests and saves with an average of the weights. Training does not use the average.

    After each averaged step, the average moves towards the present weights by a fraction::

        average += fraction * (weights - average)
        fraction = max(1 - decay, 9 / (n + 10))    # n: number of steps averaged before
        fraction = 1 / (n + 1)                     # decay=None: the mean

    The second argument of the maximum lets the average forget the first weights quickly. Before
    the first averaged step, the average equals the present weights.

    The average covers the parameters of the model, the loss stage and the CTC layer. Buffers, such
    as feature statistics, are copied. In a checkpoint, ``state_dict`` is the average, which
    :class:`~transducer_toolkit.inference.recognizer.Recognizer` reads. The checkpoint also holds
    the present weights, from which a training resumes.

    Args:
        decay: decay of the exponential moving average, in (0, 1); None for the mean.
        start_fraction: fraction of the training's steps before the first averaged step, in [0, 1).

    Raises:
        TypeError: if an argument is not a number.
        ValueError: if an argument is out of range.

    Example:
        >>> average = AverageWeights(decay=0.999)
    """

    def __init__(self, *, decay: float | None = 0.999, start_fraction: float = 0.0) -> None:
        if decay is not None:
            check_number(decay, "decay")
            if not 0 < decay < 1:
                raise ValueError(f"decay: expected a number in (0, 1) or None, got {decay}")
        check_number(start_fraction, "start_fraction")
        if not 0 <= start_fraction < 1:
            raise ValueError(f"start_fraction: expected a number in [0, 1), got {start_fraction}")
        super().__init__(use_buffers=False, multi_avg_fn=self._average)
        self.decay = decay
        self.start_fraction = start_fraction
        self._first_step = 0
        self._is_swapped = False  # whether the module holds the average, for a validation

    @torch.no_grad()
    def _average(self, averages: Any, present: Any, num_averaged: Tensor | int) -> None:
        count = int(num_averaged)
        weight = 1 / (count + 1) if self.decay is None else max(1 - self.decay, 9 / (count + 10))
        torch._foreach_lerp_(averages, present, weight)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        # Lightning would use the module's device, but the module is still on the CPU here.
        self._device = trainer.strategy.root_device
        super().setup(trainer, pl_module, stage)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._first_step = int(self.start_fraction * trainer.estimated_stepping_batches)

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        return step_idx is not None and step_idx >= self._first_step

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._follow(pl_module)
        super().on_validation_epoch_start(trainer, pl_module)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        if self._is_swapped:  # LastCheckpoint saves the present weights
            self._swap_models(pl_module)

    def _swap_models(self, pl_module: LightningModule) -> None:
        super()._swap_models(pl_module)
        self._is_swapped = not self._is_swapped

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
        # For a test, Lightning would replace the average by the present weights.
        if trainer.state.fn == TrainerFn.FITTING:
            super().on_load_checkpoint(trainer, pl_module, checkpoint)

    def _follow(self, pl_module: LightningModule) -> None:
        """Copies the present weights into the average, if no step has been averaged yet."""
        average = self._average_model
        if average is not None and average.n_averaged == 0:
            average.module.load_state_dict(pl_module.state_dict())
