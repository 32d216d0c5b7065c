# SPDX-License-Identifier: Apache-2.0
"""rnnt_loss_simple and rnnt_loss_smoothed against the logits of all cells, written out."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.losses.additive import additive_batch, boundary_row
from transducer_toolkit import (
    get_rnnt_logprobs,
    get_rnnt_logprobs_smoothed,
    mutual_information_recursion,
    rnnt_loss_simple,
    rnnt_loss_smoothed,
    transducer_loss,
)
from transducer_toolkit.ops.topology import K2_TOPOLOGIES

pytestmark = pytest.mark.usefixtures("stages")

RAGGED = [boundary_row(5, 3), boundary_row(2, 1, t_begin=2, s_begin=1), boundary_row(3, 0)]
FULL = [boundary_row(4, 2)] * 2


def grads_of(loss, *tensors, weights=None):
    total = (loss if weights is None else loss * weights).sum()
    return torch.autograd.grad(total, tensors, retain_graph=True, materialize_grads=True)


def assert_equals_oracle(batch, rnnt_type, tolerance=1e-10, enumerate_paths=False, **options):
    """Value and gradient of the smoothed loss (of the simple one without scales)."""
    expected = batch.expected(rnnt_type, enumerate_paths=enumerate_paths, **options)
    options = {"lm_only_scale": 0.0, "am_only_scale": 0.0} | options
    actual = rnnt_loss_smoothed(
        *batch.arguments, boundary=batch.boundary, rnnt_type=rnnt_type, reduction="none", **options
    )
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)
    weights = torch.randn(len(expected), dtype=expected.dtype)
    expected_grads = grads_of(expected, *batch.inputs, weights=weights)
    for grad, expected_grad in zip(
        grads_of(actual, *batch.inputs, weights=weights), expected_grads, strict=True
    ):
        torch.testing.assert_close(grad, expected_grad, rtol=tolerance, atol=tolerance)
    return actual


@settings(max_examples=200, deadline=None)
@given(
    parts=st.lists(
        st.tuples(st.integers(1, 5), st.integers(0, 3), st.integers(0, 2), st.integers(0, 1)),
        min_size=1,
        max_size=3,
    ),
    rnnt_type=st.sampled_from(tuple(K2_TOPOLOGIES)),
    vocab_size=st.integers(1, 7),
    scales=st.sampled_from(
        [(0.0, 0.0), (0.25, 0.0), (0.0, 0.2), (0.1, 0.1), (1.0, 0.0), (0.4, 0.6)]
    ),
    delay_penalty=st.sampled_from([0.0, 0.3]),
    scale=st.sampled_from([0.1, 3.0, 200.0]),
    extra=st.integers(0, 2),
    enumerate_paths=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_any_batch_equals_oracle(
    parts, rnnt_type, vocab_size, scales, delay_penalty, scale, extra, enumerate_paths, seed
):
    torch.manual_seed(seed)
    if rnnt_type != "regular":
        parts = [(frames, min(frames, symbols), *begins) for frames, symbols, *begins in parts]
    batch = additive_batch(
        [boundary_row(*part) for part in parts],
        vocab_size,
        scale=scale,
        blank=seed % vocab_size,
        extra=extra,
    )
    assert_equals_oracle(
        batch,
        rnnt_type,
        delay_penalty=delay_penalty,
        lm_only_scale=scales[0],
        am_only_scale=scales[1],
        enumerate_paths=enumerate_paths,
    )


@pytest.mark.parametrize("rnnt_type", K2_TOPOLOGIES)
@pytest.mark.parametrize("scales", [(0.0, 0.0), (0.1, 0.2)])
def test_gradcheck(rnnt_type, scales):
    batch = additive_batch(RAGGED, padding=0.5)

    def losses_of(lm, am):
        return rnnt_loss_smoothed(
            *(lm, am, batch.symbols, batch.blank, *scales, batch.boundary, rnnt_type),
            delay_penalty=0.2,
            reduction="none",
        )

    assert torch.autograd.gradcheck(losses_of, batch.inputs, atol=1e-8)


def test_equals_transducer_loss():
    batch = additive_batch([boundary_row(5, 3), boundary_row(4, 1)], extra=0)
    with torch.no_grad():
        batch.symbols.clamp_(0, 5)
        batch.symbols[batch.symbols == 0] = 1
    logits = batch.am[:, :, None] + batch.lm[:, None]
    lengths = batch.boundary[:, 3], batch.boundary[:, 2]
    expected = transducer_loss(logits, batch.symbols, *lengths, blank=0)
    actual = rnnt_loss_simple(*batch.arguments, boundary=batch.boundary)
    torch.testing.assert_close(actual, expected)


def test_first_usage_example_of_the_family():
    # The shapes and calls of fast_rnnt's documentation, with arrays from elsewhere.
    random = np.random.default_rng(0)
    batch_size, frames, num_symbols, vocab_size = 3, 9, 4, 10
    am = random.standard_normal((batch_size, frames, vocab_size)).astype("f")
    lm = random.standard_normal((batch_size, num_symbols + 1, vocab_size)).astype("f")
    symbols = random.integers(0, vocab_size - 1, (batch_size, num_symbols)).astype(np.int64)
    boundary = np.zeros((batch_size, 4), dtype=np.int64)
    boundary[:, 2] = [4, 2, 3]
    boundary[:, 3] = [9, 7, 8]
    simple_loss, (px_grad, py_grad) = rnnt_loss_simple(
        lm=torch.from_numpy(lm),
        am=torch.from_numpy(am),
        symbols=torch.from_numpy(symbols),
        termination_symbol=vocab_size - 1,
        boundary=torch.from_numpy(boundary),
        rnnt_type="regular",
        return_grad=True,
        reduction="none",
        delay_penalty=0.2,
    )
    assert simple_loss.shape == (3,) and simple_loss.dtype == torch.float32
    assert px_grad.shape == (3, 4, 10) and py_grad.shape == (3, 5, 9)
    torch.testing.assert_close(px_grad.sum((1, 2)), torch.tensor([4.0, 2.0, 3.0]))
    torch.testing.assert_close(py_grad.sum((1, 2)), torch.tensor([9.0, 7.0, 8.0]))


# --- the scores ---------------------------------------------------------------------------------


@pytest.mark.parametrize("rnnt_type", K2_TOPOLOGIES)
@pytest.mark.parametrize("scales", [None, (0.3, 0.1)])
def test_logprobs_lead_to_the_loss(rnnt_type, scales):
    batch = additive_batch(RAGGED)
    options = {"boundary": batch.boundary, "rnnt_type": rnnt_type}
    if scales is None:
        px, py = get_rnnt_logprobs(*batch.arguments, **options)
        same = get_rnnt_logprobs(*batch.arguments, rnnt_type, batch.boundary)  # k2's order
        assert torch.equal(px.nan_to_num(), same[0].nan_to_num())
        loss, posteriors = rnnt_loss_simple(
            *batch.arguments, **options, reduction="sum", return_grad=True
        )
    else:
        px, py = get_rnnt_logprobs_smoothed(*batch.arguments, *scales, batch.boundary, rnnt_type)
        loss, posteriors = rnnt_loss_smoothed(
            *batch.arguments, *scales, **options, reduction="sum", return_grad=True
        )
    assert py.shape == (3, px.size(1) + 1, 6)
    assert px.size(2) == (7 if rnnt_type == "regular" else 6)
    scores, grads = mutual_information_recursion(px, py, batch.boundary, return_grad=True)
    torch.testing.assert_close(-scores.sum(), loss)
    for grad, posterior in zip(grads, posteriors, strict=True):
        torch.testing.assert_close(grad, posterior, rtol=0, atol=1e-12)
    for grad, expected in zip(
        grads_of(-scores, *batch.inputs), grads_of(loss, *batch.inputs), strict=True
    ):
        torch.testing.assert_close(grad, expected, rtol=0, atol=1e-12)


def test_probabilities_of_a_cell_sum_to_one():
    batch = additive_batch(FULL, 4, extra=0)
    total = 0
    for v in range(4):
        symbols = torch.full((2, 2), v)
        px, _ = get_rnnt_logprobs_smoothed(batch.lm, batch.am, symbols, 0, 0.0, 0.0)
        assert px[:, :, -1].eq(float("-inf")).all()
        total = total + px[:, :, :-1].exp()
    torch.testing.assert_close(total, torch.ones_like(total))


@pytest.mark.parametrize("rnnt_type", K2_TOPOLOGIES)
def test_posteriors_sum_to_the_lengths(rnnt_type):
    batch = additive_batch(RAGGED)
    _, (px_grad, py_grad) = rnnt_loss_simple(
        *batch.arguments, boundary=batch.boundary, rnnt_type=rnnt_type, return_grad=True
    )
    symbols, frames = (batch.boundary[:, 2:] - batch.boundary[:, :2]).double().unbind(1)
    torch.testing.assert_close(px_grad.sum((1, 2)), symbols)
    blanks = frames if rnnt_type == "regular" else frames - symbols
    torch.testing.assert_close(py_grad.sum((1, 2)), blanks)
    assert not px_grad.requires_grad and px_grad.is_contiguous()


# --- underflow, constants -------------------------------------------------------------------------


@pytest.mark.parametrize("gap", [80, 120, 200])
def test_saturated_loss_in_float32(gap):
    batch = additive_batch(RAGGED, 20, dtype=torch.float32, padding=1e30)
    with torch.no_grad():
        batch.am[..., 3] += gap
        batch.lm[..., 5] += gap
    exact = additive_batch(RAGGED, 20)
    with torch.no_grad():
        exact.lm.copy_(batch.lm), exact.am.copy_(batch.am)
    exact.symbols = batch.symbols
    for rnnt_type in K2_TOPOLOGIES:
        options = {"boundary": batch.boundary, "rnnt_type": rnnt_type, "reduction": "none"}
        actual = rnnt_loss_simple(*batch.arguments, **options)
        expected = exact.expected(rnnt_type)
        torch.testing.assert_close(actual.double(), expected, rtol=1e-6, atol=1e-6)
        for grad, expected_grad in zip(
            grads_of(actual, *batch.inputs), grads_of(expected, *exact.inputs), strict=True
        ):
            assert (grad - expected_grad).abs().max() < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scales", [(0.0, 0.0), (0.2, 0.3)])
def test_constants_do_not_matter(dtype, scales):
    batch = additive_batch(RAGGED, dtype=dtype)
    options = {"boundary": batch.boundary, "reduction": "none"}
    expected = rnnt_loss_smoothed(*batch.arguments, *scales, **options)
    lm = batch.lm + 64.0 * torch.randint(-4, 5, (*batch.lm.shape[:2], 1))
    am = batch.am + 64.0 * torch.randint(-4, 5, (*batch.am.shape[:2], 1))
    actual = rnnt_loss_smoothed(lm, am, *batch.arguments[2:], *scales, **options)
    tolerance = 2e-4 if dtype == torch.float32 else 1e-11
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


# --- smoothing ----------------------------------------------------------------------------------


def test_only_am_only_makes_an_utterance_depend_on_its_batch():
    batch = additive_batch(RAGGED)

    def losses(rows, *scales):
        inputs = batch.lm[rows], batch.am[rows], batch.symbols[rows], 0, *scales
        return rnnt_loss_smoothed(*inputs, batch.boundary[rows], reduction="none")

    everyone, alone = [0, 1, 2], [0]
    torch.testing.assert_close(losses(everyone, 0.3, 0.0)[:1], losses(alone, 0.3, 0.0))
    difference = losses(everyone, 0.0, 0.3)[:1] - losses(alone, 0.0, 0.3)
    assert difference.abs() > 1e-4


def test_masked_vocabulary_in_the_smoothed_loss():
    batch = additive_batch(FULL, 5)
    with torch.no_grad():
        batch.symbols.copy_(torch.where(batch.symbols < 5, 1 + batch.symbols % 3, batch.symbols))
        batch.lm[..., 4] = float("-inf")
    loss = rnnt_loss_smoothed(*batch.arguments, 0.2, 0.3, batch.boundary, reduction="none")
    expected = batch.expected("regular", lm_only_scale=0.2, am_only_scale=0.3)
    torch.testing.assert_close(loss, expected)
    lm_grad, am_grad = grads_of(loss, *batch.inputs)
    assert lm_grad.isfinite().all() and am_grad.isfinite().all()
    assert lm_grad[..., 4].eq(0).all() and am_grad[..., 4].eq(0).all()


# --- shapes, dtypes, padding --------------------------------------------------------------------


@pytest.mark.parametrize("rnnt_type", K2_TOPOLOGIES)
@pytest.mark.parametrize("padding", [float("nan"), float("inf"), 1e8])
def test_padding_reaches_nothing(rnnt_type, padding):
    reference = None
    for fill in (0.0, padding):
        torch.manual_seed(3)
        batch = additive_batch(RAGGED, padding=fill, extra=2)
        loss, posteriors = rnnt_loss_smoothed(
            *(*batch.arguments, 0.1, 0.2, batch.boundary, rnnt_type),
            reduction="none",
            return_grad=True,
        )
        grads = grads_of(loss, *batch.inputs)
        for b, (s_begin, t_begin, s_end, t_end) in enumerate(batch.boundary.tolist()):
            outside = torch.ones(grads[0].size(1), dtype=torch.bool)
            outside[s_begin : s_end + 1] = False
            assert grads[0][b, outside].eq(0).all()
            assert grads[1][b, :t_begin].eq(0).all() and grads[1][b, t_end:].eq(0).all()
        result = [loss, *posteriors, *grads]
        if reference is None:
            reference = result
        assert all(torch.equal(x, y) for x, y in zip(result, reference, strict=True))


@pytest.mark.parametrize("rnnt_type", K2_TOPOLOGIES)
def test_empty_references(rnnt_type):
    lm, am = torch.randn(2, 1, 5).double(), torch.randn(2, 3, 5).double()
    symbols = torch.zeros(2, 0, dtype=torch.int64)
    loss, (px_grad, py_grad) = rnnt_loss_smoothed(
        lm, am, symbols, 2, rnnt_type=rnnt_type, lm_only_scale=0.0, am_only_scale=0.0,
        reduction="none", return_grad=True,
    )  # fmt: skip
    expected = -(am + lm).log_softmax(-1)[:, :, 2].sum(1)
    torch.testing.assert_close(loss, expected)
    assert px_grad.shape == (2, 0, 4 if rnnt_type == "regular" else 3)
    torch.testing.assert_close(py_grad, torch.ones(2, 1, 3).double())
    one_frame = rnnt_loss_simple(lm, am[:, :1], symbols, 2, rnnt_type=rnnt_type, reduction="none")
    torch.testing.assert_close(one_frame, -(am[:, :1] + lm).log_softmax(-1)[:, 0, 2])


def test_reductions_and_index_dtypes():
    batch = additive_batch(FULL)
    none, mean, total = (
        rnnt_loss_simple(*batch.arguments, boundary=batch.boundary, reduction=reduction)
        for reduction in ("none", "mean", "sum")
    )
    torch.testing.assert_close(mean, none.mean())
    torch.testing.assert_close(total, none.sum())
    lm, am, symbols, blank = batch.arguments
    same = rnnt_loss_simple(lm, am, symbols.int(), blank, batch.boundary.int(), reduction="none")
    assert torch.equal(same, none)
    strided = [x.detach().transpose(0, 2).contiguous().transpose(0, 2) for x in (lm, am)]
    again = rnnt_loss_simple(*strided, symbols, blank, batch.boundary, reduction="none")
    assert torch.equal(again, none)


@pytest.mark.parametrize("scale", [1.0, 30.0])
@pytest.mark.parametrize(
    "rows", [[boundary_row(400, 80)], [boundary_row(1100, 3)], [boundary_row(3, 1100)]]
)
def test_float32_gradient_is_within_1e_5_of_float64(rows, scale):
    batch = additive_batch(rows, 50, dtype=torch.float32, scale=scale)
    loss = rnnt_loss_simple(*batch.arguments, boundary=batch.boundary)
    exact = [x.detach().double().requires_grad_() for x in batch.inputs]
    expected = rnnt_loss_simple(*exact, *batch.arguments[2:], batch.boundary)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    grads = grads_of(loss, *batch.inputs), grads_of(expected, *exact)
    for grad, expected_grad in zip(*grads, strict=True):
        # A row of lm or am collects up to a thousand cells: the error of each entry of its sum.
        bound = 1e-5 * expected_grad.abs().clamp(min=1)
        assert ((grad - expected_grad).abs() <= bound).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bits_are_computed_in_float32(dtype):
    batch = additive_batch(RAGGED, 30, dtype=torch.float32, scale=3.0)
    lm, am = (x.detach().to(dtype).requires_grad_() for x in batch.inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = rnnt_loss_smoothed(lm, am, *batch.arguments[2:], boundary=batch.boundary)
    exact = [x.detach().double().requires_grad_() for x in (lm, am)]
    expected = rnnt_loss_smoothed(*exact, *batch.arguments[2:], boundary=batch.boundary)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    grads = grads_of(loss, lm, am), grads_of(expected, *exact)
    for grad, expected_grad in zip(*grads, strict=True):
        assert grad.dtype == dtype
        bound = 0.51 * torch.finfo(dtype).eps * expected_grad.abs() + 1e-6
        assert ((grad - expected_grad).abs() <= bound).all()


# --- autograd -----------------------------------------------------------------------------------


@pytest.mark.parametrize("weight", [0.0, -2.0, 1e30])
def test_any_upstream_gradient(weight):
    batch = additive_batch(RAGGED, dtype=torch.float32)
    loss = rnnt_loss_smoothed(*batch.arguments, boundary=batch.boundary)
    expected = grads_of(loss, *batch.inputs)
    for grad, one in zip(grads_of(loss * weight, *batch.inputs), expected, strict=True):
        torch.testing.assert_close(grad, one * weight)


def test_gradient_only_where_wanted():
    batch = additive_batch(RAGGED)
    lm, am, symbols, blank = batch.arguments
    expected = rnnt_loss_simple(*batch.arguments, boundary=batch.boundary)
    lm_grad, am_grad = grads_of(expected, lm, am)
    only_lm = rnnt_loss_simple(lm, am.detach(), symbols, blank, batch.boundary)
    assert torch.equal(grads_of(only_lm, lm)[0], lm_grad)
    only_am = rnnt_loss_simple(lm.detach(), am, symbols, blank, batch.boundary)
    assert torch.equal(grads_of(only_am, am)[0], am_grad)
    with torch.no_grad():
        assert torch.equal(rnnt_loss_simple(*batch.arguments, boundary=batch.boundary), expected)


def test_second_derivative_is_refused():
    batch = additive_batch(FULL)
    loss = rnnt_loss_simple(*batch.arguments, boundary=batch.boundary)
    with pytest.raises(RuntimeError, match="gradient of the gradient"):
        (grad,) = torch.autograd.grad(loss, batch.am, create_graph=True)
        grad.pow(2).sum().backward()


def test_opcheck_of_the_symbols():
    symbols = torch.randint(0, 5, (2, 2))
    arguments = symbols, torch.tensor([[0, 0, 2, 4], [0, 0, 1, 3]]), 4, 5
    torch.library.opcheck(torch.ops.transducer_toolkit.checked_symbols, arguments)


@pytest.mark.parametrize("rnnt_type", K2_TOPOLOGIES)
def test_compiles_into_one_graph(rnnt_type):
    torch.compiler.reset()
    batch = additive_batch(RAGGED, padding=0.0)

    def loss_of(lm, am, symbols, boundary):
        loss, (px_grad, _) = rnnt_loss_smoothed(
            *(lm * 2, am, symbols, 0, 0.1, 0.2, boundary, rnnt_type), 0.1, return_grad=True
        )
        return loss + px_grad.sum()

    compiled = torch.compile(loss_of, fullgraph=True, backend="aot_eager")
    inputs = (*batch.inputs, batch.symbols, batch.boundary)
    expected, actual = loss_of(*inputs), compiled(*inputs)
    torch.testing.assert_close(actual, expected)
    grads = grads_of(actual, *batch.inputs), grads_of(expected, *batch.inputs)
    for grad, expected_grad in zip(*grads, strict=True):
        torch.testing.assert_close(grad, expected_grad)


@pytest.mark.not_emulated  # the graph is the same
@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("with_boundary", [False, True])
def test_one_graph_serves_batches_of_every_shape(dynamic, with_boundary):
    torch.compiler.reset()

    def loss_of(lm, am, symbols, boundary):
        return rnnt_loss_simple(lm * 2, am, symbols, 0, boundary)

    compiled = torch.compile(loss_of, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for step in range(12):  # the limit of recompilations is 8
        rows = [boundary_row(6 + step, 3 + step % 4), boundary_row(4, 1)]
        batch = additive_batch(rows, padding=0.0, extra=0)
        batch.symbols.clamp_(0, 5)
        inputs = (*batch.inputs, batch.symbols, batch.boundary if with_boundary else None)
        expected, actual = loss_of(*inputs), compiled(*inputs)
        torch.testing.assert_close(actual, expected)
        grads = (torch.autograd.grad(loss, batch.inputs) for loss in (actual, expected))
        for grad, expected_grad in zip(*grads, strict=True):
            torch.testing.assert_close(grad, expected_grad)


@pytest.mark.parametrize("loss", [rnnt_loss_simple, rnnt_loss_smoothed, get_rnnt_logprobs])
@pytest.mark.parametrize("narrow", ["am", "lm"])
def test_autocast_allows_two_dtypes(loss, narrow):
    """Under autocast, a linear layer gives bfloat16 and an embedding float32."""
    torch.manual_seed(0)
    given = {"lm": torch.randn(2, 4, 5), "am": torch.randn(2, 6, 5)}
    given[narrow] = given[narrow].bfloat16()
    rest = {"symbols": torch.randint(1, 5, (2, 3)), "termination_symbol": 0}
    expected = loss(**{name: value.float() for name, value in given.items()}, **rest)
    leaves = {name: value.requires_grad_() for name, value in given.items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = loss(**leaves, **rest)
    torch.testing.assert_close(found, expected)
    first = found if isinstance(found, torch.Tensor) else found[0]
    first.sum().backward()
    assert all(leaf.grad is not None and leaf.grad.dtype == leaf.dtype for leaf in leaves.values())
    with pytest.raises(TypeError, match=r"am: expected dtype .* that of lm"):
        loss(**leaves, **rest)
