# SPDX-License-Identifier: Apache-2.0
"""A callback that seeds torch's random numbers before every training batch."""

from __future__ import annotations

import numpy as np
import torch
from lightning import Callback, LightningModule, Trainer

from transducer_toolkit.data.dataset import Batch
from transducer_toolkit.ops.checks import check_at_least


class SeedEachBatch(Callback):
    """Seeds torch before each batch from the seed, the epoch, the batch and the process.

    A resumed training therefore draws the same dropout masks as an uninterrupted one, and the
    processes of a group draw different masks.

    Args:
        seed: seed of the training, at least 0.
    """

    def __init__(self, seed: int) -> None:
        check_at_least(0, seed=seed)
        self.seed = seed

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        key = np.random.SeedSequence(
            (self.seed, trainer.current_epoch, batch_idx, trainer.global_rank)
        )
        torch.manual_seed(int(key.generate_state(1)[0]))
