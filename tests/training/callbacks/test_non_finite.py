# SPDX-License-Identifier: Apache-2.0
"""Real trainings of a small model, one of whose batches holds NaN or whose gradient does."""

import json
import math

import pytest
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.plugins import MixedPrecision
from torch.utils.data import DataLoader

from transducer_toolkit.data.dataset import Batch
from transducer_toolkit.modules import Joiner, StatelessPredictor
from transducer_toolkit.ops.lattice import LatticeShape
from transducer_toolkit.training.callbacks.non_finite import SkipNonFiniteSteps
from transducer_toolkit.training.stages import LossInput, PackedLoss

NUM_BATCHES = 6


def batch_of(number, bad=()):
    """Two utterances of batch ``number``; those named in ``bad`` have a NaN feature."""
    generator = torch.Generator().manual_seed(number)
    ids = [f"{number}a", f"{number}b"]
    features = torch.randn(2, 6, 4, generator=generator)
    for row, id_ in enumerate(ids):
        if id_ in bad:
            features[row, 2, 1] = math.nan
    return Batch(
        utterance_ids=ids,
        texts=["", ""],
        features=features,
        feature_lengths=torch.tensor([6, 5]),
        targets=torch.tensor([[1, 2], [3, 0]]),
        target_lengths=torch.tensor([2, 1]),
    )


class Module(LightningModule):
    """Batch norm, joiner and loss stage; the gradient of batch ``poisoned`` is made NaN."""

    def __init__(self, poisoned=None):
        super().__init__()
        torch.manual_seed(0)
        self.norm = torch.nn.BatchNorm1d(4)
        self.predictor = StatelessPredictor(5, embedding_dim=3)
        self.joiner = Joiner(encoder_dim=4, predictor_dim=3, joiner_dim=6, vocab_size=5)
        self.loss = PackedLoss()
        self.poisoned = poisoned
        self.weights = []  # after each batch

    def training_step(self, batch, batch_idx):
        encoder_out = self.norm(batch.features.transpose(1, 2)).transpose(1, 2)
        shape = LatticeShape.from_lengths(batch.feature_lengths, batch.target_lengths)
        stage_input = LossInput(
            self.joiner, encoder_out, self.predictor(batch.targets), batch.targets, shape
        )
        loss = self.loss(stage_input).losses.sum() / shape.num_frames
        return loss * _NanGradient.apply(loss) if batch_idx == self.poisoned else loss

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.weights.append({k: v.clone() for k, v in self.state_dict().items()})

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.01, fused=True)


class _NanGradient(torch.autograd.Function):
    """1, with a NaN gradient."""

    @staticmethod
    def forward(ctx, x):
        return torch.ones_like(x)

    @staticmethod
    def backward(ctx, grad):
        return grad * math.nan


def train(
    tmp_path, *, bad=(), poisoned=None, max_consecutive=10, numbers=range(NUM_BATCHES), **options
):
    module = Module(poisoned)
    guard = SkipNonFiniteSteps(tmp_path / "skipped.jsonl", max_consecutive=max_consecutive)
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=1,
        callbacks=[guard],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        gradient_clip_val=1.0,
        **options,
    )
    data = [batch_of(number, bad) for number in numbers]
    trainer.fit(module, DataLoader(data, batch_size=None))
    return module, guard


def written(tmp_path):
    path = tmp_path / "skipped.jsonl"
    return [json.loads(line) for line in path.open()] if path.exists() else []


def same(state, other):
    return all(torch.equal(state[key], other[key]) for key in state)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_batch_of_nan_changes_nothing_and_is_named(tmp_path, precision):
    module, guard = train(tmp_path, bad=["2b", "4a"], precision=precision)
    assert guard.num_skipped == 2
    rows = [(row["step"], row["non_finite"], row["utterances"]) for row in written(tmp_path)]
    # (The batch norm spreads the NaN over the batch.)
    assert rows == [(2, "loss", ["2a", "2b"]), (4, "loss", ["4a", "4b"])]
    assert same(module.weights[1], module.weights[2])  # statistics of the batch norm included
    assert not same(module.weights[2], module.weights[3])
    # As if those batches had not been there.
    without, _ = train(tmp_path, numbers=[0, 1, 3, 5], precision=precision)
    assert same(module.weights[-1], without.weights[-1])


def test_nothing_happens_to_a_training_without(tmp_path):
    _, guard = train(tmp_path)
    assert guard.num_skipped == 0 and not written(tmp_path)


def test_only_the_utterances_with_such_a_loss_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.nn.BatchNorm1d, "forward", lambda self, x: x)
    train(tmp_path, bad=["2b"])
    assert [row["utterances"] for row in written(tmp_path)] == [["2b"]]


def test_a_gradient_alone(tmp_path):
    module, guard = train(tmp_path, poisoned=3)
    assert [(row["step"], row["non_finite"]) for row in written(tmp_path)] == [(3, "gradient")]
    assert written(tmp_path)[0]["utterances"] == ["3a", "3b"]
    assert same(module.weights[2], module.weights[3]) and guard.num_skipped == 1


def test_accumulated_batches_are_one_step(tmp_path):
    module, guard = train(tmp_path, bad=["3a"], accumulate_grad_batches=2)
    (row,) = written(tmp_path)
    assert row["step"] == 1 and row["utterances"] == ["3a", "3b"] and guard.num_skipped == 1
    assert same(module.weights[1], module.weights[3])
    assert not same(module.weights[3], module.weights[5])


def test_too_many_in_a_row_end_the_training(tmp_path):
    bad = ["1a", "3a", "4a"]
    message = r"infinite in step 4 \(consecutive steps: 2, max_consecutive=1\)"
    with pytest.raises(ValueError, match=message):
        train(tmp_path, bad=bad, max_consecutive=1)
    assert len(written(tmp_path)) == 3
    with pytest.raises(ValueError, match=r"in step 1 .*utterances of this step: 1a, 1b; .* lists"):
        train(tmp_path, bad=bad, max_consecutive=0)
    train(tmp_path, bad=bad, max_consecutive=2)
    with pytest.raises(ValueError, match="max_consecutive: expected at least 0, got -1"):
        SkipNonFiniteSteps("x", max_consecutive=-1)


@pytest.mark.parametrize(("scale", "skipped"), [(2.0**10, 0), (1.0, 1)])
def test_an_overflow_under_a_loss_scale_is_the_scalers(tmp_path, scale, skipped):
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    plugin = MixedPrecision("16-mixed", "cpu", scaler=scaler)
    # A NaN gradient with a finite loss, clipped, through a fused optimizer.
    module, guard = train(tmp_path, poisoned=3, plugins=[plugin])
    assert guard.num_skipped == skipped == len(written(tmp_path))
    # Skipped by one or the other. (The batch is in order, and so are its statistics.)
    before, skipping, after = (
        {k: v for k, v in module.weights[i].items() if "running" not in k and "num_" not in k}
        for i in (2, 3, 4)
    )
    assert same(before, skipping) and not same(skipping, after)
    assert scaler.get_scale() == scale / 2
    # A loss that is not finite is the data's under any scale.
    _, guard = train(
        tmp_path, bad=["2a"], plugins=[MixedPrecision("16-mixed", "cpu", scaler=scaler)]
    )
    assert guard.num_skipped == 1


def test_counts_are_part_of_checkpoints():
    guard, other = (SkipNonFiniteSteps("x") for _ in range(2))
    guard.num_skipped, guard._consecutive = 7, 2
    other.load_state_dict(guard.state_dict())
    assert (other.num_skipped, other._consecutive) == (7, 2)
