# SPDX-License-Identifier: Apache-2.0
"""Loss stages of TDT and multi-blank transducers."""

import pytest
import torch

from transducer_toolkit import Joiner, LatticeShape, multi_blank_loss, tdt_loss, transducer_loss
from transducer_toolkit.training import stages
from transducer_toolkit.training.stages import LossInput

TDT, MULTI_BLANK = "tdt-0-1-2", "multi_blank-2-3"


def batch_for(stage):
    torch.manual_seed(0)
    targets = torch.tensor([[1, 4, 2], [6, -1, -1], [-1, -1, -1]])
    shape = LatticeShape.from_lengths([5, 4, 2], [3, 1, 0])
    joiner = Joiner(8, 6, 16, 7, num_extra=stage.num_extra)
    assert joiner.vocab_size == 7 and joiner.output.out_features == 7 + stage.num_extra
    return LossInput(joiner, torch.randn(3, 6, 8), torch.randn(3, 4, 6), targets, shape)


def run(losses, batch):
    return losses, torch.autograd.grad(losses.sum(), list(batch.joiner.parameters()))


def check_same(actual, expected):
    torch.testing.assert_close(actual[0], expected[0])
    for grad, wanted in zip(actual[1], expected[1], strict=True):
        torch.testing.assert_close(grad, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [stages.PackedLoss, stages.FusedLoss])
@pytest.mark.parametrize("topology", [TDT, MULTI_BLANK])
def test_the_stages_compute_the_losses(kind, topology):
    options = {"sigma": 0.05, "fastemit_lambda": 0.1, "delay_penalty": 0.2}
    stage = kind(topology=topology, **options).eval()
    batch = batch_for(stage)
    logits = batch.joiner(batch.encoder_out, batch.predictor_out, batch.shape)
    arguments = logits, batch.targets, *batch.shape.lengths, 0
    loss, durations = (tdt_loss, (0, 1, 2)) if topology == TDT else (multi_blank_loss, (2, 3))
    expected = loss(*arguments, durations, reduction="none", **options)
    check_same(run(stage(batch).losses, batch), run(expected, batch))


@pytest.mark.parametrize("kind", [stages.PackedLoss, stages.FusedLoss])
def test_omega_is_the_part_of_the_regular_loss(kind):
    always = kind(topology=TDT, sigma=0.05, omega=1.0)
    batch = batch_for(always)
    logits = batch.joiner(batch.encoder_out, batch.predictor_out, batch.shape)
    regular = transducer_loss(
        logits[:, :7], batch.targets, *batch.shape.lengths, 0, reduction="none"
    )
    check_same(run(always(batch).losses, batch), run(regular, batch))
    durations = kind(topology=TDT, sigma=0.05)(batch).losses
    assert torch.equal(always.eval()(batch).losses, durations)  # in training only
    sometimes = kind(topology=TDT, sigma=0.05, omega=0.3)
    torch.manual_seed(3)
    found = [bool(sometimes(batch).losses[0].isclose(regular[0])) for _ in range(200)]
    assert 30 < sum(found) < 90


@pytest.mark.parametrize("kind", [stages.PackedLoss, stages.FusedLoss])
def test_hat(kind):
    stage = kind(normalization="hat", blank=0)
    assert stage.joiner_options == {"normalization": "hat", "blank": 0}
    batch = batch_for(stage)
    logits = batch.joiner(batch.encoder_out, batch.predictor_out, batch.shape)
    expected = transducer_loss(
        logits, batch.targets, *batch.shape.lengths, 0, reduction="none", normalization="hat"
    )
    check_same(run(stage(batch).losses, batch), run(expected, batch))
    assert kind(topology=TDT, normalization="hat").joiner_options["num_extra"] == 3


@pytest.mark.parametrize("kind", [stages.PackedLoss, stages.FusedLoss])
def test_options_are_checked_at_once(kind):
    for options, message in (
        ({"sigma": 0.1}, "sigma: expected 0 without durations"),
        ({"omega": 0.1}, "omega: expected 0 with topology 'regular'"),
        ({"topology": MULTI_BLANK, "omega": 0.1}, "omega: expected 0"),
        ({"topology": TDT, "omega": 2.0}, r"omega: expected a number in \[0, 1\]"),
        ({"topology": MULTI_BLANK, "blank": 3}, "blank: expected 0 with 'multi_blank-2-3', got 3"),
        ({"topology": "tdt-1-0"}, "ascending order"),
    ):
        with pytest.raises(ValueError, match=message):
            kind(**options)
