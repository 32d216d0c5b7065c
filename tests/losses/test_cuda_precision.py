# SPDX-License-Identifier: Apache-2.0
"""Losses and gradients of a GPU, and of its emulation, against float64 on the CPU."""

import pytest
import torch
from torch.nn.functional import linear

from tests.backends import accelerated, of
from tests.losses.helpers import ragged_batch
from transducer_toolkit import (
    Joiner,
    LatticeShape,
    do_rnnt_pruning,
    fused_joiner_loss,
    get_rnnt_prune_ranges,
    join,
    joiner_logits,
    mutual_information_recursion,
    rnnt_loss_pruned,
    rnnt_loss_simple,
    rnnt_loss_smoothed,
    transducer_loss,
)

FRAMES, SYMBOLS, VOCAB_SIZE, WIDTH = [25, 14, 1, 19], [9, 6, 0, 11], 37, 24
# Of the norm of the error, over that of the tensor. bfloat16 rounds at 2^-9, float16 at 2^-12.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
SIXTEEN_BIT = [torch.bfloat16, torch.float16]


def check_error(actual, expected, tolerance, name=""):
    """Raises unless the norm of the difference is within `tolerance` of the norm of `expected`."""
    error = (actual.detach().cpu().double() - expected.detach().double()).norm()
    assert error <= tolerance * expected.detach().double().norm() + 1e-30, (name, float(error))


def check_all(actual, expected, tolerance, names):
    for tensor, truth, name in zip(actual, expected, names, strict=True):
        check_error(tensor, truth, tolerance, name)


def loss_and_grads(run, inputs):
    """run(*leaves) -> losses (B,), then the gradients of a weighted sum of them."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    loss = run(*leaves)
    weights = torch.linspace(0.5, 2, len(loss), dtype=loss.dtype, device=loss.device)
    return loss, *torch.autograd.grad((loss * weights).sum(), leaves)


def on_backend(backend, run, inputs):
    """The same on the backend's device and with its stages."""
    with backend.active():
        return loss_and_grads(run, [tensor.to(backend.device) for tensor in inputs])


def joint_case(dtype=torch.float32):
    """The shape, (enc, pred, weight, bias) rounded to `dtype`, and targets."""
    shape = LatticeShape.from_lengths(FRAMES, SYMBOLS)
    sizes = (4, 25, WIDTH), (4, 12, WIDTH), (VOCAB_SIZE, WIDTH), (VOCAB_SIZE,)
    scales = 1.0, 1.0, 0.5, 0.5
    inputs = [
        (scale * torch.randn(size)).to(dtype) for size, scale in zip(sizes, scales, strict=True)
    ]
    return shape, inputs, torch.randint(1, VOCAB_SIZE, (4, 11))


def unfused_loss(shape, targets):
    """The loss of enc, pred, weight, bias by way of all logits, in their dtype."""

    def run(enc, pred, weight, bias):
        logits = linear(join(enc, pred, shape), weight, bias)
        return transducer_loss(logits, targets, *shape.lengths, 0, reduction="none")

    return run


JOINT_NAMES = "loss", "grad_enc", "grad_pred", "grad_weight", "grad_bias"


@accelerated
@pytest.mark.parametrize("dtype", [torch.float32, *SIXTEEN_BIT])
@pytest.mark.parametrize("tile_cells", [None, 100])
def test_fused_gradients(name, dtype, tile_cells):
    """With logits kept and in tiles."""
    backend = of(name)
    shape, inputs, targets = joint_case(dtype)
    doubles = [tensor.double() for tensor in inputs]
    expected = loss_and_grads(unfused_loss(shape, targets), doubles)

    def run(*leaves):
        there = targets.to(backend.device)
        options = {"reduction": "none", "tile_cells": tile_cells}
        return fused_joiner_loss(*leaves, there, *shape.lengths, 0, **options)

    actual = on_backend(backend, run, inputs)
    assert [tensor.dtype for tensor in actual] == [torch.float32] + [dtype] * 4
    check_all(actual, expected, TOLERANCE[dtype], JOINT_NAMES)


@accelerated
@pytest.mark.parametrize("dtype", SIXTEEN_BIT)
def test_fused_loss_of_float32_parameters_under_autocast(name, dtype):
    backend = of(name)
    shape, inputs, targets = joint_case()
    rounded = [tensor.to(dtype).double() for tensor in inputs]
    expected = loss_and_grads(unfused_loss(shape, targets), rounded)

    def run(*leaves):
        there = targets.to(backend.device)
        with torch.autocast(backend.device.type, dtype):
            return fused_joiner_loss(*leaves, there, *shape.lengths, 0, reduction="none")

    actual = on_backend(backend, run, inputs)
    assert all(tensor.dtype == torch.float32 for tensor in actual)
    check_all(actual, expected, TOLERANCE[dtype], JOINT_NAMES)


@accelerated
@pytest.mark.parametrize("dtype", [None, *SIXTEEN_BIT])
def test_joiner_and_loss(name, dtype):
    """Packed logits of a Joiner, in float32 or under autocast, and the loss of them."""
    backend = of(name)
    shape = LatticeShape.from_lengths(FRAMES, SYMBOLS)
    targets = torch.randint(1, VOCAB_SIZE, (4, 11))
    joiner = Joiner(16, 20, WIDTH, VOCAB_SIZE)
    inputs = torch.randn(4, 25, 16), torch.randn(4, 12, 20)

    def run_with(joiner, labels, device, dtype):
        def run(*tensors):
            enc, pred, *parameters = tensors
            names = [key for key, _ in joiner.named_parameters()]
            state = dict(zip(names, parameters, strict=True))
            with torch.autocast(device.type, dtype, enabled=dtype is not None):
                logits = torch.func.functional_call(joiner, state, (enc, pred, shape))
                assert dtype is None or logits.dtype == dtype
                return transducer_loss(logits, labels, *shape.lengths, 0, reduction="none")

        return run

    tensors = *inputs, *(parameter.detach() for parameter in joiner.parameters())
    names = "loss", "enc", "pred", *(key for key, _ in joiner.named_parameters())
    cpu = torch.device("cpu")
    doubles = [tensor.double() for tensor in tensors]
    expected = loss_and_grads(run_with(joiner, targets, cpu, None), doubles)
    run = run_with(joiner, targets.to(backend.device), backend.device, dtype)
    actual = on_backend(backend, run, tensors)
    check_all(actual, expected, TOLERANCE[dtype or torch.float32], names)


@accelerated
@pytest.mark.parametrize("dtype", SIXTEEN_BIT)
def test_joiner_logits(name, dtype):
    """The operator that makes packed logits in tiles, and its gradients."""
    backend = of(name)
    shape, inputs, _ = joint_case(dtype)
    upstream = torch.randn(shape.num_cells, VOCAB_SIZE).to(dtype)
    leaves = [tensor.double().requires_grad_() for tensor in inputs]
    logits = linear(join(leaves[0], leaves[1], shape), *leaves[2:])
    expected = logits, *torch.autograd.grad(logits, leaves, upstream.double())
    with backend.active():
        leaves = [tensor.to(backend.device).requires_grad_() for tensor in inputs]
        logits = joiner_logits(*leaves, shape)
        upstream = upstream.to(backend.device)
        actual = logits, *torch.autograd.grad(logits, leaves, upstream)
    check_all(actual, expected, TOLERANCE[dtype], ("logits", *JOINT_NAMES[1:]))


@accelerated
@pytest.mark.parametrize(
    "options", [{}, {"fastemit_lambda": 0.1, "delay_penalty": 0.2}], ids=["plain", "penalties"]
)
def test_packed_loss_of_float32(name, options):
    backend = of(name)
    batch = ragged_batch(FRAMES, SYMBOLS, VOCAB_SIZE, dtype=torch.float32, scale=3.0)

    def run(logits):
        targets, *others = batch.index_arguments
        there = targets.to(logits.device)
        return transducer_loss(logits, there, *others, reduction="none", **options)

    logits = batch.packed().detach()
    expected = loss_and_grads(run, [logits.double()])
    actual = on_backend(backend, run, [logits])
    check_all(actual, expected, TOLERANCE[torch.float32], ("loss", "grad_logits"))


def boundary(shape):
    """(B, 4) [0, 0, U_b, T_b]."""
    frames, symbols = shape.lengths
    return torch.stack([0 * symbols, 0 * symbols, symbols, frames], 1)


def simple_case():
    shape = LatticeShape.from_lengths(FRAMES, SYMBOLS)
    am, lm = 2 * torch.randn(4, 25, VOCAB_SIZE), 2 * torch.randn(4, 12, VOCAB_SIZE)
    return shape, [lm, am], torch.randint(1, VOCAB_SIZE, (4, 11))


@accelerated
@pytest.mark.parametrize("scales", [None, (0.25, 0.0), (0.2, 0.1)])
def test_simple_and_smoothed_losses(name, scales):
    backend = of(name)
    shape, inputs, symbols = simple_case()

    def run(lm, am):
        there = symbols.to(am.device), 0
        limits = boundary(shape).to(am.device)
        if scales is None:
            return rnnt_loss_simple(lm, am, *there, limits, reduction="none")
        return rnnt_loss_smoothed(lm, am, *there, *scales, limits, reduction="none")

    expected = loss_and_grads(run, [tensor.double() for tensor in inputs])
    actual = on_backend(backend, run, inputs)
    check_all(actual, expected, TOLERANCE[torch.float32], ("loss", "grad_lm", "grad_am"))


def prune_ranges(shape, width):
    """(B, T, width) windows from a smoothed loss in float64."""
    _, inputs, symbols = simple_case()
    lm, am = (tensor.double() for tensor in inputs)
    limits = boundary(shape)
    _, grads = rnnt_loss_smoothed(lm, am, symbols, 0, boundary=limits, return_grad=True)
    return get_rnnt_prune_ranges(*grads, limits, width)


@accelerated
@pytest.mark.parametrize("dtype", [torch.float32, *SIXTEEN_BIT])
@pytest.mark.parametrize("fused", [False, True])
def test_pruned_losses(name, dtype, fused):
    """k2's way by do_rnnt_pruning, and the fused loss on the same windows."""
    backend = of(name)
    shape, inputs, targets = joint_case(dtype)
    ranges = prune_ranges(shape, width=5)

    def by_logits(enc, pred, weight, bias):
        labels, windows = targets.to(enc.device), ranges.to(enc.device)
        am, lm = do_rnnt_pruning(enc, pred, windows)
        logits = linear((am + lm).tanh(), weight, bias)
        limits = boundary(shape).to(enc.device)
        return rnnt_loss_pruned(logits, labels, windows, 0, limits, reduction="none")

    def by_fused(*leaves):
        labels, windows = targets.to(leaves[0].device), ranges.to(leaves[0].device)
        options = {"ranges": windows, "reduction": "none"}
        return fused_joiner_loss(*leaves, labels, *shape.lengths, 0, **options)

    expected = loss_and_grads(by_logits, [tensor.double() for tensor in inputs])
    assert expected[0].isfinite().all()
    actual = on_backend(backend, by_fused if fused else by_logits, inputs)
    check_all(actual, expected, 2 * TOLERANCE[dtype], JOINT_NAMES)


@accelerated
@pytest.mark.parametrize("open_end", [0, 1])
def test_mutual_information(name, open_end):
    """Scores and occupancies; px of T + 1 frames is the regular lattice, of T the modified one."""
    backend = of(name)
    shape = LatticeShape.from_lengths(FRAMES, SYMBOLS)
    inputs = [
        torch.log_softmax(torch.randn(4, 11, 25 + open_end, 3), -1)[..., 0],
        torch.log_softmax(torch.randn(4, 12, 25, 3), -1)[..., 1],
    ]
    if open_end:
        for b, frames in enumerate(FRAMES):
            inputs[0][b, :, frames:] = -torch.inf  # no symbol after the last frame

    def run(px, py):
        limits = boundary(shape).to(px.device)
        scores, grads = mutual_information_recursion(px, py, limits, return_grad=True)
        occupancies.append(grads)
        return scores

    occupancies = []
    expected = loss_and_grads(run, [tensor.double() for tensor in inputs])
    actual = on_backend(backend, run, inputs)
    check_all(actual, expected, TOLERANCE[torch.float32], ("scores", "grad_px", "grad_py"))
    check_all(occupancies[1], occupancies[0], TOLERANCE[torch.float32], ("px_grad", "py_grad"))
