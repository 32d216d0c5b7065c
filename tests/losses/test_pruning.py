# SPDX-License-Identifier: Apache-2.0
"""get_rnnt_prune_ranges: what every result must satisfy, and both methods by brute force."""

import itertools
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.losses.additive import additive_batch, boundary_row
from transducer_toolkit import do_rnnt_pruning, get_rnnt_prune_ranges, rnnt_loss_simple
from transducer_toolkit.ops.topology import K2_TOPOLOGIES

pytestmark = pytest.mark.usefixtures("stages")
EQUAL_MASS = 2.0**-20  # as in csrc/prune_windows.h


def posteriors_of(batch, rnnt_type):
    _, grads = rnnt_loss_simple(
        *batch.arguments, boundary=batch.boundary, rnnt_type=rnnt_type, return_grad=True
    )
    return grads


def window_mass(px_grad, py_grad, t, start, width):
    entering = px_grad[start - 1, t] if start > 0 else 0.0
    return float(py_grad[start : start + width, t].sum() - entering)


def end_points(row, width, step):
    """Starts of the first and last real frame, and of padding."""
    s_begin, t_begin, s_end, t_end = row
    padding = max(0, s_end - width + 1)
    first = min(s_begin, padding)
    return first, min(padding, first + step * (t_end - t_begin - 1)), padding


def feasible_sequences(row, width, step):
    """All sequences of starts of the real frames."""
    first, last, _ = end_points(row, width, step)
    frames = row[3] - row[1]
    for steps in itertools.product(range(step + 1), repeat=frames - 1):
        starts = list(itertools.accumulate(steps, initial=first))
        if starts[-1] == last:
            yield starts


def repaired(best, row, width, step):
    """The repair rules, one frame at a time: down to what follows, then up to what it needs."""
    first, last, _ = end_points(row, width, step)
    starts = [max(first, s) for s in [*best[:-1], last]]
    for t in range(len(starts) - 2, -1, -1):
        starts[t] = min(starts[t], starts[t + 1])
    for t in range(len(starts) - 2, -1, -1):
        starts[t] = max(starts[t], starts[t + 1] - step)
    return [min(s, first + step * t) for t, s in enumerate(starts)]


@settings(max_examples=150, deadline=None)
@given(
    parts=st.lists(
        st.tuples(st.integers(1, 5), st.integers(0, 4), st.integers(0, 1), st.integers(0, 1)),
        min_size=1,
        max_size=3,
    ),
    rnnt_type=st.sampled_from(tuple(K2_TOPOLOGIES)),
    s_range=st.integers(1, 6),
    scale=st.sampled_from([0.1, 2.0, 20.0]),
    extra=st.integers(0, 2),
    index_dtype=st.sampled_from([torch.int32, torch.int64]),
    seed=st.integers(0, 2**31),
)
def test_ranges_obey_the_rules(parts, rnnt_type, s_range, scale, extra, index_dtype, seed):
    torch.manual_seed(seed)
    if rnnt_type != "regular":
        parts = [(frames, min(frames, symbols), *begins) for frames, symbols, *begins in parts]
    rows = [boundary_row(*part) for part in parts]
    batch = additive_batch(rows, scale=scale, extra=extra)
    px_grad, py_grad = posteriors_of(batch, rnnt_type)

    def ranges_of(method):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return get_rnnt_prune_ranges(
                *(px_grad, py_grad, batch.boundary.to(index_dtype), s_range),
                rnnt_type=rnnt_type,
                method=method,
            )

    needed = 1
    for frames, symbols, *_ in parts:
        if rnnt_type == "regular":
            needed = max(needed, (symbols - 1) // frames + 2)
        if rnnt_type == "constrained" and symbols:
            needed = max(needed, 2)
    width = min(max(s_range, needed), py_grad.size(1))
    step = width - 1 if rnnt_type == "regular" else 1
    results = {method: ranges_of(method) for method in ("greedy", "optimal")}
    for ranges in results.values():
        assert ranges.shape == (len(rows), py_grad.size(2), width)
        assert ranges.dtype == torch.int64
        assert ranges.min() >= 0 and ranges.max() < py_grad.size(1)
        assert (ranges - ranges[:, :, :1]).eq(torch.arange(width)).all()
        for row, starts in zip(rows, ranges[:, :, 0].tolist(), strict=True):
            first, last, padding = end_points(row, width, step)
            real = starts[row[1] : row[3]]
            assert real[0] == first and real[-1] == last
            assert all(0 <= b - a <= step for a, b in itertools.pairwise(real))
            assert set(starts[: row[1]] + starts[row[3] :]) <= {padding}
    for b, row in enumerate(rows):
        _, t_begin, _, t_end = row
        num_starts = py_grad.size(1) - width + 1
        masses = [
            [window_mass(px_grad[b], py_grad[b], t, s, width) for s in range(num_starts)]
            for t in range(t_begin, t_end)
        ]
        total = {
            method: sum(masses[i][s] for i, s in enumerate(ranges[b, t_begin:t_end, 0].tolist()))
            for method, ranges in results.items()
        }
        best = max(
            sum(masses[i][s] for i, s in enumerate(starts))
            for starts in feasible_sequences(row, width, step)
        )
        assert total["optimal"] == pytest.approx(best, abs=1e-9)
        assert total["greedy"] <= best + 1e-9
        # Of masses nearly equal the lowest start wins: compare where each frame's best stands out.
        stands_out = all(
            len(mass) == 1 or max(mass) - sorted(mass)[-2] > EQUAL_MASS for mass in masses[:-1]
        )
        if stands_out:
            argmax = [max(range(num_starts), key=mass.__getitem__) for mass in masses]
            expected = repaired(argmax, row, width, step)
            assert results["greedy"][b, t_begin:t_end, 0].tolist() == expected


@pytest.mark.parametrize(
    "rnnt_type, width", [("modified", 1), ("modified", 4), ("regular", 2), ("regular", 4)]
)
def test_any_masses_are_repaired(rnnt_type, width):
    """The best windows of posteriors hardly ever go back; those of random numbers do."""
    step = width - 1 if rnnt_type == "regular" else 1
    row = (1, 2, 12, 38)
    px_grad = torch.rand(1, 14, 40 + (rnnt_type == "regular"))
    py_grad = torch.rand(1, 15, 40)
    ranges = get_rnnt_prune_ranges(px_grad, py_grad, torch.tensor([row]), width)
    best = [
        max(range(16 - width), key=lambda s: window_mass(px_grad[0], py_grad[0], t, s, width))
        for t in range(row[1], row[3])
    ]
    assert any(b < a for a, b in itertools.pairwise(best))
    expected = repaired(best, row, width, step)
    assert ranges[0, row[1] : row[3], 0].tolist() == expected


def test_optimal_can_be_strictly_better():
    # The best window of frame 1 is far up, and the repair drags its neighbours along.
    torch.manual_seed(0)
    gains = []
    for _ in range(50):
        batch = additive_batch([boundary_row(6, 4)], scale=4.0, extra=0)
        px_grad, py_grad = posteriors_of(batch, "regular")
        totals = []
        for method in ("greedy", "optimal"):
            starts = get_rnnt_prune_ranges(px_grad, py_grad, None, 2, method=method)[0, :, 0]
            masses = [
                window_mass(px_grad[0], py_grad[0], t, s, 2) for t, s in enumerate(starts.tolist())
            ]
            totals.append(sum(masses))
        gains.append(totals[1] - totals[0])
    assert min(gains) >= -1e-9 and max(gains) > 0.05


def test_ties_take_the_lowest_start():
    px_grad, py_grad = torch.zeros(1, 4, 6), torch.zeros(1, 5, 5)
    assert get_rnnt_prune_ranges(px_grad, py_grad, None, 3)[0, :, 0].tolist() == [0, 0, 0, 0, 2]
    optimal = get_rnnt_prune_ranges(px_grad, py_grad, None, 3, method="optimal")
    assert optimal[0, :, 0].tolist() == [0, 0, 0, 0, 2]


@pytest.mark.parametrize("rnnt_type", K2_TOPOLOGIES)
@pytest.mark.parametrize("method", ["greedy", "optimal"])
def test_starts_climb_from_the_first_frame_as_fast_as_they_may(rnnt_type, method):
    # All mass is at the top from the first real frame (t = 2) on.
    px_grad, py_grad = torch.zeros(1, 8, 9), torch.zeros(1, 9, 8)
    py_grad[0, 7, 2:7] = 1.0
    if rnnt_type != "regular":
        px_grad = px_grad[:, :, :8]
    ranges = get_rnnt_prune_ranges(
        *(px_grad, py_grad, torch.tensor([[1, 2, 7, 7]]), 3), rnnt_type=rnnt_type, method=method
    )
    step = 2 if rnnt_type == "regular" else 1
    expected = [5, 5, *(min(1 + step * t, 5) for t in range(5)), 5]
    assert ranges[0, :, 0].tolist() == expected


def test_a_sharp_alignment_stays_inside():
    px_grad, py_grad = torch.zeros(1, 6, 9), torch.zeros(1, 7, 8)
    columns = [0, 1, 1, 2, 4, 4, 5, 6]  # symbols behind at the end of each frame
    for t, u in enumerate(columns):
        py_grad[0, u, t] = 1.0
        before = columns[t - 1] if t else 0
        px_grad[0, before:u, t] = 1.0
    for method in ("greedy", "optimal"):
        ranges = get_rnnt_prune_ranges(px_grad, py_grad, None, 4, method=method)
        assert all(u in ranges[0, t] for t, u in enumerate(columns))


@pytest.mark.parametrize("method", ["greedy", "optimal"])
def test_long_batches_and_dtypes(method):
    batch = additive_batch([boundary_row(1100, 60), boundary_row(70, 60)], dtype=torch.float32)
    grads = posteriors_of(batch, "regular")
    ranges = get_rnnt_prune_ranges(*grads, batch.boundary, 5, method=method)
    same = get_rnnt_prune_ranges(*(g.double() for g in grads), batch.boundary, 5, method=method)
    assert ranges.shape == (2, 1101, 5) and torch.equal(ranges, same)
    half = get_rnnt_prune_ranges(*(g.half() for g in grads), batch.boundary, 5, method=method)
    assert half.shape == ranges.shape
    mixed = get_rnnt_prune_ranges(grads[0].double(), grads[1], batch.boundary, 5, method=method)
    assert torch.equal(mixed, ranges)


def test_range_is_raised_with_one_warning():
    batch = additive_batch([boundary_row(5, 3), boundary_row(2, 5)])
    grads = posteriors_of(batch, "regular")
    with pytest.warns(UserWarning, match=r"utterance 1 \(5 symbols, 2 frames\).* 4 .*got 2") as log:
        ranges = get_rnnt_prune_ranges(*grads, batch.boundary, 2)
    assert ranges.size(2) == 4 and len(log) == 1
    assert log[0].filename == __file__
    batch = additive_batch([boundary_row(5, 0), boundary_row(5, 3)])
    grads = posteriors_of(batch, "modified")
    with pytest.warns(UserWarning, match=r"utterance 1 .* at least 2 .*'constrained', got 1"):
        ranges = get_rnnt_prune_ranges(*grads, batch.boundary, 1, rnnt_type="constrained")
    assert ranges.size(2) == 2


def test_no_warning_where_nothing_is_raised():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        batch = additive_batch([boundary_row(5, 3)], extra=0)
        grads = posteriors_of(batch, "modified")
        assert get_rnnt_prune_ranges(*grads, batch.boundary, 1).size(2) == 1
        assert get_rnnt_prune_ranges(*grads, batch.boundary, 50).size(2) == 4
        for rnnt_type in K2_TOPOLOGIES:  # no symbols anywhere
            batch = additive_batch([boundary_row(5, 0)] * 2, extra=0)
            grads = posteriors_of(batch, rnnt_type)
            ranges = get_rnnt_prune_ranges(*grads, None, 1, rnnt_type=rnnt_type)
            assert ranges.tolist() == [[[0]] * 5] * 2


# --- do_rnnt_pruning ----------------------------------------------------------------------------


def test_pruning_gathers_and_differentiates():
    batch = additive_batch([boundary_row(4, 3), boundary_row(2, 1, t_begin=1)], padding=0.0)
    ranges = get_rnnt_prune_ranges(*posteriors_of(batch, "regular"), batch.boundary, 2)
    am_pruned, lm_pruned = do_rnnt_pruning(batch.am, batch.lm, ranges)
    assert am_pruned.shape == lm_pruned.shape == (*ranges.shape, 6)
    for b, t, r in itertools.product(*map(range, ranges.shape)):
        assert torch.equal(am_pruned[b, t, r], batch.am[b, t])
        assert torch.equal(lm_pruned[b, t, r], batch.lm[b, ranges[b, t, r]])
    same = do_rnnt_pruning(batch.am, batch.lm, ranges.int())
    assert torch.equal(same[1], lm_pruned)
    assert torch.autograd.gradcheck(
        lambda am, lm: do_rnnt_pruning(am, lm, ranges, boundary=batch.boundary), batch.inputs
    )


def test_padding_is_zero_in_value_and_gradient():
    batch = additive_batch([boundary_row(4, 3), boundary_row(2, 1, t_begin=1)])
    ranges = get_rnnt_prune_ranges(*posteriors_of(batch, "regular"), batch.boundary, 3)
    pruned = do_rnnt_pruning(batch.am, batch.lm, ranges, boundary=batch.boundary)
    for rows in pruned:
        assert rows.isfinite().all()
        assert rows[0, 4:].eq(0).all() and rows[1, 0].eq(0).all() and rows[1, 3:].eq(0).all()
        assert rows[0, :4].ne(0).all()
    total = sum((rows * torch.randn_like(rows)).sum() for rows in pruned)
    lm_grad, am_grad = torch.autograd.grad(total, batch.inputs)
    assert lm_grad.isfinite().all() and am_grad.isfinite().all()
    assert lm_grad[1, 2:].eq(0).all() and am_grad[1, 3:].eq(0).all() and am_grad[1, 0].eq(0).all()


def test_widths_of_am_and_lm_may_differ():
    ranges = torch.tensor([[[0, 1], [1, 2]]])
    am_pruned, lm_pruned = do_rnnt_pruning(torch.zeros(1, 2, 4), torch.zeros(1, 3, 7), ranges)
    assert am_pruned.shape == (1, 2, 2, 4) and lm_pruned.shape == (1, 2, 2, 7)


def test_pruning_compiles_into_one_graph():
    batch = additive_batch([boundary_row(4, 3)], padding=0.0)
    ranges = get_rnnt_prune_ranges(*posteriors_of(batch, "regular"), batch.boundary, 2)
    compiled = torch.compile(do_rnnt_pruning, fullgraph=True, backend="aot_eager")
    expected = do_rnnt_pruning(batch.am, batch.lm, ranges, boundary=batch.boundary)
    actual = compiled(batch.am, batch.lm, ranges, boundary=batch.boundary)
    assert all(torch.equal(x, y) for x, y in zip(actual, expected, strict=True))


# --- bad input ----------------------------------------------------------------------------------

PX, PY = torch.zeros(2, 3, 5), torch.zeros(2, 4, 4)
BAD_RANGES = [
    ((PX.tolist(), PY, None, 2), {}, TypeError, r"px_grad: expected a torch\.Tensor, got list"),
    ((PX.int(), PY, None, 2), {}, TypeError, "px_grad: expected a floating dtype"),
    ((PX, PY[0], None, 2), {}, ValueError, r"py_grad: expected shape .* got \(4, 4\)"),
    (
        (PX[:, :2], PY, None, 2),
        {},
        ValueError,
        r"px_grad: .*\(2, 3, 5\) or \(2, 3, 4\).*\(2, 2, 5\)",
    ),
    ((PX[:0], PY[:0], None, 2), {}, ValueError, "B >= 1"),
    ((PX, PY.to("meta"), None, 2), {}, ValueError, "py_grad: expected device cpu"),
    ((PX, PY, None, 0), {}, ValueError, "s_range: expected at least 1, got 0"),
    ((PX, PY, None, 2.0), {}, TypeError, "s_range: expected an int, got float"),
    ((PX, PY, None, 2), {"method": "best"}, ValueError, "method: expected one of .* got 'best'"),
    ((PX, PY, None, 2), {"rnnt_type": "best"}, ValueError, "rnnt_type: expected one of"),
    (
        (PX, PY, None, 2),
        {"rnnt_type": "modified"},
        ValueError,
        r"px_grad: expected shape \(2, 3, 4\) for rnnt_type 'modified' .* got \(2, 3, 5\)",
    ),
    ((PX, PY, torch.zeros(2, 3).long(), 2), {}, ValueError, r"boundary: expected shape \(2, 4\)"),
    (
        (PX, PY, torch.tensor([[0, 0, 3, 4], [0, 0, 3, 0]]), 2),
        {},
        ValueError,
        "utterance 1.* t_begin < t_end <= 4, got t_begin = 0, t_end = 0",
    ),
]


@pytest.mark.parametrize(("arguments", "options", "error", "message"), BAD_RANGES)
def test_bad_input_of_ranges_is_named(arguments, options, error, message):
    with pytest.raises(error, match=message):
        get_rnnt_prune_ranges(*arguments, **options)


AM, LM, RANGES = torch.zeros(2, 4, 6), torch.zeros(2, 3, 6), torch.zeros(2, 4, 2).long()
BAD_PRUNING = [
    ((None, LM, RANGES), TypeError, r"am: expected a torch\.Tensor, got NoneType"),
    ((AM[0], LM, RANGES), ValueError, r"am: expected shape \(B, T, D\), got \(4, 6\)"),
    ((AM, LM[0], RANGES), ValueError, r"lm: expected shape \(B, S \+ 1, D\), got \(3, 6\)"),
    ((AM, LM[:1], RANGES), ValueError, r"lm: expected B = 2, .* got \(1, 3, 6\)"),
    ((AM, LM.to("meta"), RANGES), ValueError, "lm: expected device cpu"),
    ((AM, LM, RANGES.float()), TypeError, "ranges: expected dtype int32, int64"),
    (
        (AM, LM, RANGES[:, :3]),
        ValueError,
        r"ranges: expected shape \(2, 4, R\), .* got \(2, 3, 2\)",
    ),
    ((AM, LM, RANGES - 1), ValueError, r"ranges\[0, 0, 0\] \(utterance 0\): .*\[0, 2\], got -1"),
    ((AM, LM, RANGES + 3), ValueError, r"ranges\[0, 0, 0\] \(utterance 0\): .* got 3"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), BAD_PRUNING)
def test_bad_input_of_pruning_is_named(arguments, error, message):
    with pytest.raises(error, match=message):
        do_rnnt_pruning(*arguments)
    with pytest.raises(ValueError, match=r"boundary: expected shape \(2, 4\)"):
        do_rnnt_pruning(AM, LM, RANGES, boundary=torch.zeros(1, 4).long())


@pytest.mark.parametrize("method", ["greedy", "optimal"])
def test_posteriors_of_nan_give_windows_all_the_same(method):
    nan = float("nan")
    posteriors = torch.full((1, 6, 10), nan), torch.full((1, 7, 9), nan)
    boundary = torch.tensor([[3, 2, 6, 9]])
    ranges = get_rnnt_prune_ranges(*posteriors, boundary, 3, method=method)
    assert ranges.shape == (1, 9, 3) and ranges.min() >= 0 and ranges.max() <= 6
