# SPDX-License-Identifier: Apache-2.0
"""Keeps the best checkpoints of a training, also when the training is continued."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from transducer_toolkit.inference.trust import load_plain
from transducer_toolkit.ops.checks import check_int

__all__ = ["BestCheckpoint"]

logger = logging.getLogger(__name__)


class BestCheckpoint(ModelCheckpoint):
    """A ``ModelCheckpoint`` that keeps the best checkpoints of a training that is continued.

    When a training goes on in another folder, the best checkpoints so far are copied to that
    folder. Their scores are read from the files themselves. If the new run has another
    ``monitor``, the scores cannot be compared: the copies are then called ``NAME_by_METRIC.ckpt``,
    and the new selection starts without a score.

    File names contain the values alone: ``filename="{step}"`` gives ``8.ckpt``, where Lightning's
    default gives ``step=8.ckpt``, which a Hydra override would have to quote.

    Args:
        dirpath: folder of the checkpoints.
        monitor: metric that decides, such as ``val/wer``, ``val/cer`` or ``val/loss``.
        options: other options of :class:`lightning.pytorch.callbacks.ModelCheckpoint`.
    """

    def __init__(self, dirpath: str, *, monitor: str, **options: Any) -> None:
        check_int(options.get("save_top_k", 1), "save_top_k")
        defaults = {"auto_insert_metric_name": False, "enable_version_counter": False}
        super().__init__(dirpath, monitor=monitor, **(defaults | options))

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if trainer.state.fn != TrainerFn.FITTING:
            return
        states = [
            state
            for key, state in checkpoint.get("callbacks", {}).items()
            if key.startswith(("BestCheckpoint", "ModelCheckpoint")) and "best_k_models" in state
        ]
        same = [state for state in states if state["monitor"] == self.monitor]
        beside = Path(str(trainer.ckpt_path)).parent
        if same:
            self._take_over(same[0], beside)
        elif states:
            self._keep_aside(states[0], beside)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Does nothing: :meth:`on_load_checkpoint` knows the folder of the checkpoint."""

    def _take_over(self, state: dict[str, Any], beside: Path) -> None:
        """Copies the best checkpoints of the continued run and remembers their scores."""
        self.best_k_models = {}
        for stored in state["best_k_models"]:
            source = _first_file(Path(stored), beside / Path(stored).name)
            if source is None:
                logger.warning(
                    "the best checkpoint of the continued run is missing (%s): its score is "
                    "forgotten, and the next validation writes a new one",
                    stored,
                )
                continue
            target = Path(str(self.dirpath)) / Path(stored).name
            score = _score(source, str(self.monitor))
            _copy(source, target)
            self.best_k_models[str(target)] = (
                state["best_k_models"][stored] if score is None else score
            )
        if self.best_k_models:
            best, worst = (min, max) if self.mode == "min" else (max, min)
            scores = self.best_k_models
            self.best_model_path = best(scores, key=lambda path: float(scores[path]))
            self.best_model_score = scores[self.best_model_path]
            self.kth_best_model_path = worst(scores, key=lambda path: float(scores[path]))
            self.kth_value = scores[self.kth_best_model_path]

    def _keep_aside(self, state: dict[str, Any], beside: Path) -> None:
        """Keeps the best checkpoints by another metric under another name."""
        metric = str(state["monitor"]).replace("/", "_")
        for stored, score in state["best_k_models"].items():
            source = _first_file(Path(stored), beside / Path(stored).name)
            if source is not None:
                _score(source, str(state["monitor"]))  # whether it is a checkpoint
                target = Path(str(self.dirpath)) / f"{source.stem}_by_{metric}.ckpt"
                _copy(source, target)
                logger.warning(
                    "checkpoints are now selected by %s; the best by %s so far (%.4g) is kept as "
                    "%s",
                    self.monitor,
                    state["monitor"],
                    float(score),
                    target,
                )

    def _save_topk_checkpoint(
        self, trainer: Trainer, monitor_candidates: dict[str, Tensor]
    ) -> None:
        # Lightning also asks after an epoch without a validation, and would warn.
        if self.monitor in monitor_candidates or trainer.fit_loop.epoch_loop.val_loop._has_run:
            super()._save_topk_checkpoint(trainer, monitor_candidates)


def _first_file(*paths: Path) -> Path | None:
    return next((path for path in paths if path.is_file()), None)


def _score(path: Path, monitor: str) -> Tensor | None:
    """Returns the score that a checkpoint had when it was written as one of the best.

    Raises:
        ValueError: the file is no checkpoint; a hostile one may name any file to be copied.
    """
    with path.open("rb") as file:
        checkpoint = load_plain(file, path)
    if not isinstance(checkpoint, dict):
        raise ValueError(f"{path} is not a checkpoint of transducer-train")
    for state in checkpoint.get("callbacks", {}).values():
        if isinstance(state, dict) and state.get("monitor") == monitor:
            score = state.get("current_score")
            return score.clone() if isinstance(score, Tensor) else None
    return None


@rank_zero_only
def _copy(source: Path, target: Path) -> None:
    if target.exists() and source.samefile(target):
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.partial")
    shutil.copyfile(source, partial)
    partial.replace(target)
