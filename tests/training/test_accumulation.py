# SPDX-License-Identifier: Apache-2.0
"""Accumulated batches, through Lightning, against one large batch in plain torch."""

from functools import partial

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import LambdaCallback
from lightning.pytorch.plugins import MixedPrecision

from transducer_toolkit.data.dataset import Batch
from transducer_toolkit.data.tokenizer import CharTokenizer
from transducer_toolkit.modules import ConvLstmEncoder, Joiner, StatelessPredictor, Transducer
from transducer_toolkit.training.ctc import CtcLoss
from transducer_toolkit.training.lightning_module import TransducerModule
from transducer_toolkit.training.stages import PackedLoss

TOKENIZER = CharTokenizer.from_texts(["ab c"])
FEATURE_LENGTHS, TARGET_LENGTHS = [30, 21, 9, 17, 40, 12], [4, 3, 0, 1, 6, 2]


def make_batch(rows, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(6, 40, 20, generator=generator, dtype=torch.float64)
    targets = torch.randint(1, TOKENIZER.vocab_size, (6, 6), generator=generator)
    return Batch(
        utterance_ids=[str(row) for row in rows],
        texts=["" for _ in rows],
        features=features[rows].to(dtype),
        feature_lengths=torch.tensor([FEATURE_LENGTHS[row] for row in rows]),
        targets=targets[rows],
        target_lengths=torch.tensor([TARGET_LENGTHS[row] for row in rows]),
    )


class Batches:
    """A loader of batches, those of the process where there are more than one."""

    def __init__(self, rows_of_processes, dtype=torch.float64):
        self.rows_of_processes, self.dtype = rows_of_processes, dtype

    def __len__(self):
        return len(self.rows_of_processes[0])

    def __iter__(self):
        is_group = torch.distributed.is_available() and torch.distributed.is_initialized()
        rank = torch.distributed.get_rank() if is_group else 0
        return (make_batch(rows, self.dtype) for rows in self.rows_of_processes[rank])


def make_module(*, with_ctc=False, dtype=torch.float64):
    torch.manual_seed(0)
    vocab_size = TOKENIZER.vocab_size
    model = Transducer.build(
        ConvLstmEncoder(num_features=20, conv_channels=2, hidden_dim=8, dropout=0.0),
        partial(StatelessPredictor, embedding_dim=4),
        partial(Joiner, joiner_dim=8),
        vocab_size=vocab_size,
        blank=TOKENIZER.blank,
    )
    module = TransducerModule(
        model,
        TOKENIZER,
        loss=PackedLoss(),
        ctc=CtcLoss(8, vocab_size, weight=0.3) if with_ctc else None,
        optimizer=partial(torch.optim.SGD, lr=0.5),
    )
    return module.to(dtype)


def fit(module, rows_of_processes, accumulate, dtype=torch.float64, **options):
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=1,
        accumulate_grad_batches=accumulate,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        use_distributed_sampler=False,
        **{"devices": 1, **options},
    )
    trainer.fit(module, Batches(rows_of_processes, dtype))
    return list(module.parameters())


def large_steps(module, rows_of_steps, clip=None):
    """Steps of stochastic gradient descent on whole batches, in plain torch."""
    optimizer = module.make_optimizer(module.parameters())
    for rows in rows_of_steps:
        batch = make_batch(rows, next(module.parameters()).dtype)
        output, shape, encoder_out = module.compute_losses(batch)
        losses = output.losses
        if module.ctc is not None:
            losses = losses + module.ctc.weight * module.ctc(encoder_out, batch.targets, shape)
        optimizer.zero_grad()
        (losses.sum() / shape.num_frames).backward()
        if clip is not None:
            norm = torch.nn.utils.clip_grad_norm_(module.parameters(), clip)
            assert norm > clip
        optimizer.step()
    return list(module.parameters())


def assert_same(actual, expected, tolerance=1e-10):
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


CASES = {
    "equal": (2, [[0, 1, 2], [3, 4, 5]], [[0, 1, 2, 3, 4, 5]]),
    "unequal": (3, [[4], [2], [0, 1, 3, 5]], [[0, 1, 2, 3, 4, 5]]),
    "an epoch that ends early": (2, [[0, 1], [2], [3, 4, 5]], [[0, 1, 2], [3, 4, 5]]),
    "several steps": (2, [[0], [1], [2], [3], [4], [5]], [[0, 1], [2, 3], [4, 5]]),
    "no accumulation": (1, [[0, 1, 2], [3, 4, 5]], [[0, 1, 2], [3, 4, 5]]),
}


@pytest.mark.parametrize("with_ctc", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_accumulated_batches_are_one_large_batch(case, with_ctc):
    accumulate, batches, steps = CASES[case]
    actual = fit(make_module(with_ctc=with_ctc), [batches], accumulate)
    assert_same(actual, large_steps(make_module(with_ctc=with_ctc), steps))


def test_clipping_sees_the_gradient_of_the_large_batch():
    accumulate, batches, steps = CASES["unequal"]
    actual = fit(make_module(), [batches], accumulate, gradient_clip_val=0.01)
    assert_same(actual, large_steps(make_module(), steps, clip=0.01))


def test_gradient_scaling_of_float16():
    accumulate, batches, steps = CASES["unequal"]
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)

    class ScaledFloat32(MixedPrecision):
        """The scaler's part of float16 training; a CPU's LSTM computes in float32."""

        def autocast_context_manager(self):
            return torch.autocast("cpu", enabled=False)

    actual = fit(
        make_module(dtype=torch.float32),
        [batches],
        accumulate,
        dtype=torch.float32,
        plugins=[ScaledFloat32("16-mixed", "cpu", scaler)],
        gradient_clip_val=0.01,
    )
    expected = large_steps(make_module(dtype=torch.float32), steps, clip=0.01)
    assert_same(actual, expected, tolerance=1e-6)


def test_a_step_whose_gradients_were_dropped_is_skipped():
    accumulate, batches, _ = CASES["several steps"]

    def drop_first(trainer, module, optimizer):
        if trainer.global_step == 0:
            optimizer.zero_grad(set_to_none=True)

    callback = LambdaCallback(on_before_optimizer_step=drop_first)
    actual = fit(make_module(), [batches], accumulate, callbacks=[callback])
    assert_same(actual, large_steps(make_module(), [[2, 3], [4, 5]]))


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch without gloo")
def test_processes_and_accumulated_batches_are_one_large_batch():
    of_processes = [[[0], [1, 2], [3]], [[4, 5], [0], [1]]]
    steps = [[0, 1, 2, 4, 5, 0], [3, 1]]  # two batches of each process, then what is left
    actual = fit(make_module(with_ctc=True), of_processes, 2, devices=2, strategy="ddp_fork")
    assert_same(actual, large_steps(make_module(with_ctc=True), steps))
