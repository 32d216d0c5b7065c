# SPDX-License-Identifier: Apache-2.0
"""Losses on a CUDA device: like the CPU's, repeatable, on any stream, in graphs, beyond 2^31."""

import pytest
import torch

from tests import stage_calls as stages
from tests.backends import Backend
from tests.losses.helpers import ragged_batch
from tests.stage_calls import lattice_batch
from transducer_toolkit import LatticeShape, fused_joiner_loss, join, joiner_logits, transducer_loss
from transducer_toolkit.ops import native
from transducer_toolkit.ops.lattice import CellScores

pytestmark = pytest.mark.skipif(
    Backend("cuda").missing is not None, reason=str(Backend("cuda").missing)
)
FRAMES, SYMBOLS = [60, 41, 1, 33], [20, 13, 0, 30]


def loss_and_grad(logits, batch, **options):
    leaf = logits.detach().requires_grad_()
    indices = batch.targets.to(leaf.device), batch.logit_lengths, batch.target_lengths
    loss = transducer_loss(leaf, *indices, blank=0, reduction="none", **options)
    weights = torch.linspace(-1, 2, len(loss), dtype=loss.dtype, device=loss.device)
    return loss.detach(), torch.autograd.grad((loss * weights).sum(), leaf)[0]


@pytest.mark.parametrize("dtype", native.SUPPORTED_DTYPES)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    "options", [{}, {"fastemit_lambda": 0.1, "delay_penalty": 0.2, "clamp": 0.1}]
)
def test_equals_the_cpu_and_itself(dtype, packed, options):
    batch = ragged_batch(FRAMES, SYMBOLS, 501, scale=3.0)
    logits = (batch.packed() if packed else batch.logits).detach().to(dtype)
    expected = loss_and_grad(logits, batch, **options)
    results = [loss_and_grad(logits.cuda(), batch, **options) for _ in range(3)]
    tolerance = {torch.float64: 1e-11, torch.float32: 1e-5}.get(dtype, 1e-2)
    for actual, wanted in zip(results[0], expected, strict=True):
        torch.testing.assert_close(actual.cpu(), wanted, rtol=tolerance, atol=tolerance)
    for result in results[1:]:
        assert all(torch.equal(*pair) for pair in zip(result, results[0], strict=True))


def fused(device, dtype=torch.float32):
    torch.manual_seed(3)
    shape = LatticeShape.from_lengths(FRAMES, SYMBOLS)
    inputs = [
        torch.randn(size, dtype=dtype).to(device).requires_grad_()
        for size in ((4, 60, 48), (4, 31, 48), (70, 48), (70,))
    ]
    targets = torch.randint(1, 70, (4, 30)).to(device)
    lengths = shape.logit_lengths, shape.target_lengths
    loss = fused_joiner_loss(*inputs, targets, *lengths, 0, reduction="none")
    return loss, torch.autograd.grad(loss.sum(), inputs), (inputs, shape, targets)


def test_fused_equals_unfused_and_the_cpu():
    on_cpu = fused("cpu", torch.float64)
    loss, grads, ((enc, pred, weight, bias), shape, targets) = fused("cuda", torch.float64)
    logits = join(enc, pred, shape) @ weight.T + bias
    lengths = shape.logit_lengths, shape.target_lengths
    unfused = transducer_loss(logits, targets, *lengths, blank=0, reduction="none")
    torch.testing.assert_close(loss, unfused, rtol=1e-10, atol=0)
    torch.testing.assert_close(loss.cpu(), on_cpu[0], rtol=1e-10, atol=0)
    expected = torch.autograd.grad(unfused.sum(), (enc, pred, weight, bias))
    for grad, exact, host in zip(grads, expected, on_cpu[1], strict=True):
        torch.testing.assert_close(grad, exact, rtol=0, atol=1e-4)  # the filter's bound
        torch.testing.assert_close(grad.cpu(), host, rtol=0, atol=1e-8)
    first, again = fused("cuda"), fused("cuda")
    assert all(torch.equal(*pair) for pair in zip(first[1], again[1], strict=True))


LATE_CYCLES = 400_000_000  # of _sleep, 0.2 s of an H100: longer than the CPU needs to start a step


def late_inputs(tensors):
    """Copies that hold other values until the current stream has slept."""
    copies = [torch.full_like(tensor, 3.0) for tensor in tensors]
    torch.cuda._sleep(LATE_CYCLES)
    for copy, tensor in zip(copies, tensors, strict=True):
        copy.copy_(tensor)
    return copies


def on_a_side_stream(step, inputs):
    """Returns step(late inputs) started on a side stream while that sleeps.

    The step must not wait for the device: a kernel on another stream would then find the values it
    needs, and the test could not fail.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step(*late_inputs(inputs))  # fills the allocator: a new segment would wait for the device
        stream.synchronize()
        result = step(*late_inputs(inputs))
        assert not stream.query(), "the step waited for the device"
    stream.synchronize()
    return result


def test_loss_runs_on_the_current_stream():
    batch = ragged_batch(FRAMES, SYMBOLS, 40, dtype=torch.float32)
    shape, targets = batch.shape.to("cuda"), batch.targets.cuda()

    def step(logits):
        leaf = logits.requires_grad_()
        loss = transducer_loss(leaf, targets, *shape.lengths, 0, shape=shape, reduction="none")
        return loss.detach(), torch.autograd.grad(loss.sum(), leaf)[0]

    logits = batch.packed().detach().cuda()
    expected = step(logits.clone())
    actual = on_a_side_stream(step, [logits])
    assert all(torch.equal(*pair) for pair in zip(actual, expected, strict=True))


def test_joiner_runs_on_the_current_stream():
    """The fused loss's forward, and the logits of the joiner with their gradients."""
    torch.manual_seed(3)
    shape = LatticeShape.from_lengths(FRAMES, SYMBOLS).to("cuda")
    sizes = (4, 60, 48), (4, 31, 48), (70, 48), (70,)
    inputs = [torch.randn(size, device="cuda") for size in sizes]
    targets = torch.randint(1, 70, (4, 30), device="cuda")
    upstream = torch.randn(shape.num_cells, 70, device="cuda")

    def step(*tensors):
        leaves = [tensor.requires_grad_() for tensor in tensors]
        loss = fused_joiner_loss(*leaves, targets, *shape.lengths, 0, shape=shape, tile_cells=500)
        logits = joiner_logits(*leaves, shape)
        return loss.detach(), *torch.autograd.grad(logits, leaves, upstream)

    expected = step(*(tensor.clone() for tensor in inputs))
    actual = on_a_side_stream(step, inputs)
    assert all(torch.equal(*pair) for pair in zip(actual, expected, strict=True))


def test_fused_gradients_run_on_the_current_stream():
    """Backward waits once, for the number of cells that count, so only forward starts early."""
    shape = LatticeShape.from_lengths(FRAMES, SYMBOLS).to("cuda")
    sizes = (4, 60, 48), (4, 31, 48), (70, 48), (70,)
    inputs = [torch.randn(size, device="cuda", requires_grad=True) for size in sizes]
    targets = torch.randint(1, 70, (4, 30), device="cuda")

    def step(*tensors):
        leaves = [tensor.detach().requires_grad_() for tensor in tensors]
        loss = fused_joiner_loss(*leaves, targets, *shape.lengths, 0, shape=shape, tile_cells=500)
        return loss.detach(), *torch.autograd.grad(loss, leaves)

    expected = step(*inputs)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        actual = step(*late_inputs(inputs))
    stream.synchronize()
    assert all(torch.equal(*pair) for pair in zip(actual, expected, strict=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two devices")
def test_runs_on_the_tensors_device():
    batch = ragged_batch(FRAMES, SYMBOLS, 40, dtype=torch.float32)
    logits = batch.packed().detach()
    on_first, on_second = (loss_and_grad(logits.to(f"cuda:{i}"), batch) for i in range(2))
    assert all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(on_first, on_second, strict=True))


def test_stages_are_captured_into_a_graph():
    """Everything between the lengths (known before) and the gradient."""
    batch = ragged_batch(FRAMES, SYMBOLS, 40, dtype=torch.float32)
    device = torch.device("cuda")
    indices = batch.logit_lengths, batch.target_lengths, batch.targets
    lattices = lattice_batch(
        *(tensor.to(device) for tensor in indices),
        max_frames=60,
        padded=False,
        device=device,
        num_rows=batch.shape.num_cells,
    )
    logits, grad = (torch.zeros(batch.shape.num_cells, 40, device=device) for _ in range(2))
    loss_grad = torch.ones(4, dtype=torch.float64, device=device)
    options = {"topology": "regular", "delay_penalty": 0.0, "fastemit_lambda": 0.0}

    def step():
        scores = CellScores.zeros(lattices, device)
        tile = lattices.all_rows()
        stages.cell_scores(logits, lattices, tile, scores, blank=0)
        loss, *uses = stages.lattice(
            scores.blank, scores.label, lattices, with_uses=True, exact=False, **options
        )
        kept = stages.kept_rows(*uses, lattices, dropped_mass=1e-6)
        stages.logits_grad(
            logits, lattices, tile, scores.normalizer, *uses, loss_grad, blank=0, out=grad
        )
        return loss, kept.counts

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for seed in range(3):
        torch.manual_seed(seed)
        logits.copy_(torch.randn(logits.shape))
        graph.replay()
        replayed = [tensor.clone() for tensor in (*captured, grad)]
        expected = (*step(), grad)
        assert all(torch.equal(*pair) for pair in zip(replayed, expected, strict=True))


def test_padded_loss_of_device_lengths_is_captured_whole():
    batch = ragged_batch(FRAMES, SYMBOLS, 40, dtype=torch.float32, padding=0.0)
    logits = batch.logits.detach().cuda().requires_grad_()
    indices = [tensor.cuda() for tensor in batch.index_arguments[:3]]

    def step():
        loss = transducer_loss(logits, *indices, blank=0, reduction="sum")
        return loss.detach(), torch.autograd.grad(loss, logits)[0]

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        expected = step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    assert all(torch.equal(*pair) for pair in zip(captured, expected, strict=True))


def replay(step, inputs):
    """Outputs of step() captured and replayed with new inputs, and those of plain steps."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for seed in range(3):
        torch.manual_seed(seed)
        with torch.no_grad():
            for tensor in inputs:
                tensor.copy_(torch.randn(tensor.shape))
        graph.replay()
        yield [tensor.clone() for tensor in captured], step()


def test_packed_logits_and_loss_are_captured_whole():
    shape = LatticeShape.from_lengths(FRAMES, SYMBOLS).to("cuda")
    sizes = (4, 60, 48), (4, 31, 48), (70, 48), (70,)
    inputs = [torch.randn(size, device="cuda", requires_grad=True) for size in sizes]
    targets = torch.randint(1, 70, (4, 30), device="cuda")

    def step():
        logits = joiner_logits(*inputs, shape)
        loss = transducer_loss(logits, targets, *shape.lengths, blank=0, shape=shape)
        return loss.detach(), *torch.autograd.grad(loss, inputs)

    for replayed, expected in replay(step, inputs):
        assert all(torch.equal(*pair) for pair in zip(replayed, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("band", [False, True])
def test_fused_loss_is_captured_whole(dtype, band):
    """A graph visits all cells, a plain step those that count."""
    shape = LatticeShape.from_lengths(FRAMES, SYMBOLS).to("cuda")
    sizes = (4, 60, 48), (4, 31, 48), (70, 48), (70,)
    inputs = [torch.randn(s, device="cuda", dtype=dtype, requires_grad=True) for s in sizes]
    targets = torch.randint(1, 70, (4, 30), device="cuda")
    width = 31 if band else 0  # a band that is everything: every utterance has a path
    ranges = torch.arange(width, device="cuda").expand(4, 60, width).contiguous() if band else None
    options = {"ranges": ranges, "dropped_mass": 0.0, "tile_cells": 500}

    def step():
        loss = fused_joiner_loss(*inputs, targets, *shape.lengths, 0, shape=shape, **options)
        return loss.detach(), *torch.autograd.grad(loss, inputs)

    for replayed, expected in replay(step, inputs):
        for actual, wanted in zip(replayed, expected, strict=True):
            tolerance = 1e-5 if dtype == torch.float32 else 1e-2
            torch.testing.assert_close(actual, wanted, rtol=tolerance, atol=tolerance)


def test_invalid_device_lengths_are_nan():
    batch = ragged_batch([5, 4, 3], [2, 1, 3], 7, padding=0.0)
    targets, frames, symbols = (tensor.cuda() for tensor in batch.index_arguments[:3])
    frames[1], symbols[2] = 10**9, -5
    targets[0, 0] = 99
    logits = batch.logits.detach().cuda().requires_grad_()
    loss = transducer_loss(logits, targets, frames, symbols, blank=0, reduction="none")
    assert loss.isnan().all()
    assert torch.autograd.grad(loss.sum(), logits)[0].isnan().any()


@pytest.mark.skipif(
    Backend("cuda").missing is None and torch.cuda.mem_get_info()[0] < 16 * 2**30,
    reason="needs 16 GiB of free device memory",
)
def test_more_than_2_31_logits():
    vocab_size = 4096
    shape = LatticeShape.from_lengths([2000] * 3 + [30], [90] * 3 + [9])
    assert shape.num_cells * vocab_size > 2**31
    logits = torch.empty(shape.num_cells, vocab_size, dtype=torch.bfloat16, device="cuda")
    logits.normal_()
    targets = torch.randint(1, vocab_size, (4, 90)).cuda()
    last = logits[-300:].clone().requires_grad_()
    lengths = shape.logit_lengths, shape.target_lengths
    leaf = logits.requires_grad_()
    loss = transducer_loss(leaf, targets, *lengths, blank=0, reduction="none")
    grad = torch.autograd.grad(loss.sum(), leaf)[0]
    alone = transducer_loss(
        last, targets[3:, :9], *(tensor[3:] for tensor in lengths), blank=0, reduction="none"
    )
    assert torch.equal(loss[3:], alone)
    assert torch.equal(grad[-300:], torch.autograd.grad(alone.sum(), last)[0])
