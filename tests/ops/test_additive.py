# SPDX-License-Identifier: Apache-2.0
"""additive_scores against float64 logsumexp over all cells, where products underflow too."""

import pytest
import torch

from transducer_toolkit.ops.additive import additive_scores
from transducer_toolkit.ops.additive_stages import AdditiveInputs, AdditiveOptions

pytestmark = pytest.mark.usefixtures("stages")


def simple_normalizer(lm, am):
    """logsumexp_v(am[b, t, v] + lm[b, u, v]) of every cell, out of the scores of blanks."""
    symbols = torch.zeros(lm.size(0), lm.size(1) - 1, dtype=torch.int64)
    boundary = whole(lm.size(0), lm.size(1) - 1, am.size(1))
    blank, _ = additive_scores(
        AdditiveInputs(lm, am, symbols, boundary), AdditiveOptions(0, 1.0, 0.0, 0.0)
    )
    return am[:, :, :1].double() + lm[:, None, :, 0].double() - blank


def whole(num_utterances, num_symbols, num_frames):
    return torch.tensor([[0, 0, num_symbols, num_frames]] * num_utterances)


def grads_of(value, *tensors, weights=None):
    total = (value if weights is None else value * weights).sum()
    return torch.autograd.grad(total, tensors, retain_graph=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("gap", [0, 80, 87, 95, 103, 120, 200, 650, 720])
@pytest.mark.parametrize("vocab_size", [2, 37, 500])
def test_normalizer_survives_underflow_of_the_product(dtype, gap, vocab_size):
    # am and lm have their maxima at different symbols, `gap` above everything else.
    am = torch.randn(2, 5, vocab_size, dtype=dtype)
    lm = torch.randn(2, 4, vocab_size, dtype=dtype)
    am[:, 1:, 0] += gap
    lm[:, 1:, 1] += gap
    am.requires_grad_(), lm.requires_grad_()
    exact_am, exact_lm = (x.detach().double().requires_grad_() for x in (am, lm))
    expected = (exact_am[:, :, None] + exact_lm[:, None]).logsumexp(-1)
    actual = simple_normalizer(lm, am)
    eps = torch.finfo(dtype).eps
    # The result is float64: from float32 it is as exact at 700 as at 0, from float64 to rounding.
    rounding = gap * torch.finfo(torch.float64).eps
    assert (actual - expected).abs().max() < 40 * eps + rounding
    weights = torch.randn_like(expected)
    grads = grads_of(actual, lm, am, weights=weights)
    expected_grads = grads_of(expected, exact_lm, exact_am, weights=weights)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        assert (grad - expected_grad).abs().max() < 100 * eps + 10 * rounding


@pytest.mark.parametrize("gap", [60.0, 120.0])  # a product of 2e-26, and one that underflows
def test_huge_upstream_gradient_beside_a_tiny_product(gap):
    am, lm = torch.zeros(1, 1, 3), torch.zeros(1, 1, 3)
    am[..., 0], lm[..., 1] = gap, gap
    am.requires_grad_()
    (grad,) = grads_of(simple_normalizer(lm, am) * 1e30, am)
    torch.testing.assert_close(grad / 1e30, torch.tensor([[[0.5, 0.5, 0.0]]]))


def test_threads_do_not_change_a_bit():
    am, lm = 60 * torch.randn(3, 20, 700), 60 * torch.randn(3, 9, 700)
    am.requires_grad_(), lm.requires_grad_()
    weights = torch.randn(3, 20, 9)
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        normalizer = simple_normalizer(lm, am)
        results.append([normalizer, *grads_of(normalizer, lm, am, weights=weights)])
    for result in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(result, results[0], strict=True))


def test_second_derivative_is_refused():
    am = torch.zeros(1, 2, 3, requires_grad=True)
    with pytest.raises(RuntimeError, match="the gradient of the gradient"):
        total = simple_normalizer(torch.zeros(1, 2, 3), am).sum()
        (grad,) = torch.autograd.grad(total, am, create_graph=True)
        grad.pow(2).sum().backward()


SCALES = [(1.0, 0.0, 0.0), (0.5, 0.3, 0.2), (0.0, 0.7, 0.3), (0.0, 1.0, 0.0), (0.0, 0.0, 0.0)]


def formula(lm, am, symbols, blank, scales):
    """Blank and label scores in plain torch."""
    combined_scale, lm_only_scale, am_only_scale = scales
    columns = symbols.size(1) + 1
    logits = am[:, :, None] + lm[:, None]
    scores = combined_scale * logits[:, :, :columns].log_softmax(-1)
    scores = scores + lm_only_scale * lm[:, None, :columns].log_softmax(-1)
    if am_only_scale > 0:
        scores = scores + am_only_scale * logits[:, :, columns:].log_softmax(-1)
    of_labels = symbols[:, None, :, None].expand(-1, am.size(1), -1, 1)
    return scores[..., blank], scores[:, :, :-1].gather(3, of_labels).squeeze(3)


@pytest.mark.parametrize("scales", SCALES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("gap", [0.0, 300.0])
def test_scores_and_gradients_are_those_of_the_formula(gap, dtype, scales):
    num_columns = 4 + (scales[2] > 0)
    lm, am = torch.randn(2, num_columns, 7, dtype=dtype), torch.randn(2, 5, 7, dtype=dtype)
    lm[:, 1, 0] += gap
    am[:, 2, 1] += gap
    symbols = torch.tensor([[1, 6, 1], [0, 2, 3]])  # one twice, one the blank
    inputs = [x.requires_grad_() for x in (lm, am)]
    actual = additive_scores(
        AdditiveInputs(lm, am, symbols, whole(2, 3, 5)), AdditiveOptions(2, *scales)
    )
    exact = [x.detach().double().requires_grad_() for x in inputs]
    expected = formula(*exact, symbols, 2, scales)
    eps = torch.finfo(dtype).eps
    rounding = 2 * gap * torch.finfo(torch.float64).eps
    for score, expected_score in zip(actual, expected, strict=True):
        assert (score - expected_score).abs().max() < 100 * eps + rounding
    upstream = [torch.randn_like(score) for score in expected]
    options = {"allow_unused": True, "materialize_grads": True}
    grads = torch.autograd.grad(actual, inputs, upstream, **options)
    expected_grads = torch.autograd.grad(expected, exact, upstream, **options)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        assert (grad - expected_grad).abs().max() < 500 * eps + 10 * rounding


@pytest.mark.parametrize("am_only_scale", [0.0, 0.2])
@pytest.mark.parametrize("gap", [0.0, 300.0])
def test_opcheck(gap, am_only_scale):
    lm, am = torch.randn(2, 3 + (am_only_scale > 0), 5), torch.randn(2, 4, 5)
    lm[:, 1, 0] += gap
    am[:, 2, 1] += gap
    lm, am = (x.requires_grad_() for x in (lm, am))
    inputs = lm, am, torch.tensor([[1, 1], [0, 4]]), torch.tensor([[0, 0, 2, 4], [0, 1, 1, 3]])
    options = 0, 0.7, 0.1, am_only_scale
    ops = torch.ops.transducer_toolkit
    torch.library.opcheck(ops.additive_scores, (*inputs, *options))
    torch.library.opcheck(ops.additive_losses, (*inputs, *options, "modified", 0.0, True))
