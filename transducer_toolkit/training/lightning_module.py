# SPDX-License-Identifier: Apache-2.0
"""Training, validation and test of a transducer in Lightning's terms."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from lightning import LightningModule
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from transducer_toolkit.data.dataset import Batch
from transducer_toolkit.data.features import FRAME_SHIFT_MS
from transducer_toolkit.data.tokenizer import Tokenizer
from transducer_toolkit.decoding import (
    GreedySearch,
    Hypothesis,
    NonFiniteScoresError,
    Search,
    align,
)
from transducer_toolkit.inference.recognizer import CHECKPOINT_KEY
from transducer_toolkit.inference.words import encoder_frame_s, word_spans
from transducer_toolkit.modules.transducer import Transducer
from transducer_toolkit.ops.lattice import LatticeShape
from transducer_toolkit.ops.topology import is_feasible
from transducer_toolkit.training.accumulation import FrameWeights
from transducer_toolkit.training.ctc import CtcLoss
from transducer_toolkit.training.scoring import (
    SymbolDelay,
    Transcript,
    WordErrors,
    count_word_errors,
    gather_transcripts,
    measure_symbol_delay,
    symbol_delays_ms,
)
from transducer_toolkit.training.stages import LossInput, LossStage, StageOutput

logger = logging.getLogger(__name__)
# What torch makes of an option; its messages name neither option nor value.
BAD_OPTION = (ArithmeticError, LookupError, TypeError, ValueError)


class TransducerModule(LightningModule):
    """A transducer, its loss stage and its optimiser.

    The training loss is the sum over the utterances divided by the number of encoder frames, of
    all processes and of all batches accumulated for an optimizer step together. Validation and
    test decode and count word errors over the whole set; where the manifest of a test
    set has word start times, the test also measures the symbol delay: by how much the first
    symbol of each reference word, on the best path of the reference, is emitted after the word
    starts. Logged: ``train/loss`` and, unweighted and no part of it, ``train/ctc``; ``val/loss``
    (all nats a frame), ``val/wer``, ``test/wer/NAME``, ``test/symbol_delay_ms/NAME`` (mean over
    the words).

    Args:
        model: the transducer.
        tokenizer: whose symbols it emits.
        loss: the loss stage; needed for training and validation.
        optimizer: called with the parameters; needed for training.
        ctc: an auxiliary loss on the encoder frames, added in training; None is none.
        scheduler: called with the optimizer and ``total_steps``, stepped once an optimizer step.
        recipe: what checkpoints carry for
            :meth:`~transducer_toolkit.inference.recognizer.Recognizer.from_checkpoint`.
        search: called with the model's predictor and joiner and with ``topology``, gives the
            search that validation and test decode with, such as
            ``partial(ModifiedBeamSearch, beam=8)``; greedy by default.
        num_logged_hypotheses: hypotheses printed beside their references after each validation.
        topology: of the lattice that references are aligned in; None is that of the loss stage.

    Attributes:
        test_transcripts: transcripts of each test set by name, after a test.
        test_errors: word errors of each test set by name, after a test.
        test_symbol_delays: symbol delay of each test set by name, after a test; None for a set
            without word start times.
    """

    def __init__(
        self,
        model: Transducer,
        tokenizer: Tokenizer,
        *,
        loss: LossStage | None = None,
        ctc: CtcLoss | None = None,
        optimizer: Callable[[Iterable[Tensor]], Optimizer] | None = None,
        scheduler: Callable[..., LRScheduler] | None = None,
        recipe: Mapping[str, Any] | None = None,
        search: Callable[..., Search] = GreedySearch,
        num_logged_hypotheses: int = 4,
        topology: str | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.loss = loss
        self.ctc = ctc
        self.make_optimizer = optimizer
        self.make_scheduler = scheduler
        self.recipe = recipe
        if loss is not None:
            loss.bind(model)
        self.num_logged_hypotheses = num_logged_hypotheses
        if topology is None:
            topology = "regular" if loss is None else loss.topology
        self.topology = topology
        self.make_search = search
        self.test_transcripts: dict[str, list[Transcript]] = {}
        self.test_errors: dict[str, WordErrors] = {}
        self.test_symbol_delays: dict[str, SymbolDelay | None] = {}
        self._transcripts: dict[int, list[Transcript]] = {}  # by dataloader, during an epoch
        self._loss_sum = 0.0
        self._frame_sum = 0.0
        self._num_steps = 0
        self._frame_weights = FrameWeights()

    def configure_optimizers(self) -> Optimizer | OptimizerLRSchedulerConfig:
        if self.make_optimizer is None:
            raise ValueError("training needs an optimizer: TransducerModule(..., optimizer=...)")
        try:
            optimizer = self.make_optimizer(self.parameters())
        except BAD_OPTION as error:
            raise _named(error)(f"optimizer {self.make_optimizer}: {error}") from error
        if self.make_scheduler is None:
            return optimizer
        total_steps = int(self.trainer.estimated_stepping_batches)
        try:
            scheduler = self.make_scheduler(optimizer, total_steps=total_steps)
        except BAD_OPTION as error:
            raise _named(error)(f"scheduler {self.make_scheduler}: {error}") from error
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    def compute_losses(self, batch: Batch) -> tuple[StageOutput, LatticeShape, Tensor]:
        """Run model and loss stage on a batch.

        Returns:
            The stage's output, the batch's lattices and ``encoder_out`` (B, T, E).
        """
        if self.loss is None:
            raise ValueError("this needs a loss stage: TransducerModule(..., loss=...)")
        encoder_out, encoder_lengths, predictor_out = self.model(
            batch.features, batch.feature_lengths, batch.targets
        )
        shape = LatticeShape.from_lengths(encoder_lengths, batch.target_lengths)
        shape.to(encoder_out.device)  # one copy for everybody behind
        output = self.loss(
            LossInput(self.model.joiner, encoder_out, predictor_out, batch.targets, shape)
        )
        return output, shape, encoder_out

    def on_train_start(self) -> None:
        self._num_steps = int(self.trainer.estimated_stepping_batches)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        if self.loss is not None:
            self.loss.set_progress(self.global_step, self._num_steps)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        output, shape, encoder_out = self.compute_losses(batch)
        num_frames = shape.logit_lengths.sum().to(self.device, output.losses.dtype)
        # DDP averages gradients over the processes: with F the frames of all of them and W their
        # number, W / F times each one's sum gives the sum of all over F.
        mean_frames = self.trainer.strategy.reduce(num_frames, reduce_op="mean")
        loss = output.losses.sum() / mean_frames
        batch_size = len(batch)
        self.log("train/loss", loss, prog_bar=True, batch_size=batch_size)
        for name, value in output.metrics.items():
            self.log(f"train/{name}", value, batch_size=batch_size)
        if self.ctc is not None:
            ctc = self.ctc(encoder_out, batch.targets, shape).sum() / mean_frames
            self.log("train/ctc", ctc, batch_size=batch_size)
            loss = loss + self.ctc.weight * ctc
        starts_step = batch_idx % self.trainer.accumulate_grad_batches == 0
        return self._frame_weights.weigh(loss, mean_frames, starts_step=starts_step)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        self._frame_weights.finish(self.parameters(), self.trainer.accumulate_grad_batches)

    def on_validation_epoch_start(self) -> None:
        self._transcripts = {}
        self._loss_sum = self._frame_sum = 0.0

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        output, shape, encoder_out = self.compute_losses(batch)
        self._loss_sum += float(output.losses.sum())
        self._frame_sum += float(shape.logit_lengths.sum())
        try:
            hypotheses = self._search(encoder_out, shape.logit_lengths)
        except NonFiniteScoresError as error:
            # A training goes on: val/loss says NaN, and these utterances count as not recognised.
            ids = [batch.utterance_ids[b] for b in error.utterances]
            logger.warning("validation: no symbols, as scores are not finite: %s", ", ".join(ids))
            lengths = shape.logit_lengths.clone()
            lengths[error.utterances] = 0
            hypotheses = self._search(encoder_out, lengths)
        self._keep(batch, hypotheses)

    def on_validation_epoch_end(self) -> None:
        sums = torch.tensor([self._loss_sum, self._frame_sum], device=self.device)
        sums = self.trainer.strategy.reduce(sums, reduce_op="sum")
        transcripts = gather_transcripts(self._transcripts.get(0, []))
        errors = count_word_errors(transcripts)
        # Every process computed the same values from all of the set.
        self.log("val/loss", sums[0] / sums[1], rank_zero_only=False, sync_dist=False)
        self.log("val/wer", errors.wer, prog_bar=True, rank_zero_only=False, sync_dist=False)
        if not self.trainer.sanity_checking:
            self._show(transcripts[: self.num_logged_hypotheses], errors)

    def on_test_epoch_start(self) -> None:
        self._transcripts = {}

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        started_s = time.perf_counter()
        encoder_out, encoder_lengths = self.model.encoder(batch.features, batch.feature_lengths)
        try:
            hypotheses = self._search(encoder_out, encoder_lengths)
        except NonFiniteScoresError as error:
            raise NonFiniteScoresError(error.utterances, names=batch.utterance_ids) from error
        # They are on the CPU: nothing is pending.
        decoding_s = time.perf_counter() - started_s
        delays = self._symbol_delays(batch, encoder_out, encoder_lengths)
        self._keep(batch, hypotheses, dataloader_idx, delays, decoding_s)

    def on_test_epoch_end(self) -> None:
        names = self.trainer.datamodule.test_names  # type: ignore[attr-defined]
        for index, name in enumerate(names):
            transcripts = gather_transcripts(self._transcripts.get(index, []))
            self.test_transcripts[name] = transcripts
            self.test_errors[name] = count_word_errors(transcripts)
            self.log(f"test/wer/{name}", self.test_errors[name].wer, sync_dist=False)
            delay = measure_symbol_delay(transcripts)
            self.test_symbol_delays[name] = delay
            if delay is not None:
                self.log(f"test/symbol_delay_ms/{name}", delay.mean_ms, sync_dist=False)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.recipe is not None:
            checkpoint[CHECKPOINT_KEY] = dict(self.recipe)

    def _search(self, encoder_out: Tensor, encoder_lengths: Tensor) -> list[Hypothesis]:
        search = self.make_search(self.model.predictor, self.model.joiner, topology=self.topology)
        return search(encoder_out, encoder_lengths)

    def _keep(
        self,
        batch: Batch,
        hypotheses: list[Hypothesis],
        dataloader_idx: int = 0,
        symbol_delays_ms: Sequence[tuple[float, ...] | None] | None = None,
        decoding_s: float = 0.0,
    ) -> None:
        """Keep the transcripts of a batch until the end of the epoch."""
        delays = symbol_delays_ms or [None] * len(batch)
        lengths = batch.feature_lengths
        shares = (lengths / lengths.sum()).tolist()
        durations_s = (lengths.double() * FRAME_SHIFT_MS / 1000).tolist()
        self._transcripts.setdefault(dataloader_idx, []).extend(
            Transcript(
                id=id,
                reference=text,
                hypothesis=self.tokenizer.decode(hypothesis.tokens),
                symbol_delays_ms=delay,
                duration_s=duration_s,
                decoding_s=share * decoding_s,
            )
            for id, text, hypothesis, delay, duration_s, share in zip(
                batch.utterance_ids,
                batch.texts,
                hypotheses,
                delays,
                durations_s,
                shares,
                strict=True,
            )
        )

    def _symbol_delays(
        self, batch: Batch, encoder_out: Tensor, encoder_lengths: Tensor
    ) -> list[tuple[float, ...] | None]:
        """Delays of the words whose start is known, of utterances that have a path at all."""
        word_starts_s = batch.word_starts_s or [None] * len(batch)
        sizes = zip(encoder_lengths.tolist(), batch.target_lengths.tolist(), strict=True)
        rows = [
            row
            for row, (num_frames, num_targets) in enumerate(sizes)
            if word_starts_s[row] is not None
            and is_feasible(num_frames, num_targets, topology=self.topology)
        ]
        delays: list[tuple[float, ...] | None] = [None] * len(batch)
        if not rows:
            return delays
        targets = batch.targets[rows]
        shape = LatticeShape.from_lengths(encoder_lengths[rows], batch.target_lengths[rows])
        logits = self.model.joiner(encoder_out[rows], self.model.predictor(targets), shape)
        paths = align(logits.float(), targets, shape, self.model.blank, topology=self.topology)
        frame_s = encoder_frame_s(self.model.encoder)
        for row, path in zip(rows, paths, strict=True):
            tokens = batch.targets[row, : int(batch.target_lengths[row])].tolist()
            spans = word_spans([self.tokenizer.symbols[token] for token in tokens])
            emitted_s = [path.frames[first] * frame_s for _, first, _ in spans]
            delays[row] = symbol_delays_ms(emitted_s, word_starts_s[row] or ())
        return delays

    def _show(self, transcripts: list[Transcript], errors: WordErrors) -> None:
        """Put a few hypotheses beside their references, always the same utterances."""
        if not self.trainer.is_global_zero:
            return
        lines = [
            f"epoch {self.current_epoch}, step {self.global_step}: "
            f"validation WER {100 * errors.wer:.2f} %"
        ]
        for transcript in transcripts:
            lines += [f"  ref {transcript.reference}", f"  hyp {transcript.hypothesis}"]
        logger.info("\n".join(lines))
        text = "\n".join(f"    {line}" for line in lines)  # indented: verbatim in Markdown
        for sink in self.loggers:
            if isinstance(sink, TensorBoardLogger):
                sink.experiment.add_text("val/hypotheses", text, self.global_step)


def _named(error: Exception) -> type[Exception]:
    """What a user's mistake raises here: an IndexError would be one of ours."""
    return TypeError if isinstance(error, TypeError) else ValueError
