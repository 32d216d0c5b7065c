# SPDX-License-Identifier: Apache-2.0
"""Steps whose loss or gradient is NaN or infinite: skipped, counted, written down, limited."""

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
    """Leave the weights alone in a step with a NaN or infinite loss or gradient.

    All processes decide alike, from the losses of all. The gradients are dropped before the
    optimizer sees them, statistics of batch norms are as they were before the step, the
    learning-rate schedule goes on. The utterances are appended to ``path``, one JSON object a
    step: those with such a loss, or all of the step where only the gradient has it.

    A gradient that overflows under a loss scale (``trainer.precision=16-mixed``) is the scaler's:
    it skips the step, lowers the scale, and nothing is counted here until the scale is down to 1.

    One number a step travels from the device to the CPU.

    Args:
        path: JSON-lines file to write.
        max_consecutive: steps in a row to skip; one more ends the training. 0: the first ends it.

    Attributes:
        num_skipped: steps skipped since the training began, over all its resumptions.

    Raises:
        TypeError: ``max_consecutive`` is no int.
        ValueError: ``max_consecutive`` is negative; in training, too many steps in a row.
    """

    def __init__(self, path: str, *, max_consecutive: int = 10) -> None:
        check_at_least(0, max_consecutive=max_consecutive)
        self.path = Path(path)
        self.max_consecutive = max_consecutive
        self.num_skipped = 0
        self._consecutive = 0
        self._hook: Any = None
        # Of the batches since the last optimizer step:
        self._batches: list[Batch] = []
        self._losses: list[Tensor] = []
        self._statistics: list[tuple[Tensor, Tensor]] = []  # of a batch norm, and their copy

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
            # A fused optimizer would unscale gradients by itself, within the step: after this
            # callback has looked at them, and after they were clipped.
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
            parameter.grad = None  # the optimizer passes over parameters without one
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
                f"the {what} is NaN or infinite in step {trainer.global_step}, the "
                f"{self._consecutive}. in a row (max_consecutive={self.max_consecutive}); its "
                f"utterances: {named}; those of all such steps are in {self.path}. Try a lower "
                "optimizer.lr or trainer.gradient_clip_val, and look at these utterances"
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
    """Whether all entries are finite: a flag on the device, without a temporary for each tensor."""
    if not tensors:
        return torch.ones((), dtype=torch.bool, device=device)
    # A maximum of absolute values is NaN if one is, and cannot overflow as a sum of squares can.
    norms = torch._foreach_norm([t for t in tensors if t.numel()], ord=float("inf"))
    return torch.stack([norm.float() for norm in norms]).isfinite().all()


def _scale(trainer: Trainer) -> float:
    """The loss scale of 16-bit training; 1 if there is none."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return 1.0 if scaler is None else scaler.get_scale()


def _utterances(batches: list[Batch], losses: list[Tensor]) -> list[str]:
    """Utterances whose loss is not finite, or without losses all; of this process."""
    if [len(values) for values in losses] != [len(batch) for batch in batches]:
        return [id_ for batch in batches for id_ in batch.utterance_ids]
    return [
        id_
        for batch, values in zip(batches, losses, strict=True)
        for id_, finite in zip(batch.utterance_ids, values.isfinite().tolist(), strict=True)
        if not finite
    ]


def _gather(ids: list[str]) -> list[list[str]]:
    """The lists of all processes."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [ids]
    parts: list[list[str]] = [[] for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather_object(parts, ids)
    return parts
