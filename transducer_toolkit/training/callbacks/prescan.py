# SPDX-License-Identifier: Apache-2.0
"""A callback that runs the largest batches before training, to find out whether they fit."""

from __future__ import annotations

import logging
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer

from transducer_toolkit.data.batching import EpochIndex
from transducer_toolkit.training import memory
from transducer_toolkit.training.lightning_module import TransducerModule

__all__ = ["PreScan"]

logger = logging.getLogger(__name__)


class PreScan(Callback):
    """Runs the largest batches of the epoch forward and backward once, and logs the peak memory.

    These are the batches with the most lattice cells, the most padded frames and the most
    utterances. Their gradients are discarded; random state, batch-norm statistics and weights do
    not change. The peak does not include the optimizer's state, which Adam allocates in the first
    step; the log gives its size. Each process runs its own batches.

    If a batch does not fit into memory, it is halved until it fits. The error then recommends a
    value for the option that limits the batches.

    Raises:
        RuntimeError: when training starts, if a batch does not fit into memory.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        loader: Any = trainer.train_dataloader
        sampler: Any = getattr(loader, "batch_sampler", None)
        if not isinstance(pl_module, TransducerModule) or not hasattr(sampler, "largest"):
            return  # another model, or a sampler that cannot tell its largest batches
        device = pl_module.device
        buffers = [(buffer, buffer.clone()) for buffer in pl_module.buffers()]
        devices = [device] if device.type == "cuda" else []
        reports = []
        before = memory.reset_peak(device)
        try:
            with torch.random.fork_rng(devices=devices):
                for what, keys in sampler.largest(trainer.current_epoch).items():
                    self._try(trainer, pl_module, loader, what, keys)
                    reports.append(f"{what} ({_size(sampler, keys)})")
        finally:
            pl_module.zero_grad(set_to_none=True)
            with torch.no_grad():
                for buffer, saved in buffers:
                    buffer.copy_(saved)
        peak_mib = max(0, memory.peak(device) - before) / 2**20
        state_mib = 2 * sum(p.numel() * p.element_size() for p in pl_module.parameters()) / 2**20
        logger.info(
            "the largest batches fit, peak %.0f MiB, plus %.0f MiB for the state of Adam: %s",
            peak_mib,
            state_mib,
            ", ".join(reports),
        )

    def _try(
        self,
        trainer: Trainer,
        module: TransducerModule,
        loader: Any,
        what: str,
        keys: list[EpochIndex],
    ) -> None:
        """Runs a batch. If it does not fit, raises an error that says how much of it fits."""
        part = keys
        while not self._fits(trainer, module, loader, part):
            if len(part) == 1:
                utterance = loader.dataset.utterances[part[0].position]
                raise RuntimeError(
                    f"out of memory: utterance {utterance.id!r} of {utterance.duration_s:.1f} s "
                    f"({_size(loader.batch_sampler, part)}) does not fit even in a batch by "
                    "itself; exclude it (data.max_duration_s), or use loss=fused or a smaller model"
                )
            part = part[: len(part) // 2]
        if len(part) < len(keys):
            sampler = loader.batch_sampler
            max_cells = _two_digits(sum(sampler.num_cells(key.position) for key in part))
            raise RuntimeError(
                f"out of memory: the batch with {what} ({_size(sampler, keys)}) does not fit, "
                f"but {len(part)} of its utterances ({_size(sampler, part)}) do. Try "
                f"data.max_cells={max_cells} (now {sampler.max_cells}) or "
                f"data.max_utterances={len(part)} (now {sampler.max_utterances})"
            )

    def _fits(
        self, trainer: Trainer, module: TransducerModule, loader: Any, keys: list[EpochIndex]
    ) -> bool:
        batch = trainer.precision_plugin.convert_input(loader.collate_fn(_read(loader, keys)))
        try:
            # Not the module wrapped by DDP, whose backward would wait for the other processes.
            with trainer.precision_plugin.train_step_context():
                losses = module.compute_losses(batch.to(module.device))[0].losses
                loss = losses.sum() / len(losses)
            loss.backward()
        except (RuntimeError, MemoryError) as error:
            if not _is_out_of_memory(error):
                raise
            return False
        finally:
            module.zero_grad(set_to_none=True)
        return True


def _read(loader: Any, keys: list[EpochIndex]) -> list[Any]:
    # As a data worker does: a dataset may read several utterances at once.
    return loader.dataset.__getitems__(keys)


def _is_out_of_memory(error: BaseException) -> bool:
    # On the CPU, torch's allocator raises a plain RuntimeError.
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        "can't allocate memory" in str(error) or "bad_alloc" in str(error)
    )


def _size(sampler: Any, keys: list[EpochIndex]) -> str:
    cells = sum(sampler.num_cells(key.position) for key in keys)
    return f"{len(keys)} utterances, {cells} cells"


def _two_digits(value: int) -> int:
    """Rounds down to two significant digits."""
    unit = 10 ** max(0, len(str(value)) - 2)
    return value // unit * unit
