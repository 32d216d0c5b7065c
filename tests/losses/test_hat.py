# SPDX-License-Identifier: Apache-2.0
"""normalization="hat" of every loss that has logits."""

import itertools

import pytest
import torch
from torch.nn import functional

from tests.losses.helpers import ragged_batch, zero_padding
from tests.losses.test_durations import TDT, batch_of, grad_of
from tests.losses.test_fused_durations import DurationCase, relative_errors
from tests.losses.test_fused_joiner import Case, check_same
from transducer_toolkit import (
    TransducerLoss,
    fused_joiner_loss,
    rnnt_loss,
    rnnt_loss_pruned,
    tdt_loss,
    transducer_loss,
)
from transducer_toolkit.losses.reference import (
    hat_log_probs,
    reference_duration_loss,
    reference_loss,
)
from transducer_toolkit.ops.topology import TOPOLOGIES

pytestmark = pytest.mark.usefixtures("stages")
HAT = {"normalization": "hat", "reduction": "none"}


@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize("blank", [0, 3, 6])
@pytest.mark.parametrize("enumerate_paths", [False, True])
def test_float64_equals_oracle(topology, blank, enumerate_paths):
    batch = ragged_batch([5, 4, 3], [3, 1, 0], 7, blank=blank, scale=2.0)
    expected = reference_loss(
        hat_log_probs(batch.logits, blank), *batch.index_arguments, from_log_softmax=True,
        topology=topology, reduction="none", delay_penalty=0.2, enumerate_paths=enumerate_paths,
    )  # fmt: skip
    weights = torch.randn(3, dtype=torch.float64)
    grad = zero_padding(batch, grad_of(expected, batch.logits, weights))
    for logits in (batch.logits, batch.packed()):
        actual = transducer_loss(
            logits, *batch.index_arguments, topology=topology, delay_penalty=0.2, **HAT
        )
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10)
        wanted = grad if logits.dim() == 4 else batch.shape.pack(grad)
        torch.testing.assert_close(grad_of(actual, logits, weights), wanted, rtol=0, atol=1e-10)


@pytest.mark.parametrize("vocab_size", [2, 5, 40, 5000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_every_size_and_dtype(vocab_size, dtype):
    batch = ragged_batch([4, 3], [2, 1], vocab_size, blank=vocab_size // 2, scale=4.0)
    packed = batch.packed().detach().to(dtype).requires_grad_()
    same = batch.shape.unpack(packed.detach().double()).requires_grad_()
    expected = reference_loss(
        hat_log_probs(same, batch.blank), *batch.index_arguments, from_log_softmax=True,
        reduction="none",
    )  # fmt: skip
    actual = transducer_loss(packed, *batch.index_arguments, **HAT)
    torch.testing.assert_close(actual.double(), expected, rtol=2e-6, atol=1e-5)
    error = grad_of(actual, packed).double() - batch.shape.pack(grad_of(expected, same))
    assert error.abs().max() < max(2e-6, torch.finfo(dtype).eps)


def test_gradcheck_and_module_form():
    batch = ragged_batch([4, 3], [2, 1], 5, padding=0.0)
    criterion = TransducerLoss(blank=0, **HAT)
    assert torch.autograd.gradcheck(
        lambda x: criterion(x, *batch.index_arguments[:3]), (batch.logits,)
    )
    assert "normalization='hat'" in repr(criterion)


def test_fastemit_and_clamp():
    batch = ragged_batch([5, 4], [3, 1], 6)
    log_probs = hat_log_probs(batch.logits, 0)
    arguments = batch.index_arguments
    plain = transducer_loss(log_probs, *arguments, from_log_softmax=True, reduction="none")
    (uses,) = torch.autograd.grad(plain.sum(), log_probs, retain_graph=True)
    uses = uses.clone()
    uses[..., 1:] *= 1.5
    (expected,) = torch.autograd.grad(log_probs, batch.logits, zero_padding(batch, uses))
    expected = zero_padding(batch, expected)
    fast = transducer_loss(batch.logits, *arguments, fastemit_lambda=0.5, **HAT)
    torch.testing.assert_close(grad_of(fast, batch.logits), expected, atol=1e-12, rtol=0)
    clamped = transducer_loss(batch.logits, *arguments, fastemit_lambda=0.5, clamp=0.1, **HAT)
    torch.testing.assert_close(
        grad_of(clamped, batch.logits), expected.clamp(-0.1, 0.1), atol=1e-12, rtol=0
    )


def test_k2_names():
    batch = ragged_batch([5, 4, 2], [3, 1, 0], 7)
    logits = batch.logits.detach().nan_to_num(0.0).requires_grad_()
    symbols = batch.targets.clamp(max=6)
    frames, targets = batch.logit_lengths, batch.target_lengths
    zeros = torch.zeros_like(frames)
    boundary = torch.stack([zeros, zeros, targets, frames], 1)
    for rnnt_type in ("regular", "modified", "constrained"):
        expected = transducer_loss(logits, *batch.index_arguments, topology=rnnt_type, **HAT)
        options = boundary, rnnt_type, 0.0, "none"
        actual = rnnt_loss(logits, symbols, 0, *options, use_hat_loss=True)
        torch.testing.assert_close(actual, expected)
        ranges = torch.arange(4).expand(3, 5, 4)
        pruned = rnnt_loss_pruned(logits, symbols, ranges, 0, *options, True)  # k2's 9th argument
        torch.testing.assert_close(pruned, expected)
        torch.testing.assert_close(grad_of(pruned, logits), grad_of(expected, logits))


def test_values_that_are_not_finite():
    batch = ragged_batch([4, 5, 3], [2, 3, 1], 6)
    expected = transducer_loss(batch.logits, *batch.index_arguments, **HAT)
    for value, column in itertools.product((torch.nan, torch.inf), (0, 4)):
        logits = batch.logits.detach().clone()
        logits[1, 2, 3, column] = value  # the last column: only its blank is used
        logits.requires_grad_()
        loss = transducer_loss(logits, *batch.index_arguments, **HAT)
        assert loss.isnan().tolist() == [False, True, False]
        assert torch.equal(loss[[0, 2]], expected[[0, 2]])
        grad = grad_of(loss, logits)
        assert grad[1, :5, :4].isnan().all() and grad[[0, 2]].isfinite().all()
    masked = batch.logits.detach().clone()
    masked[..., 5] = -torch.inf
    masked[0, 1, 1, 0] = -torch.inf  # no blank there
    batch.targets = torch.where(batch.targets == 5, 4, batch.targets)
    masked.requires_grad_()
    expected = reference_loss(
        hat_log_probs(masked, 0), *batch.index_arguments, from_log_softmax=True, reduction="none"
    )
    actual = transducer_loss(masked, *batch.index_arguments, **HAT)
    torch.testing.assert_close(actual, expected)
    grad = grad_of(actual, masked)
    assert grad.isfinite().all() and (grad[..., 5] == 0).all()


class HatCase(Case):
    def logits(self):
        hidden = torch.tanh(self.enc[:, :, None] + self.pred[:, None])
        return functional.linear(hidden, self.weight, self.bias)


@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize("band", [0, 3])
def test_fused_equals_unfused(topology, band):
    case = HatCase(band=band)
    options = {"topology": topology, "normalization": "hat", "fastemit_lambda": 0.3}
    check_same(case, case.fused(**options), case.unfused(**options), 1e-12)
    if not band:
        expected = transducer_loss(
            case.logits(), case.targets, *case.lengths, case.blank, topology=topology, **HAT
        )
        torch.testing.assert_close(case.fused(topology=topology, normalization="hat"), expected)


@pytest.mark.parametrize("scale", [0.3, 1.0, 4.0])
@pytest.mark.parametrize("kind", [{}, TDT])
def test_coarse_pass_stays_within_the_budget(scale, kind, coarse_pass):
    case = DurationCase(
        kind, (60, 35, 1, 48), (20, 9, 0, 14), scale=scale, width=24, dtype=torch.float32
    )
    assert max(relative_errors(case, normalization="hat")) < 1e-5
    _, parts = fused_joiner_loss(
        *case.parameters, case.targets, *case.lengths, case.blank, return_parts=True,
        normalization="hat", **kind,
    )  # fmt: skip
    assert 0 < parts.full <= parts.selected <= 1


def test_with_durations():
    batch = batch_of(TDT, [6, 4], [3, 1])
    logits = torch.cat([hat_log_probs(batch.logits[..., :5], 4), batch.logits[..., 5:]], -1)
    # log_softmax of log-probabilities changes nothing.
    expected = reference_duration_loss(
        logits, *batch.index_arguments, **TDT, sigma=0.1, reduction="none"
    )
    actual = tdt_loss(batch.logits, *batch.index_arguments, TDT["durations"], sigma=0.1, **HAT)
    torch.testing.assert_close(actual, expected)
    wanted = zero_padding(batch, grad_of(expected, batch.logits))
    torch.testing.assert_close(grad_of(actual, batch.logits), wanted)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"normalization": "sigmoid"}, "normalization: expected one of"),
        ({"from_log_softmax": True}, "normalization: expected 'softmax' with from_log_softmax"),
        ({"topology": "multi_blank-2"}, "normalization: expected 'softmax' with big blanks"),
    ],
)
def test_bad_options(options, message):
    batch = ragged_batch([4], [2], 6)
    with pytest.raises(ValueError, match=message):
        transducer_loss(batch.logits, *batch.index_arguments, **{**HAT, **options})
    one, none = torch.tensor([4]), torch.tensor([0])
    with pytest.raises(ValueError, match="at least one label beside blank"):
        transducer_loss(torch.zeros(1, 4, 1, 1), torch.zeros(1, 0).long(), one, none, 0, **HAT)
