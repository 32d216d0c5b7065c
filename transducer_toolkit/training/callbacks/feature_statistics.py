# SPDX-License-Identifier: Apache-2.0
"""Estimates the global feature statistics of an encoder before training."""

from __future__ import annotations

import itertools

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor

from transducer_toolkit.modules.encoder_frontend import FeatureNormalizer


class EstimateFeatureStatistics(Callback):
    """Fill the encoder's global mean and standard deviation before training.

    Does nothing for ``normalization="utterance"`` or when a checkpoint brought the statistics.

    Args:
        num_batches: batches of the training set to look at, in each process.
    """

    def __init__(self, num_batches: int = 100) -> None:
        self.num_batches = num_batches

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for module in pl_module.modules():
            if isinstance(module, FeatureNormalizer) and module.needs_statistics:
                module.set_statistics(*self._measure(trainer, module.num_features))

    def _measure(self, trainer: Trainer, num_features: int) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each bin, over the batches of all processes."""
        # float64: the variance is a difference. Rows: count, sum and sum of squares.
        sums = torch.zeros(3, num_features, dtype=torch.float64)
        loader = trainer.datamodule.train_dataloader()  # type: ignore[attr-defined]
        for batch in itertools.islice(loader, self.num_batches):
            for features, length in zip(batch.features, batch.feature_lengths, strict=True):
                real = features[: int(length)].double()
                sums[0] += len(real)
                sums[1] += real.sum(0)
                sums[2] += real.square().sum(0)
        sums = trainer.strategy.reduce(sums.to(trainer.strategy.root_device), reduce_op="sum")
        mean = sums[1] / sums[0]
        std = (sums[2] / sums[0] - mean.square()).clamp(min=1e-10).sqrt()
        return mean.float(), std.float()
