# SPDX-License-Identifier: Apache-2.0
"""The default loss follows the checkpoint that a training starts from."""

from functools import partial

import pytest
import torch
from omegaconf import OmegaConf

from tests.cli.test_conf import composed
from tests.training.test_warm_start import characters, module_of, saved
from transducer_toolkit.cli.auto_loss import settle
from transducer_toolkit.inference.recognizer import CHECKPOINT_KEY
from transducer_toolkit.training.stages import FusedLoss, PrunedLoss


def checkpoint_of(folder, stage=FusedLoss, **options):
    return saved(module_of(characters("abc"), loss=partial(stage, **options)), folder / "a.ckpt")


def settled(*overrides, ckpt_path=None):
    """The options of the loss that a command line means."""
    cfg = composed("train", "~experiment", *overrides)
    checkpoint = {} if ckpt_path is None else torch.load(ckpt_path, weights_only=True)
    settle(cfg, ckpt_path, checkpoint)
    return OmegaConf.to_container(cfg.loss)


@pytest.mark.parametrize(
    ("stage", "options", "same"),
    [
        (FusedLoss, {}, ["loss=fused"]),
        (PrunedLoss, {"topology": "modified"}, ["loss=fused", "loss.topology=modified"]),
        (FusedLoss, {"topology": "tdt-0-2"}, ["loss=fused_tdt", "loss.topology=tdt-0-2"]),
        (
            FusedLoss,
            {"topology": "multi_blank-3"},
            ["loss=multi_blank", "loss.topology=multi_blank-3"],
        ),
        (FusedLoss, {"normalization": "hat"}, ["loss=fused", "loss.normalization=hat"]),
        (
            FusedLoss,
            {"topology": "tdt-0-1", "normalization": "hat"},
            ["loss=fused_tdt", "loss.topology=tdt-0-1", "loss.normalization=hat"],
        ),
    ],
)  # fmt: skip
def test_the_loss_follows_the_checkpoint(tmp_path, stage, options, same):
    path = checkpoint_of(tmp_path, stage, **options)
    expected = {"normalization": "softmax", **settled(*same)}
    assert settled(f"init_from={path}") == expected
    assert settled(ckpt_path=path) == expected
    data = composed("train", "~experiment", f"init_from={path}")
    settle(data, None, {})
    assert data.data.topology == options.get("topology", "regular")


def test_without_a_checkpoint_it_is_fused():
    assert settled() == settled("loss=fused")


@pytest.mark.parametrize(
    "chosen",
    [
        ["loss=fused"],
        ["loss=pruned"],
        ["loss=torchaudio"],
        ["loss.topology=modified", "loss.normalization=softmax"],
    ],
)
def test_an_option_that_is_given_wins(tmp_path, chosen):
    path = checkpoint_of(tmp_path, topology="tdt-0-1", normalization="hat")
    given = composed("train", "~experiment", *chosen)
    assert settled(*chosen, f"init_from={path}") == OmegaConf.to_container(given.loss)


def test_an_experiment_that_chooses_a_loss_wins(tmp_path):
    cfg = composed("train", f"init_from={checkpoint_of(tmp_path)}")  # of the digits
    settle(cfg, None, {})
    assert cfg.loss == composed("train", "loss=fused_tdt").loss


def test_one_option_of_the_loss(tmp_path):
    path = checkpoint_of(tmp_path, topology="tdt-0-1")
    found = settled("+loss.sigma=0.5", "loss.clamp=0.1", f"init_from={path}")
    assert (found["sigma"], found["clamp"], found["topology"]) == (0.5, 0.1, "tdt-0-1")
    # A loss that knows no durations raises its own error, not one about sigma.
    found = settled("loss=pruned", "loss.topology=auto", f"init_from={path}")
    assert found["topology"] == "tdt-0-1" and "sigma" not in found


def test_a_topology_that_does_not_exist(tmp_path):
    path = checkpoint_of(tmp_path)
    checkpoint = torch.load(path, weights_only=True)
    checkpoint[CHECKPOINT_KEY]["topology"] = "linear"
    torch.save(checkpoint, path)
    with pytest.raises(ValueError, match=r"init_from: .*a\.ckpt: topology: expected one of"):
        settled(f"init_from={path}")
    with pytest.raises(ValueError, match=r"ckpt_path: .*a\.ckpt: topology: expected one of"):
        settled(ckpt_path=path)
