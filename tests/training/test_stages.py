# SPDX-License-Identifier: Apache-2.0
import sys

import pytest
import torch

from transducer_toolkit import LatticeShape
from transducer_toolkit.losses import transducer_loss
from transducer_toolkit.modules import Joiner
from transducer_toolkit.training.stages import PackedLoss, TorchaudioLoss


@pytest.fixture
def batch():
    torch.manual_seed(0)
    joiner = Joiner(8, 6, 16, 7)
    # T and U beyond the longest lengths: the encoder pads its input, collation its targets.
    encoder_out = torch.randn(3, 6, 8, requires_grad=True)
    predictor_out = torch.randn(3, 5, 6, requires_grad=True)
    targets = torch.tensor([[1, 4, 2, -1], [6, -1, -1, -1], [-1, -1, -1, -1]])
    shape = LatticeShape.from_lengths([5, 4, 2], [3, 1, 0])
    return joiner, encoder_out, predictor_out, targets, shape


def run(stage, joiner, encoder_out, predictor_out, targets, shape):
    output = stage(joiner, encoder_out, predictor_out, targets, shape)
    leaves = [encoder_out, predictor_out, *joiner.parameters()]
    return output.losses, torch.autograd.grad(output.losses.sum(), leaves)


def test_packed_and_torchaudio_agree(batch):
    pytest.importorskip("torchaudio")
    losses, grads = run(PackedLoss(blank=0), *batch)
    yardstick, yardstick_grads = run(TorchaudioLoss(blank=0), *batch)
    assert losses.shape == (3,)
    torch.testing.assert_close(losses, yardstick, rtol=1e-5, atol=1e-5)
    for grad, yardstick_grad in zip(grads, yardstick_grads, strict=True):
        torch.testing.assert_close(grad, yardstick_grad, rtol=1e-4, atol=1e-5)


def test_packed_passes_its_options_on(batch):
    joiner, encoder_out, predictor_out, targets, shape = batch
    options = {"one_sym_per_frame": True, "delay_penalty": 0.1, "clamp": 0.01}
    losses, grads = run(PackedLoss(blank=0, fastemit_lambda=0.5, **options), *batch)
    expected = transducer_loss(
        joiner(encoder_out, predictor_out, shape),
        targets,
        shape.logit_lengths,
        shape.target_lengths,
        0,
        reduction="none",
        fastemit_lambda=0.5,
        **options,
    )
    torch.testing.assert_close(losses, expected)
    (expected_grad,) = torch.autograd.grad(expected.sum(), encoder_out)
    torch.testing.assert_close(grads[0], expected_grad)


def test_torchaudio_missing_is_said_in_words(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchaudio.functional", None)
    with pytest.raises(ImportError, match="loss=torchaudio needs a torchaudio that fits"):
        TorchaudioLoss()
