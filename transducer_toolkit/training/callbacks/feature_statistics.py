# SPDX-License-Identifier: Apache-2.0
"""A callback that estimates the global feature statistics of an encoder before training."""

from __future__ import annotations

import itertools

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor

from transducer_toolkit.modules.encoder_frontend import FeatureNormalizer


class EstimateFeatureStatistics(Callback):
    """Estimates the global mean and standard deviation of the features before training.

    It does nothing if the encoder has ``normalization="utterance"``, or if a checkpoint contained
    the statistics.

    Args:
        num_batches: number of training batches that each process reads for the estimate.
    """

    def __init__(self, num_batches: int = 100) -> None:
        self.num_batches = num_batches

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for module in pl_module.modules():
            if isinstance(module, FeatureNormalizer) and module.needs_statistics:
                module.set_statistics(*self._measure(trainer, module.num_features))

    def _measure(self, trainer: Trainer, num_features: int) -> tuple[Tensor, Tensor]:
        """Returns the mean and the standard deviation of each bin, over all processes."""
        # Rows: count, sum and sum of squares. float64, because the variance is a difference of two
        # large numbers.
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
