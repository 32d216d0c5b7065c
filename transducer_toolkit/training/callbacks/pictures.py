# SPDX-License-Identifier: Apache-2.0
"""Callbacks that draw the learning curves and one utterance of the test set."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from matplotlib.figure import Figure

from transducer_toolkit.data.byte_pieces import shown_symbols
from transducer_toolkit.data.dataset import Batch
from transducer_toolkit.data.features import FRAME_SHIFT_MS
from transducer_toolkit.decoding import align, lattice_occupancy, narrow_lattice
from transducer_toolkit.ops.topology import get_topology, is_feasible
from transducer_toolkit.training.lightning_module import TransducerModule
from transducer_toolkit.training.plots import History, draw_learning_curves, draw_utterance

logger = logging.getLogger(__name__)
MAX_CELLS = 20_000_000  # of one picture


class LearningCurves(Callback):
    """Draws losses, word error rate and learning rate over the steps, at the end of the training.

    TensorBoard shows the picture, too.

    Checkpoints contain the history, so a resumed training draws the curves from the beginning.

    Args:
        path: PNG file to write.
    """

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        self.history: History = {}

    def state_dict(self) -> dict[str, Any]:
        return {"history": {name: list(points) for name, points in self.history.items()}}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self.history = {
            name: [(int(step), float(value)) for step, value in points]
            for name, points in state_dict["history"].items()
        }

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
    ) -> None:
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]
        step, seen = trainer.global_step, self.history.get("train/loss")
        # With accumulation, several batches have the same step. Add one point for each step.
        if step > 0 and step % every == 0 and (not seen or seen[-1][0] != step):
            self._add(trainer, "train/loss", float(trainer.callback_metrics["train/loss"]))
            self._add(trainer, "learning rate", trainer.optimizers[0].param_groups[0]["lr"])

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            for name in ("val/loss", "val/wer"):
                if name in trainer.callback_metrics:
                    self._add(trainer, name, float(trainer.callback_metrics[name]))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero and self.history:
            _save(trainer, draw_learning_curves(self.history), self.path)

    def _add(self, trainer: Trainer, name: str, value: float) -> None:
        self.history.setdefault(name, []).append((trainer.global_step, value))


class UtterancePicture(Callback):
    """Draws one utterance of the first test set: features, lattice occupancy, best path.

    TensorBoard shows the picture, too. The callback ignores utterances that have no symbols, or no
    path in the model's topology.

    Args:
        path: PNG file to write.
        duration_s: duration in seconds. The utterance whose duration is closest is drawn.
    """

    def __init__(self, path: str, *, duration_s: float = 3.0) -> None:
        self.path = Path(path)
        self.duration_s = duration_s
        self._chosen: tuple[float, Batch] | None = None  # distance in seconds, batch of one

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._chosen = None

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if dataloader_idx != 0 or not trainer.is_global_zero:
            return
        if not isinstance(pl_module, TransducerModule):
            return
        frame_s = FRAME_SHIFT_MS / 1000
        for row, length in enumerate(batch.feature_lengths.tolist()):
            distance = abs(length * frame_s - self.duration_s)
            num_targets = int(batch.target_lengths[row])
            num_frames = pl_module.model.encoder.num_output_frames(length)
            if (
                num_targets > 0
                and is_feasible(num_frames, num_targets, topology=pl_module.topology)
                and (self._chosen is None or distance < self._chosen[0])
            ):
                self._chosen = (distance, _row(batch, row))

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._chosen is None or not isinstance(pl_module, TransducerModule):
            return
        batch = self._chosen[1]
        model, tokenizer = pl_module.model, pl_module.tokenizer
        encoder_out, encoder_lengths, predictor_out = model(
            batch.features, batch.feature_lengths, batch.targets
        )
        num_cells = int(encoder_lengths[0]) * (batch.targets.size(1) + 1)
        if num_cells > MAX_CELLS:
            logger.warning(
                "no picture %s: the lattice of %s has %d cells, more than %d; transducer-align "
                "draws parts of a recording",
                self.path,
                batch.utterance_ids[0],
                num_cells,
                MAX_CELLS,
            )
            return
        lattice = narrow_lattice(
            model.joiner,
            encoder_out,
            predictor_out,
            batch.targets,
            model.blank,
            vocab_size=tokenizer.vocab_size,
            num_durations=get_topology(pl_module.topology).num_durations,
        ).arguments()
        occupancy = lattice_occupancy(*lattice, topology=pl_module.topology)[0]
        alignment = align(*lattice, topology=pl_module.topology)[0]
        figure = draw_utterance(
            batch.features[0].cpu(),
            occupancy.cpu(),
            alignment,
            shown_symbols([tokenizer.symbols[token] for token in batch.targets[0].tolist()]),
            title=f"{batch.utterance_ids[0]}: {batch.texts[0]!r}",
            feature_frame_s=FRAME_SHIFT_MS / 1000,
        )
        _save(trainer, figure, self.path)


def _row(batch: Batch, row: int) -> Batch:
    """Returns one utterance of a batch, as a batch without padding."""
    num_frames = int(batch.feature_lengths[row])
    num_targets = int(batch.target_lengths[row])
    return Batch(
        utterance_ids=[batch.utterance_ids[row]],
        texts=[batch.texts[row]],
        features=batch.features[row : row + 1, :num_frames].clone(),
        feature_lengths=batch.feature_lengths[row : row + 1].clone(),
        targets=batch.targets[row : row + 1, :num_targets].clone(),
        target_lengths=batch.target_lengths[row : row + 1].clone(),
    )


def _save(trainer: Trainer, figure: Figure, path: Path) -> None:
    """Writes a figure to a file, and shows it in TensorBoard under the name of the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    for sink in trainer.loggers:
        if isinstance(sink, TensorBoardLogger):
            sink.experiment.add_figure(path.stem, figure, trainer.global_step, close=False)
