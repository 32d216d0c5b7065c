# SPDX-License-Identifier: Apache-2.0
"""A progress bar for trainings of any number of epochs."""

from __future__ import annotations

from lightning.pytorch.callbacks import RichProgressBar

__all__ = ["ProgressBar"]


class ProgressBar(RichProgressBar):
    """Shows ``Epoch 3`` without a last epoch; Lightning's bar shows ``Epoch 3/-2``."""

    def _get_train_description(self, current_epoch: int) -> str:
        text = super()._get_train_description(current_epoch)
        return text.replace("/-2", "  ") if self.trainer.max_epochs == -1 else text
