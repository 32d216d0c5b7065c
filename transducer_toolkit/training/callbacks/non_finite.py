# SPDX-License-Identifier: Apache-2.0
"""A callback that skips and logs steps whose loss or gradient is NaN or infinite."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from transducer_toolkit.data.dataset import Batch
from transducer_toolkit.ops.checks import check_at_least
from transducer_toolkit.training.stages import LossInput, StageOutput

__all__ = ["SkipNonFiniteSteps"]

logger = logging.getLogger(__name__)


class SkipNonFiniteSteps(Callback):
    """Skips a step if its loss or its gradient is NaN or infinite.

    A skipped step does not change the weights: the callback drops the gradients before the
    optimizer runs. It also restores the statistics of batch norms. The learning-rate schedule
    advances. All processes take the same decision, from the losses of all processes.

    The callback appends one JSON object per skipped step to ``path``. It names the utterances with
    a bad loss, or all utterances of the step if only the gradient is bad.

    With a loss scale (``trainer.precision=16-mixed``), the gradient may overflow. The gradient
    scaler then skips the step and lowers the scale. This callback does not count such steps unless
    the scale is 1.

    Each step copies two flags from the device to the CPU, which synchronizes with the device.

    Args:
        path: JSON-lines file to write.
        max_consecutive: number of consecutive steps that may be skipped. One more ends the
            training; with 0, the first does.

    Attributes:
        num_skipped: number of steps skipped since the training began, including the part before
            it was resumed.

    Raises:
        TypeError: if ``max_consecutive`` is not an int.
        ValueError: if ``max_consecutive`` is negative; during training, if too many consecutive
            steps were skipped.
    """

    def __init__(self, path: str, *, max_consecutive: int = 10) -> None:
        check_at_least(0, max_consecutive=max_consecutive)
        self.path = Path(path)
        self.max_consecutive = max_consecutive
        self.num_skipped = 0
        self._consecutive = 0
        self._hook: Any = None
        # Since the last optimizer step:
        self._batches: list[Batch] = []
        self._losses: list[Tensor] = []
        self._statistics: list[tuple[Tensor, Tensor]] = []  # buffers of batch norms, their copies

    def state_dict(self) -> dict[str, Any]:
        return {"num_skipped": self.num_skipped, "consecutive": self._consecutive}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self.num_skipped = int(state_dict["num_skipped"])
        self._consecutive = int(state_dict["consecutive"])

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        loss = getattr(pl_module, "loss", None)
        if isinstance(loss, torch.nn.Module):
            self._hook = loss.register_forward_hook(self._after_loss)
        for optimizer in trainer.optimizers:
            # A fused optimizer unscales the gradients inside its step, which is after this callback
            # has checked them and after they were clipped.
            optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._hook is not None:
            self._hook.remove()
        if self.num_skipped and trainer.is_global_zero:
            logger.warning("%d steps were skipped, see %s", self.num_skipped, self.path)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        if not self._batches:
            self._statistics = [
                (buffer, buffer.clone())
                for module in pl_module.modules()
                if isinstance(module, _BatchNorm)
                for buffer in module.buffers(recurse=False)
            ]
        self._batches.append(batch)

    def _after_loss(
        self, stage: torch.nn.Module, arguments: tuple[LossInput], out: StageOutput
    ) -> None:
        if self._batches and stage.training and torch.is_grad_enabled():
            self._losses.append(out.losses.detach())

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        batches, losses, self._batches, self._losses = self._batches, self._losses, [], []
        grads = [p.grad for p in pl_module.parameters() if p.grad is not None]
        device = pl_module.device
        finite = torch.stack([_all_finite(losses, device), _all_finite(grads, device)]).int()
        if trainer.world_size > 1:
            finite = trainer.strategy.reduce(finite, reduce_op="min")
        losses_finite, grads_finite = map(bool, finite.tolist())
        if losses_finite and (grads_finite or _scale(trainer) > 1):
            if grads_finite:
                self._consecutive = 0
            return
        for parameter in pl_module.parameters():
            parameter.grad = None  # the optimizer skips parameters without a gradient
        with torch.no_grad():
            for buffer, before in self._statistics:
                buffer.copy_(before)
        self.num_skipped += 1
        self._consecutive += 1
        what = "gradient" if losses_finite else "loss"
        bad = _utterances(batches, losses if not losses_finite else [])
        bad = [id_ for part in _gather(bad) for id_ in part]
        self._write(trainer, what, bad)
        named = ", ".join(bad[:5]) + (f" and {len(bad) - 5} more" if len(bad) > 5 else "")
        if self._consecutive > self.max_consecutive:
            raise ValueError(
                f"the {what} is NaN or infinite in step {trainer.global_step} (consecutive steps: "
                f"{self._consecutive}, max_consecutive={self.max_consecutive}); utterances of this "
                f"step: {named}; {self.path} lists those of all such steps. Try a lower "
                "optimizer.lr or trainer.gradient_clip_val, and check these utterances"
            )
        if trainer.is_global_zero:
            logger.warning("step %d skipped, NaN or infinite %s: %s", trainer.global_step, what,
                           named)  # fmt: skip

    def _write(self, trainer: Trainer, what: str, utterances: list[str]) -> None:
        if not trainer.is_global_zero:
            return
        row = {"epoch": trainer.current_epoch, "step": trainer.global_step, "non_finite": what}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            line = json.dumps(row | {"utterances": utterances}, ensure_ascii=False)
            file.write(line + "\n")


def _all_finite(tensors: list[Tensor], device: torch.device) -> Tensor:
    """Returns whether all entries of all tensors are finite, as a bool tensor on the device."""
    if not tensors:
        return torch.ones((), dtype=torch.bool, device=device)
    # The maximum norm is NaN if an entry is NaN. Unlike a sum of squares, it cannot overflow.
    norms = torch._foreach_norm([t for t in tensors if t.numel()], ord=float("inf"))
    return torch.stack([norm.float() for norm in norms]).isfinite().all()


def _scale(trainer: Trainer) -> float:
    """Returns the loss scale of 16-bit training, or 1 if there is none."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return 1.0 if scaler is None else scaler.get_scale()


def _utterances(batches: list[Batch], losses: list[Tensor]) -> list[str]:
    """Returns the utterances of this process whose loss is not finite; without losses, all."""
    if [len(values) for values in losses] != [len(batch) for batch in batches]:
        return [id_ for batch in batches for id_ in batch.utterance_ids]
    return [
        id_
        for batch, values in zip(batches, losses, strict=True)
        for id_, finite in zip(batch.utterance_ids, values.isfinite().tolist(), strict=True)
        if not finite
    ]


def _gather(ids: list[str]) -> list[list[str]]:
    """Returns the lists of all processes."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [ids]
    parts: list[list[str]] = [[] for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather_object(parts, ids)
    return parts
