# SPDX-License-Identifier: Apache-2.0
"""tdt_loss and multi_blank_loss: constants, oracle, options, autograd, bad input."""

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tests.losses.helpers import ragged_batch, zero_padding
from transducer_toolkit import (
    LatticeShape,
    MultiBlankLoss,
    TDTLoss,
    multi_blank_loss,
    tdt_loss,
    transducer_loss,
)
from transducer_toolkit.losses.reference import reference_duration_loss
from transducer_toolkit.ops.logits_loss import LogitsInputs, LogitsPlan, operator
from transducer_toolkit.ops.options import LossOptions
from transducer_toolkit.ops.topology import multi_blank_topology, tdt_topology

pytestmark = pytest.mark.usefixtures("stages")

TDT = {"durations": (0, 1, 2, 4)}
NO_ZERO = {"durations": (1, 2, 3)}
MULTI_BLANK = {"big_blank_durations": (4, 2)}
KINDS = [TDT, NO_ZERO, MULTI_BLANK]


def topology_of(kind):
    if "durations" in kind:
        return tdt_topology(kind["durations"])
    return multi_blank_topology(kind["big_blank_durations"])


def loss_of(logits, batch, kind, **options):
    loss = tdt_loss if "durations" in kind else multi_blank_loss
    return loss(logits, *batch.index_arguments, **kind, **{"reduction": "none", **options})


def batch_of(kind, frames, symbols, num_labels=4, **options):
    """Labels below the blanks; NaN in the padding of the logits."""
    num_big = len(kind.get("big_blank_durations", ()))
    columns = num_labels + 1 + num_big + len(kind.get("durations", ()))
    batch = ragged_batch(frames, symbols, columns, **options)
    batch.blank = num_labels + num_big
    beyond = torch.arange(max(symbols)) >= batch.target_lengths[:, None]
    batch.targets = torch.randint(0, num_labels, batch.targets.shape).masked_fill(beyond, 10**8)
    return batch


def grad_of(loss, tensor, weights=None):
    value = (loss * weights).sum() if weights is not None else loss.sum()
    return torch.autograd.grad(value, tensor, retain_graph=True)[0]


def test_constants():
    zeros = torch.zeros(1, 3, 2, 7, dtype=torch.float64)
    one = torch.tensor([1])
    options = {"blank": 3, "durations": (0, 1, 2), "sigma": 0.05}
    loss = tdt_loss(zeros, torch.tensor([[0]]), 3 * one, one, **options)
    assert loss.item() == pytest.approx(4.155738825069801, abs=1e-12)

    def random(columns):
        return torch.from_numpy(np.random.RandomState(0).randn(2, 8, 4, columns))

    tensors = torch.tensor([[1, 3, 2], [5, 0, -1]]), torch.tensor([8, 6]), torch.tensor([3, 2])
    for loss_of_logits, columns, options, expected in (
        (tdt_loss, 15, {"blank": 8, "durations": range(6), "sigma": 0.05},
         [12.486951320791757, 14.36979749994918]),
        (tdt_loss, 14, {"blank": 8, "durations": range(1, 6), "sigma": 0.05},
         [13.16000073790627, 9.21191474692993]),
        (multi_blank_loss, 12, {"blank": 11, "big_blank_durations": (2, 4, 8)},
         [12.010046080307324, 9.165131869578335]),
        (multi_blank_loss, 12, {"blank": 11, "big_blank_durations": (2, 4, 8), "sigma": 0.1},
         [12.488589207822372, 9.620294713580178]),
    ):  # fmt: skip
        options = {name: tuple(x) if isinstance(x, range) else x for name, x in options.items()}
        losses = loss_of_logits(random(columns), *tensors, **options, reduction="none")
        assert losses.tolist() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("enumerate_paths", [False, True])
@pytest.mark.parametrize("sizes", [([1], [0]), ([3, 1], [0, 0]), ([6, 4, 7], [3, 0, 2])])
def test_float64_equals_oracle(kind, enumerate_paths, sizes):
    batch = batch_of(kind, *sizes)
    options = {**kind, "sigma": 0.1, "delay_penalty": 0.3}
    expected = reference_duration_loss(
        batch.logits, *batch.index_arguments, **options, reduction="none",
        enumerate_paths=enumerate_paths,
    )  # fmt: skip
    weights = torch.randn(len(batch.targets), dtype=torch.float64)
    actual = loss_of(batch.logits, batch, kind, sigma=0.1, delay_penalty=0.3)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10)
    grad = zero_padding(batch, grad_of(expected, batch.logits, weights))
    torch.testing.assert_close(grad_of(actual, batch.logits, weights), grad, rtol=0, atol=1e-10)


durations_of_tdt = st.lists(st.integers(0, 5), min_size=1, max_size=5, unique=True).map(
    lambda values: {"durations": tuple(sorted(values))}
)
durations_of_blanks = st.lists(st.integers(2, 9), min_size=1, max_size=3, unique=True).map(
    lambda values: {"big_blank_durations": tuple(values)}
)


@settings(max_examples=250, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 9), st.integers(0, 4)), min_size=1, max_size=3),
    kind=st.one_of(durations_of_tdt, durations_of_blanks),
    sigma=st.sampled_from([0.0, 0.05, 2.0]),
    scale=st.sampled_from([0.1, 3.0, 40.0]),
    num_labels=st.integers(1, 6),
    seed=st.integers(0, 2**31),
)
def test_any_batch_equals_oracle(lengths, kind, sigma, scale, num_labels, seed):
    assume(max(kind.get("durations", (1,))) > 0)
    torch.manual_seed(seed)
    frames, symbols = ([pair[i] for pair in lengths] for i in (0, 1))
    batch = batch_of(kind, frames, symbols, num_labels, scale=scale)
    expected = reference_duration_loss(
        batch.logits, *batch.index_arguments, **kind, sigma=sigma, reduction="none"
    )
    arcs = topology_of(kind)
    for loss, (t, u) in zip(expected, lengths, strict=True):
        assert arcs.is_feasible(t, u) == bool(loss < torch.inf)
    packed = batch.packed()
    actual = loss_of(packed, batch, kind, sigma=sigma, validate=False)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-10)
    if any(arcs.is_feasible(*pair) for pair in lengths):
        finite = expected.isfinite()
        grad = batch.shape.pack(grad_of(expected[finite], batch.logits))
        torch.testing.assert_close(grad_of(actual, packed), grad, rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("packed", [False, True])
def test_gradcheck(kind, packed):
    batch = batch_of(kind, [6, 4], [2, 1], padding=0.0)
    logits = batch.packed() if packed else batch.logits
    options = {"sigma": 0.05, "delay_penalty": 0.2}
    assert torch.autograd.gradcheck(lambda x: loss_of(x, batch, kind, **options), (logits,))


def test_durations_of_one_frame_are_the_other_topologies():
    # One blank duration of 1 and one label duration: the duration costs nothing.
    batch = batch_of({"durations": (1,)}, [7, 5], [3, 2])
    log_probs = batch.logits[..., :-1]
    expected = transducer_loss(
        log_probs, *batch.index_arguments, topology="one_sym_per_frame", reduction="none"
    )
    actual = loss_of(batch.logits, batch, {"durations": (1,)})
    torch.testing.assert_close(actual, expected)


@pytest.mark.not_emulated
@pytest.mark.parametrize("kind", KINDS)
def test_long_and_wide_lattices_in_float32(kind):
    for frames, symbols in ([1500, 900], [300, 200]), ([700, 500], [3, 2]), ([9, 7], [1, 2]):
        batch = batch_of(kind, frames, symbols, dtype=torch.float32, scale=5.0)
        packed = batch.packed()
        loss = loss_of(packed, batch, kind, sigma=0.05)
        same = packed.detach().double().requires_grad_()
        exact = loss_of(same, batch, kind, sigma=0.05)
        torch.testing.assert_close(loss.double(), exact, rtol=1e-6, atol=0)
        assert (grad_of(loss, packed).double() - grad_of(exact, same)).abs().max() < 1e-5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bits(kind, dtype):
    batch = batch_of(kind, [6, 4], [2, 1], num_labels=21)
    packed = batch.packed().detach().to(dtype).requires_grad_()
    loss = loss_of(packed, batch, kind)
    same = packed.detach().double().requires_grad_()
    exact = loss_of(same, batch, kind)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=1e-5)
    error = grad_of(loss, packed).double() - grad_of(exact, same)
    assert error.abs().max() < torch.finfo(dtype).eps


@pytest.mark.parametrize("kind", KINDS)
def test_packed_equals_padded_and_threads_change_nothing(kind):
    batch = batch_of(kind, [30, 14, 6], [7, 5, 0], dtype=torch.float32)
    packed = batch.packed()
    expected = loss_of(packed, batch, kind)
    padded = loss_of(batch.logits, batch, kind)
    assert torch.equal(padded, expected)
    grad = grad_of(expected, packed)
    padded_grad = grad_of(padded, batch.logits)
    assert torch.equal(batch.shape.pack(padded_grad), grad)
    assert torch.equal(padded_grad, zero_padding(batch, padded_grad))
    torch.set_num_threads(3)
    again = loss_of(packed, batch, kind, shape=batch.shape)
    assert torch.equal(again, expected) and torch.equal(grad_of(again, packed), grad)


# --- options --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_fastemit_scales_label_arcs(kind):
    batch = batch_of(kind, [6, 5], [2, 1])
    plain = loss_of(batch.logits, batch, kind, sigma=0.1)
    fast = loss_of(batch.logits, batch, kind, sigma=0.1, fastemit_lambda=0.5)
    assert torch.equal(plain, fast)
    # The gradient of the label scores alone: by a delay penalty, which changes nothing else.
    blank, label = (grad_of_arcs(batch, kind, labels=labels) for labels in (False, True))
    torch.testing.assert_close(grad_of(plain, batch.logits), blank + label, atol=1e-10, rtol=0)
    expected = blank + 1.5 * label
    torch.testing.assert_close(grad_of(fast, batch.logits), expected, atol=1e-10, rtol=0)


def grad_of_arcs(batch, kind, *, labels):
    """The part of the gradient that comes through the label arcs, or through the others."""
    from transducer_toolkit.losses import reference

    kept, total = reference.duration_loss, torch.zeros_like(batch.logits)

    def through_one_kind(blank_scores, label_scores, topology, **options):
        frozen = blank_scores if labels else label_scores
        parts = [x.detach() if x is frozen else x for x in (blank_scores, label_scores)]
        return kept(*parts, topology, **options)

    reference.duration_loss = through_one_kind
    try:
        loss = reference_duration_loss(
            batch.logits, *batch.index_arguments, **kind, sigma=0.1, reduction="sum"
        )
    finally:
        reference.duration_loss = kept
    (grad,) = torch.autograd.grad(loss, batch.logits)
    return total + zero_padding(batch, grad)


@pytest.mark.parametrize("kind", KINDS)
def test_clamp_comes_before_the_upstream_gradient(kind):
    batch = batch_of(kind, [6, 5], [2, 1], scale=3.0)
    plain = loss_of(batch.logits, batch, kind)
    clamped = loss_of(batch.logits, batch, kind, clamp=0.05)
    weights = torch.tensor([10.0, -1.0], dtype=torch.float64)
    expected = grad_of(plain, batch.logits).clamp(-0.05, 0.05) * weights[:, None, None, None]
    torch.testing.assert_close(grad_of(clamped, batch.logits, weights), expected)
    assert (expected[..., -1].abs() == 0.5).any() or "durations" not in kind


@pytest.mark.parametrize("kind", KINDS)
def test_inplace(kind):
    batch = batch_of(kind, [6, 5], [2, 1])
    leaf = batch.packed()
    expected = grad_of(loss_of(leaf, batch, kind), leaf)
    logits = leaf * 1.0
    grad = grad_of(loss_of(logits, batch, kind, inplace=True), logits)
    assert torch.equal(grad, expected) and grad.data_ptr() == logits.data_ptr()


@pytest.mark.parametrize("module", [TDTLoss, MultiBlankLoss])
def test_module_form(module):
    kind = TDT if module is TDTLoss else MULTI_BLANK
    batch = batch_of(kind, [6, 5], [2, 1])
    (durations,) = kind.values()
    criterion = module(batch.blank, durations, sigma=0.05, reduction="sum")
    expected = loss_of(batch.logits, batch, kind, sigma=0.05, reduction="sum")
    assert torch.equal(criterion(batch.logits, *batch.index_arguments[:3]), expected)
    assert f"{durations}" in repr(criterion) and "sigma=0.05" in repr(criterion)


# --- autograd -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_opcheck_and_compile(kind):
    batch = batch_of(kind, [4, 6], [1, 2], padding=0.0)
    indices = batch.targets, batch.logit_lengths, batch.target_lengths
    arguments = operator.flat(
        LogitsInputs(batch.logits, *indices),
        LossOptions(batch.blank, topology_of(kind).name),
        LogitsPlan(with_uses=True),
    )
    torch.library.opcheck(torch.ops.transducer_toolkit.transducer_loss, tuple(arguments))
    torch._dynamo.reset()  # otherwise it makes the durations, which differ now, symbolic
    compiled = torch.compile(
        lambda x: loss_of(x * 2, batch, kind), fullgraph=True, backend="aot_eager"
    )
    actual, expected = compiled(batch.logits), loss_of(batch.logits * 2, batch, kind)
    torch.testing.assert_close(actual, expected)
    expected_grad = grad_of(expected, batch.logits)
    (grad,) = torch.autograd.grad(actual.sum(), batch.logits)
    torch.testing.assert_close(grad, expected_grad)


# --- values that are not finite -------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", ["nan", "inf"])
@pytest.mark.parametrize("column", [0, -1])
def test_a_bad_logit_spoils_its_utterance_only(kind, bad, column):
    batch = batch_of(kind, [5, 6, 4], [2, 3, 0])
    expected = loss_of(batch.logits, batch, kind)
    expected_grad = grad_of(expected, batch.logits)
    logits = batch.logits.detach().clone()
    logits[1, 2, 1, column] = float(bad)
    logits.requires_grad_()
    actual = loss_of(logits, batch, kind)
    others = torch.tensor([0, 2])
    assert actual[1].isnan() and torch.equal(actual[others], expected[others])
    grad = grad_of(actual, logits)
    assert torch.equal(grad[others], expected_grad[others])
    assert grad[1, :6, :4].isnan().all()
    masked = grad_of(actual, logits, torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64))
    assert (masked[1] == 0).all()


def test_masked_durations_and_symbols():
    # The big duration is impossible: the same as without it.
    batch = batch_of(TDT, [6, 5], [2, 1])
    logits = batch.logits.detach().clone()
    logits[..., -1] = -torch.inf
    logits.requires_grad_()
    fewer = logits.detach()[..., :-1].clone().requires_grad_()
    actual, expected = loss_of(logits, batch, TDT), loss_of(fewer, batch, {"durations": (0, 1, 2)})
    torch.testing.assert_close(actual, expected)
    grad = grad_of(actual, logits)
    torch.testing.assert_close(grad[..., :-1], grad_of(expected, fewer))
    assert (grad[..., -1] == 0).all()
    # No duration at all.
    logits = batch.logits.detach().clone()
    logits[0, 1, 1, -4:] = -torch.inf
    assert loss_of(logits, batch, TDT).isnan().tolist() == [True, False]


@pytest.mark.parametrize("kind", KINDS)
def test_no_path_leaves_a_zero_gradient(kind):
    batch = batch_of(kind, [6, 5], [2, 1])
    logits = batch.logits.detach().clone()
    logits[1, :, :, batch.blank] = -torch.inf
    for i in range(len(kind.get("big_blank_durations", ()))):
        logits[1, :, :, batch.blank - 1 - i] = -torch.inf
    logits.requires_grad_()
    loss = loss_of(logits, batch, kind)
    assert loss[1] == torch.inf and (grad_of(loss, logits)[1] == 0).all()


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "durations, message",
    [
        ((), "durations: expected distinct integers"),
        ((1, 0), "ascending order"),
        ((0, 1, 1), "ascending order"),
        ((-1, 1), "at least 0"),
        ((0,), "at least 1"),
        (tuple(range(40)), "at most 32"),
        ("012", "expected a list or a tuple"),
        ((0, 1.5), r"durations\[1\]: expected an int"),
        (3, "expected a list or a tuple"),
    ],
)
def test_bad_durations(durations, message):
    batch = batch_of(TDT, [4], [1])
    with pytest.raises((ValueError, TypeError), match=message):
        tdt_loss(batch.logits, *batch.index_arguments, durations)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"big_blank_durations": (1,)}, "at least 2"),
        ({"big_blank_durations": (2, 2)}, "distinct"),
        ({"big_blank_durations": tuple(range(2, 9))}, "big blanks: expected fewer than 7"),
        ({"big_blank_durations": (2,), "sigma": -1.0}, "sigma: expected a finite number >= 0"),
        ({"big_blank_durations": (2,), "delay_penalty": -1.0}, "delay_penalty"),
        ({"big_blank_durations": (2,), "reduction": "max"}, "reduction"),
    ],
)
def test_bad_options(options, message):
    batch = batch_of(MULTI_BLANK, [4], [1])
    with pytest.raises(ValueError, match=message):
        multi_blank_loss(batch.logits, *batch.index_arguments, **options)


def test_bad_lengths_and_labels():
    batch = batch_of(NO_ZERO, [4, 3], [1, 3])
    with pytest.raises(
        ValueError, match="utterance 1: topology 'tdt-1-2-3' needs at least 4 frames"
    ):
        loss_of(batch.logits, batch, NO_ZERO)
    even = {"durations": (2, 4)}
    batch = batch_of(even, [4, 5], [1, 1])
    with pytest.raises(ValueError, match=r"utterance 1: no durations of 1 symbols .* 5 frames"):
        loss_of(batch.logits, batch, even)
    assert loss_of(batch.logits, batch, even, validate=False).isinf().tolist() == [False, True]
    batch = batch_of(MULTI_BLANK, [4], [1])
    batch.targets[0, 0] = batch.blank - 1
    with pytest.raises(
        ValueError, match=r"a label other than blank \(6\) and the 2 big blanks .* got 5"
    ):
        loss_of(batch.logits, batch, MULTI_BLANK)
    batch = batch_of(TDT, [4], [1])
    batch.targets[0, 0] = batch.logits.size(-1) - 1  # a column of a duration is no label
    with pytest.raises(ValueError, match=r"a label in \[0, 5\), got 8"):
        loss_of(batch.logits, batch, TDT)
    assert loss_of(batch.logits, batch, TDT, validate=False).isnan().all()
    with pytest.raises(ValueError, match=r"blank: expected 0 <= blank < 5 .* got 7"):
        tdt_loss(batch.logits, *batch.index_arguments[:3], blank=7, **TDT)


@pytest.mark.parametrize("blank", [0, 1])
def test_big_blanks_before_symbol_0_are_the_last_symbols(blank):
    batch = batch_of(MULTI_BLANK, [6, 5], [2, 1])
    expected = loss_of(batch.logits, batch, MULTI_BLANK)  # blank 6 of 7, big blanks 5 and 4
    shift = blank - batch.blank
    turned = batch.logits.detach().roll(shift, -1).requires_grad_()
    batch.targets = (batch.targets + shift) % 7
    batch.blank = blank
    actual = loss_of(turned, batch, MULTI_BLANK)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(
        grad_of(actual, turned).roll(-shift, -1), grad_of(expected, batch.logits)
    )
    batch.targets[0, 0] = (blank - 2) % 7
    with pytest.raises(ValueError, match="big blanks"):
        loss_of(turned, batch, MULTI_BLANK)


def test_more_durations_than_columns():
    with pytest.raises(ValueError, match="blank: expected 0 <= blank < 0"):
        one = torch.tensor([1])
        tdt_loss(torch.zeros(1, 1, 1, 3), torch.zeros(1, 0).long(), one, one - 1, 0, (0, 1, 2))


def test_all_durations_of_a_processor():
    # As many as there may be; also a shape instead of lengths.
    kind = {"durations": tuple(range(32))}
    batch = batch_of(kind, [40], [3])
    shape = LatticeShape.from_lengths(batch.logit_lengths, batch.target_lengths)
    expected = reference_duration_loss(batch.logits, *batch.index_arguments, **kind)
    actual = loss_of(batch.logits, batch, kind, shape=shape, reduction="mean")
    torch.testing.assert_close(actual, expected)
    grads = [grad_of(loss, batch.logits) for loss in (actual, expected)]
    torch.testing.assert_close(grads[0], zero_padding(batch, grads[1]))
    with pytest.raises(ValueError, match="shape: expected the target_lengths of the call, got 2"):
        loss_of(batch.logits, batch, kind, shape=LatticeShape.from_lengths([40], [2]))
