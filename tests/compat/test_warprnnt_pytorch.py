# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from tests.losses.helpers import ragged_batch
from transducer_toolkit import multi_blank_loss
from transducer_toolkit.compat.common import JointInputs
from transducer_toolkit.compat.warprnnt_pytorch import RNNTLoss, rnnt_loss

torchaudio = pytest.importorskip("torchaudio", exc_type=ImportError)


def arguments(blank=0):
    batch = ragged_batch([6, 4], [3, 2], 7, dtype=torch.float32, blank=blank, padding=0.0)
    return batch.logits, *(
        x.int() for x in (batch.targets.clamp(0, 6), batch.logit_lengths, batch.target_lengths)
    )


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_positional_arguments_are_those_of_warprnnt_pytorch(reduction):
    logits, *indices = arguments()
    expected = torchaudio.functional.rnnt_loss(logits, *indices, blank=0, reduction=reduction)
    torch.testing.assert_close(rnnt_loss(logits, *indices, 0, reduction), expected)
    torch.testing.assert_close(RNNTLoss(0, reduction)(logits, *indices), expected)


def test_log_probabilities_are_taken_too():
    # the binding normalizes on the CPU itself, and ESPnet's joint network returns logits
    logits, *indices = arguments()
    expected = rnnt_loss(logits, *indices)
    torch.testing.assert_close(rnnt_loss(logits.log_softmax(-1), *indices), expected)


def test_fastemit_changes_the_gradient_only():
    logits, *indices = arguments()
    plain, fast = (rnnt_loss(logits, *indices, fastemit_lambda=x) for x in (0.0, 0.5))
    assert torch.equal(plain, fast)
    gradients = [torch.autograd.grad(loss, logits)[0] for loss in (plain, fast)]
    assert (gradients[1] - gradients[0]).abs().max() > 0.01


def test_multi_blank():
    logits, *indices = arguments(blank=4)
    indices[0] = indices[0] % 2
    loss = RNNTLoss(4, "sum", big_blank_durations=[2, 3], sigma=0.1)
    options = {"big_blank_durations": (2, 3), "sigma": 0.1, "reduction": "sum"}
    assert torch.equal(loss(logits, *indices), multi_blank_loss(logits, *indices, 4, **options))


def test_bad_arguments():
    logits, *indices = arguments()
    with pytest.raises(ValueError, match=r"acts: expected shape \(B, T, U \+ 1, V\), got \(2, 6"):
        rnnt_loss(logits[:, :, 0], *indices)
    with pytest.raises(ValueError, match="reduction"):
        RNNTLoss(reduction="average")
    with pytest.raises(ValueError, match="logits: expected the output of an output layer"):
        RNNTLoss()(JointInputs(torch.zeros(2, 6, 3), torch.zeros(2, 4, 3), "tanh"), *indices)
