# SPDX-License-Identifier: Apache-2.0
"""The LightningModule that trains, validates and tests a transducer."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from lightning import LightningModule
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor
from torch.nn.utils import get_total_norm
from torch.nn.utils.rnn import pad_sequence
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

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
from transducer_toolkit.inference.words import encoder_frame_s, word_starts
from transducer_toolkit.modules.transducer import Transducer
from transducer_toolkit.ops.lattice import LatticeShape
from transducer_toolkit.ops.topology import is_feasible
from transducer_toolkit.training.accumulation import FrameWeights
from transducer_toolkit.training.ctc import CtcLoss
from transducer_toolkit.training.scoring import (
    CharacterErrors,
    SymbolDelay,
    Transcript,
    WordErrors,
    count_character_errors,
    count_word_errors,
    gather_transcripts,
    measure_symbol_delay,
    normalize_transcripts,
    symbol_delays_ms,
)
from transducer_toolkit.training.stages import LossInput, LossStage, StageOutput
from transducer_toolkit.training.utterance_names import naming_utterances

logger = logging.getLogger(__name__)
MAX_SHOWN = 300  # characters of a text in the log
# Is added to the times of an alignment, in frames: files hold rounded starts of frames.
ROUNDING_FRAMES = 0.01
# Errors that torch raises for a bad option. Their messages name neither the option nor its value.
BAD_OPTION = (ArithmeticError, LookupError, TypeError, ValueError)


class TransducerModule(LightningModule):
    """A LightningModule of a transducer, its loss stage and its optimizer.

    The training loss is the sum of the losses of the utterances, divided by the number of encoder
    frames. Both are counted over all processes and all batches of an optimizer step.

    Validation and test decode every utterance and count the word errors of the whole set. If the
    manifest of a test set has word start times, the test also measures the symbol delay. For each
    word of the reference, this is the time from the start of the word until its first symbol is
    emitted on the best path of the reference.

    These values are logged:

    - ``train/loss`` and ``val/loss``, in nats per frame;
    - ``train/gradient_norm``, before it is clipped, and ``train/learning_rate``;
    - ``train/ctc``, in nats per frame, before it is weighted; ``train/loss`` does not include it;
    - ``val/wer`` and ``test/wer/NAME``, the word error rate as a fraction;
    - ``val/cer`` and ``test/cer/NAME``, the character error rate;
    - ``test/symbol_delay_ms/NAME``, the mean over the words.

    Args:
        model: the transducer.
        tokenizer: the tokenizer of the symbols that the model emits.
        loss: the loss stage; needed for training and validation.
        optimizer: a function from the parameters to the optimizer; needed for training.
        ctc: an auxiliary loss on the encoder frames, added in training, or None.
        scheduler: a function from the optimizer and ``total_steps`` to a schedule, which is
            stepped once per optimizer step; None for a constant rate.
        recipe: data stored in checkpoints for
            :meth:`~transducer_toolkit.inference.recognizer.Recognizer.from_checkpoint`.
        search: a function from the model's predictor, its joiner and ``topology`` to the search
            that validation and test use, such as ``partial(BeamSearch, beam=8)``. The
            default is greedy search.
        num_logged_hypotheses: number of hypotheses that are logged with their references after
            each validation.
        topology: topology of decoding and of the alignment of references; None for that of the
            loss stage.
        normalize: normalizes references and hypotheses before errors are counted, such as a
            :class:`~transducer_toolkit.data.text.TextNormalizer`; None compares them as they are.

    Attributes:
        training_config: config of the training in plain values, stored in checkpoints; None for
            none.
        test_transcripts: transcripts of each test set by name, after a test.
        test_errors: word errors of each test set by name, after a test.
        test_character_errors: character errors of each test set by name, after a test.
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
        normalize: Callable[[str], str] | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.loss = loss
        self.ctc = ctc
        self.make_optimizer = optimizer
        self.make_scheduler = scheduler
        self.recipe = recipe
        self.training_config: Mapping[str, Any] | None = None
        if loss is not None:
            loss.bind(model)
        self.num_logged_hypotheses = num_logged_hypotheses
        if topology is None:
            topology = "regular" if loss is None else loss.topology
        self.topology = topology
        self.make_search = search
        self.normalize = normalize
        self.test_transcripts: dict[str, list[Transcript]] = {}
        self.test_errors: dict[str, WordErrors] = {}
        self.test_character_errors: dict[str, CharacterErrors] = {}
        self.test_symbol_delays: dict[str, SymbolDelay | None] = {}
        self._transcripts: dict[int, list[Transcript]] = {}  # by dataloader, during an epoch
        self._loss_sum = 0.0
        self._frame_sum = 0.0
        self._num_steps = 0
        self._is_resumed = False
        self._optimizer_options: list[dict[str, Any]] = []  # by parameter group
        self._frame_weights = FrameWeights()

    def configure_optimizers(self) -> Optimizer | OptimizerLRSchedulerConfig:
        if self.make_optimizer is None:
            raise ValueError(
                "optimizer: expected a function, got None; pass "
                "TransducerModule(..., optimizer=...) to train"
            )
        function = getattr(self.make_optimizer, "func", self.make_optimizer)  # of a partial
        takes_module = getattr(function, "takes_module", False)
        try:
            source: Any = self if takes_module else self.parameters()
            optimizer = self.make_optimizer(source)
        except BAD_OPTION as error:
            raise _named(error)(f"optimizer {_call_of(self.make_optimizer)}: {error}") from error
        self._optimizer_options = [
            {name: value for name, value in group.items() if name != "params"}
            for group in optimizer.param_groups
        ]
        if self.make_scheduler is None:
            return optimizer
        total_steps = int(self.trainer.estimated_stepping_batches)
        try:
            scheduler = self.make_scheduler(optimizer, total_steps=total_steps)
        except BAD_OPTION as error:
            raise _named(error)(f"scheduler {_call_of(self.make_scheduler)}: {error}") from error
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    def compute_losses(self, batch: Batch) -> tuple[StageOutput, LatticeShape, Tensor]:
        """Runs the model and the loss stage on a batch.

        Returns:
            The output of the stage, the lattices of the batch, and ``encoder_out`` (B, T, E).

        Raises:
            ValueError: if the module has no loss stage.
        """
        if self.loss is None:
            raise ValueError(
                "loss: expected a loss stage, got None; pass TransducerModule(..., loss=...)"
            )
        encoder_out, encoder_lengths, predictor_out = self.model(
            batch.features, batch.feature_lengths, batch.targets
        )
        self._check_encoder(batch, encoder_out, encoder_lengths)
        with naming_utterances(batch.utterance_ids):
            shape = LatticeShape.from_lengths(encoder_lengths, batch.target_lengths)
            shape.to(encoder_out.device)  # one upload, which the joiner and the loss share
            output = self.loss(
                LossInput(
                    self.model.joiner,
                    encoder_out,
                    predictor_out,
                    batch.targets,
                    shape,
                    self._alignment(batch, encoder_lengths),
                )
            )
        if not isinstance(output, StageOutput):
            raise TypeError(
                f"loss: expected {type(self.loss).__name__}.forward to return a StageOutput, got "
                f"{type(output).__name__}"
            )
        return output, shape, encoder_out

    def _alignment(self, batch: Batch, encoder_lengths: Tensor) -> Tensor | None:
        """Returns the encoder frame of each target (B, U) on the CPU, if the batch has times.

        A time behind the last frame, where an encoder left out a part of a frame, is in the last.
        """
        if not batch.token_times_s:
            return None
        rows = [torch.tensor(times_s, dtype=torch.float64) for times_s in batch.token_times_s]
        times_s = pad_sequence(rows, batch_first=True)  # (B, U)
        frames = times_s / encoder_frame_s(self.model.encoder) + ROUNDING_FRAMES
        return frames.long().minimum(encoder_lengths.cpu()[:, None] - 1)

    def on_train_start(self) -> None:
        self._num_steps = int(self.trainer.estimated_stepping_batches)
        if self._is_resumed:
            self._apply_optimizer_options()

    def _apply_optimizer_options(self) -> None:
        """Gives the optimizer the options of its config instead of those of a checkpoint.

        A schedule of another class than LambdaLR has restored its own base rates.
        """
        schedulers = [config.scheduler for config in self.trainer.lr_scheduler_configs]
        groups = self.trainer.optimizers[0].param_groups
        for group, options in zip(groups, self._optimizer_options, strict=True):
            rate = {"lr"} if schedulers else set()
            group.update({name: options[name] for name in options if name not in rate})
        for scheduler in schedulers:
            if isinstance(scheduler, LambdaLR):
                scheduler.base_lrs = [options["lr"] for options in self._optimizer_options]
                factors = [factor(scheduler.last_epoch) for factor in scheduler.lr_lambdas]
                for group, base, factor in zip(groups, scheduler.base_lrs, factors, strict=True):
                    group["initial_lr"], group["lr"] = base, base * factor
                scheduler._last_lr = [group["lr"] for group in groups]

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        if self.loss is not None:
            self.loss.set_progress(self.global_step, self._num_steps)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        output, shape, encoder_out = self.compute_losses(batch)
        num_frames = shape.logit_lengths.sum().to(self.device, output.losses.dtype)
        # DDP averages the gradients over the W processes. With F frames in all processes together,
        # W / F times the sum of each process averages to the total sum over F.
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
        every = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        grads = [p.grad for p in self.parameters() if p.grad is not None]
        if (self.global_step + 1) % every == 0 and grads:
            self.log("train/gradient_norm", get_total_norm(grads))  # before it is clipped
            self.log("train/learning_rate", optimizer.param_groups[0]["lr"])

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
            # Do not end the training: val/loss is NaN, and these utterances get empty hypotheses.
            ids = [batch.utterance_ids[b] for b in error.utterances]
            logger.warning(
                "validation: the scores of these utterances are NaN or infinite, their hypotheses "
                "are empty: %s",
                ", ".join(ids),
            )
            lengths = shape.logit_lengths.clone()
            lengths[error.utterances] = 0
            hypotheses = self._search(encoder_out, lengths)
        self._keep(batch, hypotheses)

    def on_validation_epoch_end(self) -> None:
        sums = torch.tensor([self._loss_sum, self._frame_sum], device=self.device)
        sums = self.trainer.strategy.reduce(sums, reduce_op="sum")
        transcripts = gather_transcripts(self._transcripts.get(0, []))
        scored = normalize_transcripts(transcripts, self.normalize)
        errors = count_word_errors(scored)
        # Every process has computed the same values, from the whole set.
        loss = float(sums[0] / sums[1])
        self.log("val/loss", loss, rank_zero_only=False, sync_dist=False)
        self.log("val/wer", errors.wer, prog_bar=True, rank_zero_only=False, sync_dist=False)
        cer = count_character_errors(scored).cer
        self.log("val/cer", cer, rank_zero_only=False, sync_dist=False)
        if not self.trainer.sanity_checking:
            results = f"WER {100 * errors.wer:.2f} %, CER {100 * cer:.2f} %, loss {loss:#.3g}"
            self._show(transcripts[: self.num_logged_hypotheses], results)

    def on_test_epoch_start(self) -> None:
        self._transcripts = {}

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        started_s = time.perf_counter()
        encoder_out, encoder_lengths = self.model.encoder(batch.features, batch.feature_lengths)
        self._check_encoder(batch, encoder_out, encoder_lengths)
        with naming_utterances(batch.utterance_ids):
            hypotheses = self._search(encoder_out, encoder_lengths)
        # The hypotheses are on the CPU, so no device work is pending.
        decoding_s = time.perf_counter() - started_s
        delays = self._symbol_delays(batch, encoder_out, encoder_lengths)
        self._keep(batch, hypotheses, dataloader_idx, delays, decoding_s)

    def on_test_epoch_end(self) -> None:
        names = self.trainer.datamodule.test_names  # type: ignore[attr-defined]
        for index, name in enumerate(names):
            transcripts = gather_transcripts(self._transcripts.get(index, []))
            self.test_transcripts[name] = transcripts
            scored = normalize_transcripts(transcripts, self.normalize)
            self.test_errors[name] = count_word_errors(scored)
            self.test_character_errors[name] = count_character_errors(scored)
            self.log(f"test/wer/{name}", self.test_errors[name].wer, sync_dist=False)
            self.log(f"test/cer/{name}", self.test_character_errors[name].cer, sync_dist=False)
            delay = measure_symbol_delay(transcripts)
            self.test_symbol_delays[name] = delay
            if delay is not None:
                self.log(f"test/symbol_delay_ms/{name}", delay.mean_ms, sync_dist=False)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.recipe is not None:
            checkpoint[CHECKPOINT_KEY] = dict(self.recipe)
        if self.training_config is not None:
            checkpoint["training_config"] = dict(self.training_config)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.trainer.state.fn != TrainerFn.FITTING:
            return
        self._is_resumed = True
        averages = any(isinstance(it, WeightAveraging) for it in self.trainer.callbacks)  # type: ignore[attr-defined]
        if "current_model_state" in checkpoint and not averages:
            # The training that goes on averaged its weights. This one does not.
            checkpoint["state_dict"] = checkpoint["current_model_state"]

    def _check_encoder(self, batch: Batch, encoder_out: Tensor, encoder_lengths: Tensor) -> None:
        lengths, names = batch.feature_lengths, batch.utterance_ids
        self.model.encoder.check_output(lengths, encoder_out, encoder_lengths, names)

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
        """Keeps the transcripts of a batch until the end of the epoch."""
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
        """Returns the symbol delays of each utterance.

        They are None if the start times are unknown or the lattice of the utterance has no path.
        """
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
        if hasattr(self.model.joiner, "normalized"):
            logits = self.model.joiner.normalized(logits)
        paths = align(logits.float(), targets, shape, self.model.blank, topology=self.topology)
        frame_s = encoder_frame_s(self.model.encoder)
        for row, path in zip(rows, paths, strict=True):
            tokens = batch.targets[row, : int(batch.target_lengths[row])].tolist()
            starts = word_starts([self.tokenizer.symbols[token] for token in tokens])
            emitted_s = [path.frames[first] * frame_s for first in starts]
            delays[row] = symbol_delays_ms(emitted_s, word_starts_s[row] or ())
        return delays

    def _show(self, transcripts: list[Transcript], results: str) -> None:
        """Logs hypotheses with their references. The utterances are the same in every epoch."""
        if not self.trainer.is_global_zero:
            return
        lines = [f"epoch {self.current_epoch}, step {self.global_step}: validation {results}"]
        for transcript in transcripts:
            lines += [f"  ref {_shown(transcript.reference)}"]
            lines += [f"  hyp {_shown(transcript.hypothesis)}"]
        logger.info("\n".join(lines))
        text = "\n".join(f"    {line}" for line in lines)  # indented: verbatim in Markdown
        for sink in self.loggers:
            if isinstance(sink, TensorBoardLogger):
                sink.experiment.add_text("val/hypotheses", text, self.global_step)


def _shown(text: str) -> str:
    """Returns a text without its end if it is long: untrained models emit thousands of symbols."""
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}... ({len(text)} characters)"


def _call_of(make: Any) -> str:
    """Returns the name and the options of a function that was made of a config."""
    function = getattr(make, "func", make)
    options = ", ".join(f"{name}={value}" for name, value in getattr(make, "keywords", {}).items())
    return f"{getattr(function, '__qualname__', function)}({options})"


def _named(error: Exception) -> type[Exception]:
    """Returns the class of the error to raise for a bad option: TypeError or ValueError."""
    return TypeError if isinstance(error, TypeError) else ValueError
