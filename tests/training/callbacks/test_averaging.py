# SPDX-License-Identifier: Apache-2.0
from types import SimpleNamespace

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import LambdaCallback, ModelCheckpoint
from torch.utils.data import DataLoader

from transducer_toolkit.training.callbacks.averaging import AverageWeights


class Regression(lightning.LightningModule):
    """Two weights, a frozen one, and buffers that training changes."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.weight = torch.nn.Parameter(torch.randn(3))
        self.frozen = torch.nn.Parameter(torch.randn(2), requires_grad=False)
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("has_statistics", torch.tensor(False))
        self.present = []  # the weights after each step
        self.validated, self.tested = [], []

    def training_step(self, batch, batch_idx):
        return (batch @ self.weight - 1).square().mean()

    def on_train_start(self):
        self.mean.fill_(3.0)
        self.has_statistics.fill_(True)

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.present.append(self.weight.detach().clone())

    def validation_step(self, batch, batch_idx):
        self.validated.append(self.weight.detach().clone())

    def test_step(self, batch, batch_idx):
        self.tested.append(self.weight.detach().clone())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05)


def fit(folder, *, max_epochs, ckpt_path=None, callbacks=()):
    module = Regression()
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=max_epochs,
        callbacks=[*callbacks, ModelCheckpoint(folder, save_last=True)],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=1,
    )
    generator = torch.Generator().manual_seed(1)
    batches = DataLoader(torch.randn(24, 3, generator=generator), batch_size=4)
    trainer.fit(module, batches, DataLoader(torch.zeros(1)), ckpt_path=ckpt_path)
    return trainer, module


def averages(present, *, decay, first=0):
    """What the average is after each step, by its formula."""
    found = []
    for step, weights in enumerate(present):
        count = step - first
        if count <= 0:
            found.append(weights)
        elif decay is None:
            found.append(torch.stack(present[first : step + 1]).mean(0))
        else:
            weight = max(1 - decay, 9 / (count + 10))
            found.append((1 - weight) * found[-1] + weight * weights)
    return found


@pytest.mark.parametrize(
    ("decay", "start_fraction", "first"), [(0.4, 0.0, 0), (0.999, 0.25, 3), (None, 0.5, 6)]
)
def test_what_is_validated_saved_and_tested(tmp_path, decay, start_fraction, first):
    average = AverageWeights(decay=decay, start_fraction=start_fraction)
    trainer, module = fit(tmp_path, max_epochs=2, callbacks=[average])
    _, plain = fit(tmp_path / "plain", max_epochs=2)
    for one, other in zip(module.present, plain.present, strict=True):
        assert torch.equal(one, other)  # training itself goes on as without
    assert len(module.present) == 12
    expected = averages(module.present, decay=decay, first=first)
    # Sanity check, then after steps 6 and 12.
    for found, step in zip(module.validated[1:], (5, 11), strict=True):
        torch.testing.assert_close(found, expected[step])
    torch.testing.assert_close(module.weight.detach(), expected[11])

    path = tmp_path / "last.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    torch.testing.assert_close(checkpoint["state_dict"]["weight"], expected[11])
    assert torch.equal(checkpoint["current_model_state"]["weight"], module.present[11])
    assert not torch.allclose(expected[11], module.present[11])
    assert torch.equal(checkpoint["state_dict"]["mean"], torch.full((3,), 3.0))
    assert bool(checkpoint["state_dict"]["has_statistics"])
    assert torch.equal(checkpoint["state_dict"]["frozen"], module.frozen)
    trainer.test(module, DataLoader(torch.zeros(1)), ckpt_path=str(path), verbose=False)
    torch.testing.assert_close(module.tested[0], expected[11])


@pytest.mark.parametrize(("decay", "start_fraction"), [(0.9, 0.0), (None, 0.2), (None, 0.7)])
def test_a_resumed_training_has_the_same_average(tmp_path, decay, start_fraction):
    def average():
        return AverageWeights(decay=decay, start_fraction=start_fraction)

    _, whole = fit(tmp_path / "whole", max_epochs=3, callbacks=[average()])
    stop = LambdaCallback(
        on_train_epoch_end=lambda trainer, _: setattr(trainer, "should_stop", True)
    )
    fit(tmp_path / "first", max_epochs=3, callbacks=[average(), stop])
    _, second = fit(
        tmp_path / "second",
        max_epochs=3,
        callbacks=[average()],
        ckpt_path=str(tmp_path / "first" / "last.ckpt"),
    )
    torch.testing.assert_close(torch.stack(second.present), torch.stack(whole.present[6:]))
    torch.testing.assert_close(second.weight, whole.weight)
    expected = averages(whole.present, decay=decay, first=int(start_fraction * 18))
    torch.testing.assert_close(whole.weight.detach(), expected[-1])


def test_a_training_may_take_it_up_later(tmp_path):
    fit(tmp_path / "first", max_epochs=1)
    path = str(tmp_path / "first" / "last.ckpt")
    average = AverageWeights(decay=0.5)
    _, second = fit(tmp_path / "second", max_epochs=2, callbacks=[average], ckpt_path=path)
    expected = averages(second.present, decay=0.5)[-1]
    torch.testing.assert_close(second.weight.detach(), expected)


def test_the_average_is_where_the_training_is():
    average = AverageWeights()
    trainer = SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device("meta")))
    average.setup(trainer, Regression(), "fit")
    assert average._average_model.module.weight.device.type == "meta"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decay": 1.0}, r"decay: expected a number in \(0, 1\) or None, got 1.0"),
        ({"decay": 0.0}, r"decay: expected a number in \(0, 1\) or None, got 0.0"),
        ({"start_fraction": 1.0}, r"start_fraction: expected a number in \[0, 1\), got 1.0"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        AverageWeights(**options)
