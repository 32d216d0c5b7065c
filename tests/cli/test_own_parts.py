# SPDX-License-Identifier: Apache-2.0
"""Joiners and losses of a package of the user's own, from the command line."""

import pytest
import torch

from transducer_toolkit import transducer_loss
from transducer_toolkit.cli.train import main
from transducer_toolkit.training.stages import LossStage, PackedLoss

HERE = __name__


class ProductJoiner(torch.nn.Module):
    """The least that loss=packed and the searches need."""

    def __init__(self, encoder_dim, predictor_dim, joiner_dim, vocab_size):
        super().__init__()
        self.encoder_layer = torch.nn.Linear(encoder_dim, joiner_dim)
        self.predictor_layer = torch.nn.Linear(predictor_dim, joiner_dim)
        self.output = torch.nn.Linear(joiner_dim, vocab_size)

    def forward(self, encoder_out, predictor_out, shape):
        frames = self.project_encoder(encoder_out[:, :, None])
        return shape.pack(self.step_projected(frames, predictor_out[:, None]))

    def project_encoder(self, frames):
        return self.encoder_layer(frames)

    def step_projected(self, projected_frames, predictor_out):
        return self.output((projected_frames * self.predictor_layer(predictor_out)).tanh())


class ModifiedLoss(PackedLoss):
    """Its config does not say that the topology is "modified"."""

    def __init__(self, *, blank):
        super().__init__(blank=blank, topology="modified")


class TensorLoss(LossStage):
    def __init__(self, *, blank):
        super().__init__()

    def forward(self, batch):
        logits = batch.joiner(batch.encoder_out, batch.predictor_out, batch.shape)
        return transducer_loss(logits, batch.targets, *batch.shape.lengths, blank=0)


class NotAStage:
    def __init__(self, *, blank):
        pass


@pytest.fixture
def own_losses(tmp_path):
    """The options that add a config for each loss above, named as its class."""
    (tmp_path / "conf" / "loss").mkdir(parents=True)
    for kind in (ModifiedLoss, TensorLoss, NotAStage):
        text = f"_target_: {HERE}.{kind.__name__}\n"
        (tmp_path / "conf" / "loss" / f"{kind.__name__}.yaml").write_text(text)
    return ["--config-dir", tmp_path / "conf"]


JOINER = f"model.joiner._target_={HERE}.ProductJoiner"


@pytest.mark.parametrize("search", ["greedy", "beam"])
def test_a_joiner_with_the_documented_methods_trains_and_decodes(
    search, tmp_path, console, train_overrides, capsys
):
    options = [*train_overrides, "trainer.max_epochs=1", "loss=packed", JOINER, f"search={search}"]
    console(main, tmp_path, *options)
    said = capsys.readouterr().out
    assert "test set" in said and f"--trust-package {HERE.partition('.')[0]} " in said


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["loss=simple", JOINER], "model.joiner: SimpleLoss trains transducer_toolkit.modules"),
        (
            ["loss=fused_tdt", JOINER],
            f"joiner: {HERE}.ProductJoiner has no argument num_extra",
        ),
        (
            ["loss=packed", "loss.normalization=hat", JOINER],
            f"joiner: {HERE}.ProductJoiner has no argument normalization, blank, which",
        ),
        (["loss=fused", JOINER], "joiner: expected a Joiner with unmodified forward for FusedLoss"),
        (["loss=TensorLoss"], "loss: expected TensorLoss.forward to return a StageOutput, got Ten"),
        (["loss=NotAStage"], "loss: expected a LossStage, got NotAStage"),
    ],
)
def test_parts_that_do_not_fit_are_named(
    options, message, tmp_path, console, train_overrides, own_losses, capsys
):
    with pytest.raises(SystemExit):
        console(main, tmp_path, *train_overrides, *own_losses, *options)
    assert message in capsys.readouterr().err


def test_the_data_follow_the_topology_that_only_the_class_of_a_loss_says(
    tmp_path, console, train_overrides, own_losses, monkeypatch
):
    from transducer_toolkit.data.datamodule import TransducerDataModule

    topologies = []
    setup = TransducerDataModule.setup
    monkeypatch.setattr(
        TransducerDataModule,
        "setup",
        lambda self, stage: (topologies.append(self.topology), setup(self, stage)),
    )
    options = [*own_losses, "loss=ModifiedLoss", "trainer.max_epochs=1", "test=false"]
    console(main, tmp_path, *train_overrides, *options)
    assert topologies[0] == "modified"
