# SPDX-License-Identifier: Apache-2.0
"""Seeds the random numbers of every training batch."""

from __future__ import annotations

import numpy as np
import torch
from lightning import Callback, LightningModule, Trainer

from transducer_toolkit.data.dataset import Batch
from transducer_toolkit.ops.checks import check_at_least


class SeedEachBatch(Callback):
    """Key the random numbers of dropout by seed, epoch, batch and process.

    So a resumed training goes on as if it had not been interrupted, and the processes of a group
    do not all drop the same units.

    Args:
        seed: of the training, at least 0.
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
