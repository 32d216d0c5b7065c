# SPDX-License-Identifier: Apache-2.0
"""A callback that lists the utterances of the training set that could not be read."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer

from transducer_toolkit.data.dataset import Batch

__all__ = ["CountUnreadable"]

logger = logging.getLogger(__name__)


class CountUnreadable(Callback):
    """Appends each utterance that ``data.on_bad_audio=skip`` skipped to a file, with the reason.

    Each process lists its own utterances, each of them once. The log contains the first of them
    and their number.

    Args:
        path: JSON-lines file to write.
        num_logged: number of utterances that each process logs.
    """

    def __init__(self, path: str, *, num_logged: int = 10) -> None:
        self.path = Path(path)
        self.num_logged = num_logged
        self._seen: set[str] = set()

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        new = {id_: why for id_, why in batch.unreadable.items() if id_ not in self._seen}
        if not new:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            for id_, why in new.items():
                file.write(json.dumps({"id": id_, "reason": why}, ensure_ascii=False) + "\n")
                if len(self._seen) < self.num_logged:
                    logger.warning("skipped: %s", why)
                self._seen.add(id_)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._seen:
            logger.warning("%d utterances could not be read, see %s", len(self._seen), self.path)

    def state_dict(self) -> dict[str, Any]:
        return {"seen": sorted(self._seen)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._seen = set(state_dict["seen"])
