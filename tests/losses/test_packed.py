# SPDX-License-Identifier: Apache-2.0
"""transducer_loss: values and gradients, layouts, options, autograd."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from tests.losses.helpers import ragged_batch, zero_padding
from transducer_toolkit import Joiner, LatticeShape, TransducerLoss, transducer_loss
from transducer_toolkit.losses.reference import reference_loss
from transducer_toolkit.ops.logits_loss import LogitsInputs, LogitsPlan, operator
from transducer_toolkit.ops.options import LossOptions
from transducer_toolkit.ops.topology import TOPOLOGIES

pytestmark = pytest.mark.usefixtures("stages")

SHAPES = {
    "one_cell": ([1], [0]),
    "one_frame": ([1, 1], [0, 3]),
    "all_empty": ([3, 1], [0, 0]),
    "ragged": ([5, 2, 7, 3], [3, 1, 0, 5]),
}


def grad_of(loss, tensor, weights=None):
    value = (loss * weights).sum() if weights is not None else loss.sum()
    return torch.autograd.grad(value, tensor, retain_graph=True)[0]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("vocab_size", [2, 7, 33])
@pytest.mark.parametrize("from_log_softmax", [False, True])
@pytest.mark.parametrize("enumerate_paths", [False, True])
def test_float64_equals_oracle(shape, vocab_size, from_log_softmax, enumerate_paths):
    batch = ragged_batch(*SHAPES[shape], vocab_size, blank=vocab_size // 2)
    if from_log_softmax:
        batch.logits = batch.logits.detach().log_softmax(-1).requires_grad_()
    weights = torch.randn(len(batch.targets), dtype=torch.float64)
    options = {"from_log_softmax": from_log_softmax, "reduction": "none"}
    expected = reference_loss(
        batch.logits, *batch.index_arguments, **options, enumerate_paths=enumerate_paths
    )
    actual = transducer_loss(batch.logits, *batch.index_arguments, **options)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10)
    expected_grad = grad_of(expected, batch.logits, weights)
    actual_grad = grad_of(actual, batch.logits, weights)
    torch.testing.assert_close(actual_grad, zero_padding(batch, expected_grad), rtol=0, atol=1e-10)


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 6), st.integers(0, 4)), min_size=1, max_size=4),
    vocab_size=st.integers(2, 9),
    topology=st.sampled_from(tuple(TOPOLOGIES)),
    delay_penalty=st.sampled_from([0.0, 0.3]),
    scale=st.sampled_from([0.1, 3.0, 40.0]),
    seed=st.integers(0, 2**31),
)
def test_any_batch_equals_oracle(lengths, vocab_size, topology, delay_penalty, scale, seed):
    torch.manual_seed(seed)
    lengths = [(max(t, TOPOLOGIES[topology].min_frames(u)), u) for t, u in lengths]
    frames, symbols = ([pair[i] for pair in lengths] for i in (0, 1))
    batch = ragged_batch(frames, symbols, vocab_size, scale=scale)
    expected = reference_loss(
        batch.logits,
        *batch.index_arguments,
        topology=topology,
        reduction="none",
        delay_penalty=delay_penalty,
    )
    packed = batch.packed()
    actual = transducer_loss(
        packed,
        *batch.index_arguments,
        topology=topology,
        reduction="none",
        delay_penalty=delay_penalty,
    )
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-10)
    torch.testing.assert_close(
        grad_of(actual, packed),
        batch.shape.pack(grad_of(expected, batch.logits)),
        rtol=0,
        atol=1e-10,
    )


@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize("from_log_softmax", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_gradcheck(topology, from_log_softmax, packed):
    batch = ragged_batch([4, 3], [2, 1], 5, padding=0.0)
    logits = batch.packed() if packed else batch.logits

    def loss_of(logits):
        return transducer_loss(
            logits,
            *batch.index_arguments,
            from_log_softmax=from_log_softmax,
            reduction="none",
            delay_penalty=0.2,
            topology=topology,
        )

    assert torch.autograd.gradcheck(loss_of, (logits,), atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_packed_equals_padded_bit_for_bit(dtype):
    batch = ragged_batch([9, 4, 6], [3, 5, 0], 37, dtype=dtype)
    packed = batch.packed()
    losses = [
        transducer_loss(logits, *batch.index_arguments, reduction="none")
        for logits in (batch.logits, packed)
    ]
    assert torch.equal(*losses)
    padded_grad, packed_grad = grad_of(losses[0], batch.logits), grad_of(losses[1], packed)
    assert torch.equal(batch.shape.pack(padded_grad), packed_grad)
    assert torch.equal(padded_grad, zero_padding(batch, padded_grad))  # zeros in the padding


def test_reductions_and_dtypes():
    batch = ragged_batch([4, 6], [2, 3], 8, dtype=torch.float32)
    none, mean, total = (
        transducer_loss(batch.logits, *batch.index_arguments, reduction=reduction)
        for reduction in ("none", "mean", "sum")
    )
    assert none.shape == (2,) and mean.shape == total.shape == ()
    assert none.dtype == torch.float32
    torch.testing.assert_close(mean, none.mean())
    torch.testing.assert_close(total, none.sum())
    torch.testing.assert_close(grad_of(mean, batch.logits) * 2, grad_of(total, batch.logits))


def test_int32_lengths_and_module_form():
    batch = ragged_batch([4, 6], [2, 3], 8)
    expected = transducer_loss(batch.logits, *batch.index_arguments, reduction="sum")
    criterion = TransducerLoss(blank=0, reduction="sum")
    indices = (tensor.int() for tensor in batch.index_arguments[:3])
    assert torch.equal(criterion(batch.logits, *indices), expected)
    assert "reduction='sum'" in repr(criterion)


def test_long_and_wide_lattices_in_float32():
    for frames, symbols in ([1100, 900], [3, 2]), ([3, 2], [1100, 1]):
        batch = ragged_batch(frames, symbols, 5, dtype=torch.float32, scale=5.0)
        loss = transducer_loss(batch.logits, *batch.index_arguments, reduction="sum")
        same = batch.logits.detach().double().requires_grad_()
        exact = transducer_loss(same, *batch.index_arguments, reduction="sum")
        assert loss.item() == pytest.approx(exact.item(), rel=1e-6)
        error = grad_of(loss, batch.logits).double() - grad_of(exact, same)
        assert error.abs().max() < 1e-5


def test_gradient_sums_to_zero_over_the_vocabulary():
    batch = ragged_batch([6, 4], [3, 2], 11)
    grad = grad_of(transducer_loss(batch.logits, *batch.index_arguments), batch.logits)
    assert grad.sum(-1).abs().max() < 1e-14


def test_threads_do_not_change_a_bit():
    batch = ragged_batch([60, 40, 3], [20, 30, 2], 50, dtype=torch.float32)
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        loss = transducer_loss(batch.logits, *batch.index_arguments, reduction="none")
        results.append((loss, grad_of(loss, batch.logits)))
    for loss, grad in results[1:]:
        assert torch.equal(loss, results[0][0]) and torch.equal(grad, results[0][1])


def test_published_gradient():
    logits = torch.tensor(
        [
            [[0.1, 0.6, 0.1, 0.1, 0.1], [0.1, 0.1, 0.6, 0.1, 0.1], [0.1, 0.1, 0.2, 0.8, 0.1]],
            [[0.1, 0.6, 0.1, 0.1, 0.1], [0.1, 0.1, 0.2, 0.1, 0.1], [0.7, 0.1, 0.2, 0.1, 0.1]],
        ]
    )[None].requires_grad_()
    two = torch.tensor([2])
    loss = transducer_loss(logits, torch.tensor([[1, 2]]), two, two, blank=0)
    loss.backward()
    assert loss.item() == pytest.approx(4.495666, abs=1e-6)
    expected = torch.tensor([-0.13116688, -0.3999269, 0.17703125, 0.17703125, 0.17703125])
    torch.testing.assert_close(logits.grad[0, 0, 0], expected, rtol=0, atol=1e-6)


# --- options ------------------------------------------------------------------------------------


def test_fastemit_scales_label_arcs_only():
    batch = ragged_batch([5, 3], [2, 1], 6)
    log_probs = batch.logits.detach().log_softmax(-1).requires_grad_()
    options = {"from_log_softmax": True, "reduction": "sum"}
    plain = transducer_loss(log_probs, *batch.index_arguments, **options)
    fast = transducer_loss(log_probs, *batch.index_arguments, **options, fastemit_lambda=0.5)
    assert torch.equal(plain, fast)
    expected = grad_of(plain, log_probs).clone()
    expected[..., 1:] *= 1.5  # blank is 0: everything else is a label
    torch.testing.assert_close(grad_of(fast, log_probs), expected, rtol=0, atol=1e-14)
    # Through the softmax: the chain rule on that.
    loss = transducer_loss(
        batch.logits, *batch.index_arguments, fastemit_lambda=0.5, reduction="sum"
    )
    chained = expected - batch.logits.softmax(-1) * expected.sum(-1, keepdim=True)
    chained = zero_padding(batch, chained.detach())
    torch.testing.assert_close(grad_of(loss, batch.logits), chained, rtol=0, atol=1e-12)


def test_clamp_comes_before_the_upstream_gradient():
    batch = ragged_batch([5, 3], [2, 1], 6, scale=3.0)
    loss = transducer_loss(batch.logits, *batch.index_arguments, reduction="none")
    clamped = transducer_loss(batch.logits, *batch.index_arguments, reduction="none", clamp=0.05)
    assert torch.equal(loss, clamped)
    weights = torch.tensor([10.0, -1.0], dtype=torch.float64)
    expected = grad_of(loss, batch.logits).clamp(-0.05, 0.05) * weights[:, None, None, None]
    actual = grad_of(clamped, batch.logits, weights)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-14)
    assert (actual.abs() > 0.05).any()


def test_inplace_writes_the_gradient_over_the_logits():
    batch = ragged_batch([5, 3], [2, 1], 6)
    leaf = batch.packed()
    expected = grad_of(transducer_loss(leaf, *batch.index_arguments), leaf)
    logits = leaf * 1.0
    loss = transducer_loss(logits, *batch.index_arguments, inplace=True)
    assert torch.equal(logits, leaf)  # forward does not touch them
    (grad,) = torch.autograd.grad(loss, logits, retain_graph=True)
    assert torch.equal(grad, expected)
    assert grad.data_ptr() == logits.data_ptr()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    with pytest.raises(ValueError, match=r"inplace: expected logits .* got a leaf"):
        transducer_loss(leaf, *batch.index_arguments, inplace=True)
    with pytest.raises(ValueError, match="got a view"):
        transducer_loss((leaf * 1.0)[:], *batch.index_arguments, inplace=True)


def test_inplace_under_saved_tensor_hooks_and_without_gradient():
    batch = ragged_batch([5, 3], [2, 1], 6)
    leaf = batch.packed()
    with torch.autograd.graph.save_on_cpu():
        loss = transducer_loss(leaf * 1.0, *batch.index_arguments, inplace=True)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="inplace=True allows one backward"):
        loss.backward()
    with torch.no_grad():  # a validation loop: there is nothing to overwrite
        assert torch.equal(transducer_loss(leaf, *batch.index_arguments, inplace=True), loss)


def test_inplace_reaches_the_parameters():
    batch = ragged_batch([5, 3], [2, 1], 6)
    layer = torch.nn.Linear(4, 6, dtype=torch.float64)
    hidden = torch.randn(batch.shape.num_cells, 4, dtype=torch.float64)
    grads = []
    for inplace in (False, True):
        loss = transducer_loss(layer(hidden), *batch.index_arguments, inplace=inplace)
        grads.append(torch.autograd.grad(loss, layer.weight)[0])
    assert torch.equal(*grads)


# --- autograd -----------------------------------------------------------------------------------


def test_backward_twice_and_strided_inputs():
    batch = ragged_batch([5, 3], [2, 1], 6, padding=0.0)
    loss = transducer_loss(batch.logits, *batch.index_arguments)
    assert torch.equal(grad_of(loss, batch.logits), grad_of(loss, batch.logits))
    strided = batch.logits.detach().permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)
    strided.requires_grad_()
    assert not strided.is_contiguous()
    same = transducer_loss(strided, *batch.index_arguments)
    assert torch.equal(same, loss)
    assert torch.equal(grad_of(same, strided), grad_of(loss, batch.logits))


def test_no_gradient_wanted():
    batch = ragged_batch([5, 3], [2, 1], 6)
    expected = transducer_loss(batch.logits, *batch.index_arguments)
    assert not transducer_loss(batch.logits.detach(), *batch.index_arguments).requires_grad
    with torch.no_grad():
        assert torch.equal(transducer_loss(batch.logits, *batch.index_arguments), expected)


@pytest.mark.parametrize("weight", [0.0, -2.0, 1e30])
def test_any_upstream_gradient(weight):
    batch = ragged_batch([5, 3], [2, 1], 6, dtype=torch.float32)
    loss = transducer_loss(batch.logits, *batch.index_arguments)
    expected = grad_of(loss, batch.logits) * weight
    torch.testing.assert_close(grad_of(loss * weight, batch.logits), expected)


def test_second_derivative_is_refused():
    batch = ragged_batch([3], [1], 4)
    loss = transducer_loss(batch.logits, *batch.index_arguments)
    with pytest.raises(RuntimeError, match="gradient of the gradient"):
        (grad,) = torch.autograd.grad(loss, batch.logits, create_graph=True)
        grad.pow(2).sum().backward()


@pytest.mark.parametrize("packed", [False, True])
def test_opcheck(packed):
    batch = ragged_batch([3, 2], [1, 2], 4, padding=0.0)
    logits = batch.packed() if packed else batch.logits
    indices = batch.targets, batch.logit_lengths, batch.target_lengths
    arguments = operator.flat(
        LogitsInputs(logits, *indices), LossOptions(batch.blank), LogitsPlan(with_uses=True)
    )
    torch.library.opcheck(torch.ops.transducer_toolkit.transducer_loss, tuple(arguments))


def test_compiles_into_one_graph():
    batch = ragged_batch([5, 3], [2, 1], 6, padding=0.0)

    def scaled_loss(logits, targets, logit_lengths, target_lengths):
        return transducer_loss(logits * 2, targets, logit_lengths, target_lengths, blank=0)

    compiled = torch.compile(scaled_loss, fullgraph=True, backend="aot_eager")
    expected = scaled_loss(batch.logits, *batch.index_arguments[:3])
    actual = compiled(batch.logits, *batch.index_arguments[:3])
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(grad_of(actual, batch.logits), grad_of(expected, batch.logits))


@pytest.mark.not_emulated  # the graph is the same
@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("layout", ["packed", "padded", "joiner"])
def test_one_graph_serves_batches_of_every_shape(layout, dynamic):
    torch.compiler.reset()
    joiner = Joiner(4, 4, 8, 6).double()

    def loss_of(inputs, shape, targets):
        logits = joiner(*inputs, shape) if layout == "joiner" else inputs[0] * 2
        lengths = shape.logit_lengths, shape.target_lengths
        return transducer_loss(logits, targets, *lengths, blank=0)

    compiled = torch.compile(loss_of, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for step in range(12):  # the limit of recompilations is 8
        batch = ragged_batch([5 + step, 3], [2 + step % 5, 1], 6, padding=0.0)
        inputs = [batch.packed() if layout == "packed" else batch.logits]
        if layout == "joiner":
            inputs = [
                torch.randn(2, 5 + step, 4, dtype=torch.float64),
                torch.randn(2, 3 + step % 5, 4, dtype=torch.float64, requires_grad=True),
            ]
        actual = compiled(inputs, batch.shape, batch.targets)
        expected = loss_of(inputs, batch.shape, batch.targets)
        torch.testing.assert_close(actual, expected)
        (grad,) = torch.autograd.grad(actual, inputs[-1])
        torch.testing.assert_close(grad, grad_of(expected, inputs[-1]))


def test_checkpointing():
    batch = ragged_batch([5, 3], [2, 1], 6)
    leaf = batch.packed()
    expected = grad_of(transducer_loss(leaf, *batch.index_arguments), leaf)
    for inplace in (False, True):
        loss = checkpoint(
            lambda leaf, inplace=inplace: transducer_loss(
                leaf * 1.0, *batch.index_arguments, inplace=inplace
            ),
            leaf,
            use_reentrant=False,
        )
        assert torch.equal(grad_of(loss, leaf), expected)


def test_forward_mode_is_refused():
    batch = ragged_batch([3], [1], 4, padding=0.0)
    logits = batch.logits.detach()
    with pytest.raises(RuntimeError, match="do not support forward-mode derivatives"):
        torch.func.jvp(lambda x: transducer_loss(x, *batch.index_arguments), (logits,), (logits,))


def test_targets_changed_behind_autograds_back_give_nan():
    memory = np.array([[1, 2], [3, 1]])
    logits = torch.randn(2, 4, 3, 5, requires_grad=True)
    lengths = torch.tensor([4, 4]), torch.tensor([2, 2])
    loss = transducer_loss(logits, torch.from_numpy(memory), *lengths, blank=0)
    memory[0] = 10**9
    (grad,) = torch.autograd.grad(loss, logits)
    assert grad[0, :, :2].isnan().all() and grad[1].isfinite().all()


# --- non-finite values --------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_one_bad_utterance_leaves_the_others_alone(value, topology):
    batch = ragged_batch([5, 4, 3], [2, 1, 0], 6, dtype=torch.float32)
    options = {"reduction": "none", "topology": topology}
    clean = transducer_loss(batch.logits, *batch.index_arguments, **options)
    clean_grad = grad_of(clean, batch.logits)
    for cell in [(0, 0), (0, 1), (2, 1), (3, 0)]:
        logits = batch.logits.detach().clone()
        logits[(1, *cell, 4)] = value
        logits.requires_grad_()
        loss = transducer_loss(logits, *batch.index_arguments, **options)
        assert loss[1].isnan()
        assert torch.equal(loss[[0, 2]], clean[[0, 2]])
        grad = grad_of(loss, logits)
        assert batch.shape.pack(grad)[15:23].isnan().all()
        assert torch.equal(grad[[0, 2]], clean_grad[[0, 2]])
        masked = torch.where(loss.isfinite(), loss, 0.0)
        assert grad_of(masked, logits).isfinite().all()


@pytest.mark.parametrize("symbol", ["blank", "label"])
def test_an_infinite_log_probability_is_nan(symbol):
    """No normalizer tells there."""
    batch = ragged_batch([3, 2], [1, 1], 5, dtype=torch.float32)
    log_probs = batch.logits.detach().log_softmax(-1)
    clean = transducer_loss(
        log_probs, *batch.index_arguments, from_log_softmax=True, reduction="none"
    )
    log_probs[0, 1, 0, batch.blank if symbol == "blank" else batch.targets[0, 0]] = torch.inf
    losses = transducer_loss(
        log_probs, *batch.index_arguments, from_log_softmax=True, reduction="none"
    )
    assert losses[0].isnan() and torch.equal(losses[1], clean[1])


def test_gradient_does_not_depend_on_the_size_of_the_normalizer():
    """Of 10^4 float32 holds three decimals; the rest is carried along."""
    batch = ragged_batch([9, 7], [4, 2], 12, dtype=torch.float32)
    logits = (batch.logits.detach() + 1e4).requires_grad_()
    exact = logits.detach().double().requires_grad_()
    grads = [
        grad_of(transducer_loss(x, *batch.index_arguments, reduction="sum"), x)
        for x in (logits, exact)
    ]
    assert (grads[0] - grads[1]).norm() <= 1e-5 * grads[1].norm()


def test_row_of_minus_infinity_is_nan():
    batch = ragged_batch([3], [1], 4)
    with torch.no_grad():
        batch.logits[0, 1, 1] = float("-inf")
    assert transducer_loss(batch.logits, *batch.index_arguments).isnan()


def test_masked_vocabulary_and_no_surviving_path():
    batch = ragged_batch([4, 3], [2, 1], 6)
    logits = batch.logits.detach().clone()
    unused = next(v for v in range(1, 6) if v not in batch.targets[:, :2])
    logits[..., unused] = float("-inf")
    logits.requires_grad_()
    loss = transducer_loss(logits, *batch.index_arguments)
    expected = reference_loss(logits, *batch.index_arguments)
    torch.testing.assert_close(loss, expected)
    assert grad_of(loss, logits)[..., unused].eq(0).all()

    with torch.no_grad():
        logits[1, 2, 1, 0] = float("-inf")  # the only exit of utterance 1
    losses = transducer_loss(logits, *batch.index_arguments, reduction="none")
    assert losses[1] == float("inf") and losses[0].isfinite()
    grad = grad_of(losses, logits)
    assert grad[1].eq(0).all() and grad[0].isfinite().all()


# --- 16-bit logits, autocast, precision ---------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("from_log_softmax", [False, True])
def test_sixteen_bit_logits_equal_float64_on_the_same_numbers(dtype, packed, from_log_softmax):
    batch = ragged_batch([20, 13], [8, 5], 50, scale=4.0, padding=0.0)
    logits = (batch.packed() if packed else batch.logits).detach().to(dtype).requires_grad_()
    exact = logits.detach().double().requires_grad_()
    options = {"reduction": "none", "from_log_softmax": from_log_softmax}
    loss = transducer_loss(logits, *batch.index_arguments, **options)
    expected = transducer_loss(exact, *batch.index_arguments, **options)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    grad = grad_of(loss, logits)
    assert grad.dtype == dtype
    # Rounded once, to the nearest: half a unit in the last place (and float16's subnormals).
    expected_grad = grad_of(expected, exact)
    eps = torch.finfo(dtype).eps
    bound = 0.51 * eps * expected_grad.abs() + (4e-8 if dtype == torch.float16 else 0) + 1e-7
    assert ((grad.double() - expected_grad).abs() <= bound).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_step_with_grad_scaler(dtype):
    shape = LatticeShape.from_lengths([9, 7], [3, 4])
    joiner = Joiner(6, 5, 16, 12)
    encoder_out, predictor_out = torch.randn(2, 9, 6), torch.randn(2, 5, 5)
    targets = torch.randint(1, 12, (2, 4))

    def loss_of():
        logits = joiner(encoder_out, predictor_out, shape)
        return logits, transducer_loss(
            logits, targets, shape.logit_lengths, shape.target_lengths, blank=0
        )

    _, exact = loss_of()
    expected = torch.autograd.grad(exact, list(joiner.parameters()))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = torch.optim.SGD(joiner.parameters(), lr=0.0)
    with torch.autocast("cpu", dtype=dtype):
        logits, loss = loss_of()
    assert logits.dtype == dtype and loss.dtype == torch.float32
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    torch.testing.assert_close(loss, exact, rtol=2e-2, atol=0)
    for parameter, grad in zip(joiner.parameters(), expected, strict=True):
        assert (parameter.grad - grad).norm() <= 3e-2 * grad.norm()


@pytest.mark.parametrize(
    ("frames", "symbols"),
    [
        (343, 71),
        pytest.param(1000, 200, marks=pytest.mark.not_emulated),
        pytest.param(3000, 30, marks=pytest.mark.not_emulated),
        pytest.param(3000, 600, marks=pytest.mark.not_emulated),  # see test_backends_lattice.py
    ],
)
@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_float32_gradient_is_within_1e_5_of_float64(frames, symbols, scale):
    batch = ragged_batch([frames], [symbols], 16, dtype=torch.float32, scale=scale)
    loss = transducer_loss(batch.logits, *batch.index_arguments)
    exact_logits = batch.logits.detach().double().requires_grad_()
    exact = transducer_loss(exact_logits, *batch.index_arguments)
    assert loss.item() == pytest.approx(exact.item(), rel=1e-6)
    error = grad_of(loss, batch.logits).double() - grad_of(exact, exact_logits)
    assert error.abs().max() < 1e-5
