# SPDX-License-Identifier: Apache-2.0
"""mutual_information_recursion and its joint form, against all paths written out."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.losses.additive import boundary_row
from transducer_toolkit import (
    joint_mutual_information_recursion,
    mutual_information_recursion,
)
from transducer_toolkit.losses.reference import brute_force_score
from transducer_toolkit.ops import checks

pytestmark = pytest.mark.usefixtures("stages")


def random_scores(
    num_symbols, num_frames, batch=2, *, modified=False, dtype=torch.float64, scale=1.0
):
    px = scale * torch.randn(batch, num_symbols, num_frames + (not modified), dtype=dtype)
    py = scale * torch.randn(batch, num_symbols + 1, num_frames, dtype=dtype)
    return px.requires_grad_(), py.requires_grad_()


def expected_scores(px, py, rows):
    """Scores (B,) by enumeration of each utterance's own part."""
    is_regular = px.size(2) > py.size(2)
    return torch.stack(
        [
            brute_force_score(
                px[b, s_begin:s_end, t_begin : t_end + is_regular],
                py[b, s_begin : s_end + 1, t_begin:t_end],
            )
            for b, (s_begin, t_begin, s_end, t_end) in enumerate(rows)
        ]
    )


def grads_of(scores, *tensors, weights=None):
    total = (scores if weights is None else scores * weights).sum()
    return torch.autograd.grad(total, tensors, retain_graph=True, materialize_grads=True)


@settings(max_examples=200, deadline=None)
@given(
    parts=st.lists(
        st.tuples(st.integers(0, 4), st.integers(0, 3), st.integers(0, 2), st.integers(0, 2)),
        min_size=1,
        max_size=3,
    ),
    modified=st.booleans(),
    scale=st.sampled_from([0.1, 3.0, 100.0]),
    index_dtype=st.sampled_from([torch.int32, torch.int64]),
    seed=st.integers(0, 2**31),
)
def test_any_boundary_equals_all_paths(parts, modified, scale, index_dtype, seed):
    torch.manual_seed(seed)
    rows = [boundary_row(*part) for part in parts]
    num_symbols, num_frames = (max(row[i] for row in rows) for i in (2, 3))
    px, py = random_scores(num_symbols, num_frames, len(rows), modified=modified, scale=scale)
    is_outside_px, is_outside_py = torch.ones_like(px).bool(), torch.ones_like(py).bool()
    for b, (s_begin, t_begin, s_end, t_end) in enumerate(rows):
        is_outside_px[b, s_begin:s_end, t_begin : t_end + (not modified)] = False
        is_outside_py[b, s_begin : s_end + 1, t_begin:t_end] = False
    with torch.no_grad():
        px[is_outside_px], py[is_outside_py] = float("nan"), float("nan")
    expected = expected_scores(px, py, rows)
    actual, posteriors = mutual_information_recursion(
        px, py, torch.tensor(rows, dtype=index_dtype), return_grad=True
    )
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    is_feasible = expected > float("-inf")
    if expected[is_feasible].requires_grad:  # there are arcs
        reached = grads_of(expected[is_feasible], px, py)
        for grad, posterior in zip(reached, posteriors, strict=True):
            torch.testing.assert_close(posterior, grad, rtol=0, atol=1e-10)
    weights = torch.randn(len(rows), dtype=torch.float64)
    for grad, posterior in zip(grads_of(actual, px, py, weights=weights), posteriors, strict=True):
        torch.testing.assert_close(grad, posterior * weights[:, None, None], rtol=0, atol=1e-12)
    for outside, posterior in zip((is_outside_px, is_outside_py), posteriors, strict=True):
        assert posterior[outside].eq(0).all()


@pytest.mark.parametrize("modified", [False, True])
def test_no_boundary_means_everything(modified):
    px, py = random_scores(2, 4, modified=modified)
    expected = expected_scores(px, py, [(0, 0, 2, 4)] * 2)
    torch.testing.assert_close(mutual_information_recursion(px, py), expected)


def test_the_column_after_the_last_frame_is_used():
    px, py = random_scores(3, 2)
    open_end = mutual_information_recursion(px, py)
    closed = px.detach().clone()
    closed[:, :, -1] = float("-inf")
    closed_end = mutual_information_recursion(closed, py)
    assert (open_end > closed_end + 1e-3).all()
    torch.testing.assert_close(closed_end, expected_scores(closed, py, [(0, 0, 3, 2)] * 2))


@pytest.mark.parametrize("modified", [False, True])
@pytest.mark.parametrize(("num_symbols", "num_frames"), [(2, 3), (0, 3), (3, 3), (1, 1)])
def test_gradcheck(modified, num_symbols, num_frames):
    px, py = random_scores(num_symbols, num_frames, modified=modified)
    assert torch.autograd.gradcheck(mutual_information_recursion, (px, py), atol=1e-8)


def test_posteriors_sum_to_the_lengths():
    rows = [boundary_row(7, 3), boundary_row(4, 4, t_begin=3)]
    px, py = random_scores(4, 7)
    _, (px_grad, py_grad) = mutual_information_recursion(px, py, torch.tensor(rows), True)
    torch.testing.assert_close(px_grad.sum((1, 2)), torch.tensor([3.0, 4.0]).double())
    torch.testing.assert_close(py_grad.sum((1, 2)), torch.tensor([7.0, 4.0]).double())
    assert not px_grad.requires_grad and not py_grad.requires_grad


def test_more_symbols_than_frames():
    px, py = random_scores(5, 2)
    assert mutual_information_recursion(px, py).isfinite().all()
    px, py = random_scores(5, 2, modified=True)
    scores = mutual_information_recursion(px, py)
    assert scores.eq(float("-inf")).all()
    for grad in grads_of(scores, px, py):
        assert grad.eq(0).all()


@pytest.mark.parametrize(("num_symbols", "num_frames"), [(40, 1100), (1100, 40)])
def test_float32_within_1e_5_of_float64(num_symbols, num_frames):
    px, py = random_scores(num_symbols, num_frames, 1, dtype=torch.float32, scale=5.0)
    exact = [tensor.detach().double().requires_grad_() for tensor in (px, py)]
    scores, expected = mutual_information_recursion(px, py), mutual_information_recursion(*exact)
    assert scores.dtype == torch.float32
    assert scores.item() == pytest.approx(expected.item(), rel=1e-6)
    for grad, exact_grad in zip(grads_of(scores, px, py), grads_of(expected, *exact), strict=True):
        assert grad.dtype == torch.float32
        assert (grad.double() - exact_grad).abs().max() < 1e-5


def test_strided_inputs():
    px, py = random_scores(3, 4)
    expected = mutual_information_recursion(px, py)
    strided = [x.detach().transpose(0, 2).contiguous().transpose(0, 2) for x in (px, py)]
    assert torch.equal(mutual_information_recursion(*strided), expected)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_one_bad_utterance_leaves_the_others_alone(value):
    px, py = random_scores(3, 4, 3)
    clean = mutual_information_recursion(px, py)
    clean_grads = grads_of(clean, px, py)
    with torch.no_grad():
        px[1, 1, 2] = value
    scores = mutual_information_recursion(px, py)
    assert scores[1].isnan() and torch.equal(scores[[0, 2]], clean[[0, 2]])
    for grad, clean_grad in zip(grads_of(scores, px, py), clean_grads, strict=True):
        assert grad[1].isnan().any() and torch.equal(grad[[0, 2]], clean_grad[[0, 2]])
    masked = torch.where(scores.isfinite(), scores, 0.0)
    assert all(grad.isfinite().all() for grad in grads_of(masked, px, py))


def test_backward_twice_and_second_derivative():
    px, py = random_scores(2, 3)
    scores = mutual_information_recursion(px, py)
    for first, second in zip(grads_of(scores, px, py), grads_of(scores, px, py), strict=True):
        assert torch.equal(first, second)
    with pytest.raises(RuntimeError, match="gradient of the gradient"):
        (grad,) = torch.autograd.grad(scores.sum(), px, create_graph=True)
        grad.pow(2).sum().backward()


@pytest.mark.parametrize("open_end", [False, True])
@pytest.mark.parametrize("topology", ["regular", "modified"])
def test_opcheck(open_end, topology):
    px, py = random_scores(2, 3, modified=topology == "modified" or not open_end)
    arguments = (
        py.transpose(1, 2),
        px.transpose(1, 2),
        torch.tensor([[0, 0, 2, 3], [1, 1, 2, 3]]),
        *(topology, open_end),
        *(True, True),  # exact, with_posteriors
    )
    torch.library.opcheck(torch.ops.transducer_toolkit.lattice_losses, arguments)


@pytest.mark.parametrize("return_grad", [False, True])
def test_compiles_into_one_graph(return_grad):
    px, py = random_scores(2, 3)

    def scores_of(px, py, boundary):
        result = mutual_information_recursion(px * 2, py, boundary, return_grad)
        return result[0] + result[1][0].sum((1, 2)) if return_grad else result

    compiled = torch.compile(scores_of, fullgraph=True, backend="aot_eager")
    for boundary in (None, torch.tensor([[0, 0, 2, 3], [0, 1, 1, 3]])):
        expected, actual = scores_of(px, py, boundary), compiled(px, py, boundary)
        torch.testing.assert_close(actual, expected)
        for got, grad in zip(grads_of(actual, px, py), grads_of(expected, px, py), strict=True):
            torch.testing.assert_close(got, grad)


# --- joint form ---------------------------------------------------------------------------------


@pytest.mark.parametrize("modified", [False, True])
@pytest.mark.parametrize("num_terms", [1, 3])
def test_joint_terms_follow_their_formula(modified, num_terms):
    rows = [(0, 0, 2, 4), (1, 1, 2, 3)]
    pairs = [random_scores(2, 4, modified=modified) for _ in range(num_terms)]
    px, py = ([pair[i] for pair in pairs] for i in (0, 1))
    boundary = torch.tensor(rows)
    score, (px_grad, py_grad) = mutual_information_recursion(
        sum(px), sum(py), boundary, return_grad=True
    )
    terms = joint_mutual_information_recursion(px, py, boundary)
    assert terms.shape == (num_terms, 2)
    torch.testing.assert_close(terms.sum(0), score)
    for n in range(1, num_terms):
        expected = (px_grad * px[n]).sum((1, 2)) + (py_grad * py[n]).sum((1, 2))
        torch.testing.assert_close(terms[n], expected)
    # Posteriors are held fixed: each term is linear in its own scores.
    weights = torch.randn(num_terms, 2, dtype=torch.float64)
    grads = torch.autograd.grad((terms * weights).sum(), [*px, *py])
    for n in range(num_terms):
        weight = weights[n, :, None, None]
        torch.testing.assert_close(grads[n], weight * px_grad)
        torch.testing.assert_close(grads[num_terms + n], weight * py_grad)


def test_joint_with_impossible_arcs_and_no_path():
    px, py = random_scores(2, 3)
    with torch.no_grad():
        px[:, :, -1] = float("-inf")
        py[1, 2, 2] = float("-inf")  # the only exit of utterance 1
    zeros = torch.zeros_like(px), torch.zeros_like(py)
    terms = joint_mutual_information_recursion([px, zeros[0]], [py, zeros[1]])
    torch.testing.assert_close(terms[0], mutual_information_recursion(px, py))
    assert terms[0, 1] == float("-inf") and terms[1].eq(0).all()
    for grad in torch.autograd.grad(terms[:, 0].sum(), [px, py]):
        assert grad.isfinite().all() and grad[1].eq(0).all()


# --- bad input ----------------------------------------------------------------------------------

PX, PY = torch.zeros(2, 3, 5), torch.zeros(2, 4, 4)
BAD = [
    ((PX.tolist(), PY), {}, TypeError, "px: expected a torch.Tensor, got list"),
    ((PX.half(), PY), {}, TypeError, "px: expected dtype float32, float64, got torch.float16"),
    ((PX[0], PY), {}, ValueError, r"px: expected shape \(B, S, T \+ 1\) or .* got \(3, 5\)"),
    ((PX, PY[0]), {}, ValueError, r"py: expected shape \(B, S \+ 1, T\), got \(4, 4\)"),
    ((PX, PY.double()), {}, TypeError, "py: expected dtype torch.float32"),
    ((PX[:, :2], PY), {}, ValueError, r"px: .*\(2, 3, 5\) \(regular\) or \(2, 3, 4\) \(modified\)"),
    ((PX[:0], PY[:0]), {}, ValueError, r"py: expected shape .* B >= 1, got \(0, 4, 4\)"),
    ((PX.to("meta"), PY), {}, ValueError, "py: expected device meta"),
    ((PX, PY), {"boundary": [[0, 0, 3, 4]] * 2}, TypeError, "boundary: expected a torch.Tensor"),
    ((PX, PY), {"boundary": torch.zeros(2, 4)}, TypeError, "boundary: expected dtype int32, int64"),
    (
        (PX, PY),
        {"boundary": torch.zeros(2, 4, dtype=torch.int64, device="meta")},
        ValueError,
        "boundary: expected device cpu or cpu, got meta",
    ),
    (
        (PX, PY),
        {"boundary": torch.tensor([[0, 0, 3, 4]])},
        ValueError,
        r"boundary: expected shape \(2, 4\), .* got \(1, 4\)",
    ),
    (
        (PX, PY),
        {"boundary": torch.tensor([[0, 0, 3, 4], [0, 0, 4, 4]])},
        ValueError,
        r"utterance 1.* 0 <= s_begin <= s_end <= 3, got s_begin = 0, s_end = 4",
    ),
    (
        (PX, PY),
        {"boundary": torch.tensor([[-1, 0, 3, 4], [0, 0, 3, 4]])},
        ValueError,
        "utterance 0.* got s_begin = -1",
    ),
    (
        (PX, PY),
        {"boundary": torch.tensor([[0, 0, 3, 4], [0, 3, 3, 2]])},
        ValueError,
        "utterance 1.* 0 <= t_begin <= t_end <= 4, got t_begin = 3, t_end = 2",
    ),
]


@pytest.mark.parametrize(("arguments", "options", "error", "message"), BAD)
def test_bad_input_is_named(arguments, options, error, message):
    with pytest.raises(error, match=message):
        mutual_information_recursion(*arguments, **options)


def test_bad_input_of_the_joint_form_is_named():
    with pytest.raises(TypeError, match=r"px: expected a sequence of torch.Tensor, got Tensor"):
        joint_mutual_information_recursion(PX, [PY])
    with pytest.raises(ValueError, match="at least 1, got 0 and 0"):
        joint_mutual_information_recursion([], [])
    with pytest.raises(ValueError, match=r"the same number of tensors, .* got 1 and 2"):
        joint_mutual_information_recursion([PX], [PY, PY])
    with pytest.raises(ValueError, match=r"px\[1\]: expected shape \(2, 3, 5\), torch.float32"):
        joint_mutual_information_recursion([PX, PX[:, :, :4]], [PY, PY])
    with pytest.raises(TypeError, match=r"py\[1\]: expected dtype"):
        joint_mutual_information_recursion([PX, PX], [PY, PY.double()])


def test_invalid_boundaries_nobody_checked_give_nan(monkeypatch):
    # The values of a boundary on a device are not read: then the lengths must be harmless.
    monkeypatch.setattr(checks, "check_boundary_values", lambda *_, **__: None)
    px, py = random_scores(3, 4, 6)
    rows = [(0, 0, 3, 4), (-1, 0, 3, 4), (0, 0, 9, 4), (0, -5, 3, 4), (0, 0, 3, 99), (2, 3, 1, 1)]
    scores = mutual_information_recursion(px, py, torch.tensor(rows))
    assert scores[0].isfinite() and scores[1:].isnan().all()
