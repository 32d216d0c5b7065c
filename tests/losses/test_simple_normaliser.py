# SPDX-License-Identifier: Apache-2.0
"""simple_normaliser against float64 logsumexp over all cells, where products underflow too."""

import pytest
import torch

from transducer_toolkit.losses.simple_normaliser import simple_normaliser

pytestmark = pytest.mark.usefixtures("stages")


def grads_of(value, *tensors, weights=None):
    total = (value if weights is None else value * weights).sum()
    return torch.autograd.grad(total, tensors, retain_graph=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("gap", [0, 80, 87, 95, 103, 120, 200, 650, 720])
@pytest.mark.parametrize("vocab_size", [2, 37, 500])
def test_normaliser_survives_underflow_of_the_product(dtype, gap, vocab_size):
    # am and lm have their maxima at different symbols, `gap` above everything else.
    am = torch.randn(2, 5, vocab_size, dtype=dtype)
    lm = torch.randn(2, 4, vocab_size, dtype=dtype)
    am[:, 1:, 0] += gap
    lm[:, 1:, 1] += gap
    am.requires_grad_(), lm.requires_grad_()
    exact_am, exact_lm = (x.detach().double().requires_grad_() for x in (am, lm))
    expected = (exact_am[:, :, None] + exact_lm[:, None]).logsumexp(-1)
    actual = simple_normaliser(lm, am)
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
    (grad,) = grads_of(simple_normaliser(lm, am) * 1e30, am)
    torch.testing.assert_close(grad / 1e30, torch.tensor([[[0.5, 0.5, 0.0]]]))


def test_threads_do_not_change_a_bit():
    am, lm = 60 * torch.randn(3, 20, 700), 60 * torch.randn(3, 9, 700)
    am.requires_grad_(), lm.requires_grad_()
    weights = torch.randn(3, 20, 9)
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        normaliser = simple_normaliser(lm, am)
        results.append([normaliser, *grads_of(normaliser, lm, am, weights=weights)])
    for result in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(result, results[0], strict=True))


def test_second_derivative_is_refused():
    am = torch.zeros(1, 2, 3, requires_grad=True)
    with pytest.raises(RuntimeError, match="simple_normaliser: the gradient of the gradient"):
        total = simple_normaliser(torch.zeros(1, 2, 3), am).sum()
        (grad,) = torch.autograd.grad(total, am, create_graph=True)
        grad.pow(2).sum().backward()


@pytest.mark.parametrize("gap", [0.0, 300.0])
def test_opcheck(gap):
    lm, am = torch.randn(2, 3, 5), torch.randn(2, 4, 5)
    lm[:, 1, 0] += gap
    am[:, 2, 1] += gap
    arguments = lm.requires_grad_(), am.requires_grad_()
    torch.library.opcheck(torch.ops.transducer_toolkit.simple_normaliser, arguments)
