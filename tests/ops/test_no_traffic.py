# SPDX-License-Identifier: Apache-2.0
"""What losses on a CUDA device copy to it and wait for: with a shape that is there, nothing."""

import pytest
import torch

from tests.losses.additive import additive_batch, boundary_row
from tests.losses.helpers import ragged_batch
from tests.pretend_cuda import CUDA, gradients, pretend_cuda, to_cuda, to_host
from transducer_toolkit import (
    LatticeShape,
    fused_joiner_loss,
    get_rnnt_prune_ranges,
    joiner_logits,
    rnnt_loss_smoothed,
    transducer_loss,
)
from transducer_toolkit.ops import additive, fused_joiner, join, joint_tiles, logits_loss
from transducer_toolkit.ops.additive import pick_rows

FRAMES, SYMBOLS = [6, 4, 1], [3, 0, 2]
ops = torch.ops.transducer_toolkit


def logits_case(layout, dtype=torch.float32):
    batch = ragged_batch(FRAMES, SYMBOLS, 7, dtype=dtype, padding=0.0)
    return batch, (batch.packed() if layout == "packed" else batch.logits).detach()


def of_logits(traffic):
    return gradients(logits_loss.operator, traffic, with_uses=True)


def of_joiner(traffic, keep_logits):
    return gradients(fused_joiner.operator, traffic, keep_logits=keep_logits, with_uses=True)


@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("validate", [None, False])
def test_loss_of_logits_with_a_shape_is_captured(layout, validate):
    batch, logits = logits_case(layout)
    leaf = logits.clone().requires_grad_()
    expected = transducer_loss(leaf, *batch.index_arguments, reduction="none")
    (wanted,) = torch.autograd.grad(expected.sum(), leaf)
    shape = batch.shape
    with pretend_cuda() as traffic:
        shape.to(CUDA)
        assert traffic.events == ["host to device"]
        inputs = to_cuda(logits), to_cuda(batch.targets), *shape.lengths, batch.blank
        grad_of_losses = to_cuda(torch.ones(3))
        with traffic.capture():
            transducer_loss(*inputs, shape=shape, validate=validate)
            losses, (grad, *_) = of_logits(traffic)(grad_of_losses, 1)
        assert traffic.events == ["host to device"]
    torch.testing.assert_close(to_host(losses), expected)
    torch.testing.assert_close(to_host(grad), wanted, rtol=1e-5, atol=1e-6)


def joint_case(dtype, band):
    torch.manual_seed(4)
    shape = LatticeShape.from_lengths(FRAMES, SYMBOLS)
    inputs = [torch.randn(s) for s in ((3, 6, 16), (3, 4, 16), (9, 16), (9,))]
    inputs = [x.to(dtype) for x in inputs]
    targets = torch.randint(1, 9, (3, 3))
    ranges = None
    if band:
        start = torch.tensor([[0, 0, 0, 1, 2, 2]]).minimum(shape.target_lengths[:, None] - 1)
        start = start.clamp(min=0)
        start[2] = 1  # one frame: what the band leaves out changes the loss, not whether it runs
        ranges = start[:, :, None] + torch.arange(2)
    return shape, inputs, targets, ranges


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("band", [False, True])
@pytest.mark.parametrize("mask_out", [False, True])
@pytest.mark.parametrize("keep_logits", [False, True])
def test_fused_loss_with_a_shape_is_captured(dtype, band, mask_out, keep_logits):
    """No cell is filtered then: as with dropped_mass=0. A NaN that was masked out stays out."""
    shape, inputs, targets, ranges = joint_case(dtype, band)
    if mask_out:
        inputs[0][1, 2] = torch.nan
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    options = {"ranges": ranges, "shape": shape, "validate": None if not band else False}
    expected = fused_joiner_loss(
        *leaves, targets, *shape.lengths, 0, reduction="none", dropped_mass=0.0, **options
    )
    loss_grad = torch.tensor([2.0, 0.0 if mask_out else 1.0, 0.0 if band else 1.0])
    used = torch.where(loss_grad == 0, 0.0, expected)
    wanted = torch.autograd.grad((used * loss_grad).sum(), leaves)
    with pretend_cuda() as traffic:
        shape.to(CUDA)
        there = [to_cuda(tensor) for tensor in (*inputs, targets)]
        options["ranges"] = None if ranges is None else to_cuda(ranges)
        grad_of_losses = to_cuda(loss_grad)
        with traffic.capture():
            fused_joiner_loss(*there, *shape.lengths, 0, tile_cells=7, **options)
            losses, grads = of_joiner(traffic, keep_logits)(grad_of_losses, 4)
        assert traffic.events == ["host to device"]
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(to_host(losses), expected, rtol=1e-5, atol=0, equal_nan=True)
    for grad, exact in zip(grads[:4], wanted, strict=True):
        torch.testing.assert_close(to_host(grad), exact, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("keep_logits", [False, True])
def test_fused_loss_outside_of_a_capture_waits_once(keep_logits):
    """For the number of kept cells, in backward; lengths that came without a shape are copied."""
    shape, inputs, targets, _ = joint_case(torch.float32, band=False)
    with pretend_cuda() as traffic:
        there = [to_cuda(tensor) for tensor in (*inputs, targets)]
        ones = to_cuda(torch.ones(3))
        fused_joiner_loss(*there, *shape.lengths, 0)
        assert traffic.events == ["host to device"]
        traffic.events.clear()
        _, grads = of_joiner(traffic, keep_logits)(ones, 4)
        assert traffic.events == ["waits: tolist"]
    leaves = [tensor.requires_grad_() for tensor in inputs]
    loss = fused_joiner_loss(*leaves, targets, *shape.lengths, 0, reduction="sum")
    for grad, exact in zip(grads[:4], torch.autograd.grad(loss, leaves), strict=True):
        torch.testing.assert_close(to_host(grad), exact, rtol=1e-5, atol=1e-5)


def test_packed_logits_with_a_shape_are_captured():
    shape, inputs, _, _ = joint_case(torch.float32, band=False)
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    logits = joiner_logits(*leaves, shape)
    grad_of_logits = torch.randn_like(logits)
    wanted = torch.autograd.grad(logits, leaves, grad_of_logits)
    with pretend_cuda() as traffic:
        shape.to(CUDA)
        there = [to_cuda(tensor) for tensor in inputs]
        grad_there = to_cuda(grad_of_logits)
        with traffic.capture():
            actual = joiner_logits(*there, shape)
            _, grads = gradients(join.logits_operator, traffic)(grad_there, 4)
        assert traffic.events == ["host to device"]
    torch.testing.assert_close(to_host(actual), logits)
    for grad, exact in zip(grads[:4], wanted, strict=True):
        torch.testing.assert_close(to_host(grad), exact, rtol=1e-5, atol=1e-5)


def test_rows_are_picked_alike_on_a_device():
    rows, index = torch.randn(2, 4, 3), torch.tensor([[3, 3, 0], [1, 2, 1]])
    with pretend_cuda() as traffic:
        there = pick_rows(to_cuda(rows), to_cuda(index))
        assert traffic.events == []
    assert torch.equal(to_host(there), pick_rows(rows, index))


def test_without_a_shape_on_the_device_a_capture_says_what_to_do():
    batch, logits = logits_case("packed")
    with pretend_cuda() as traffic:
        inputs = to_cuda(logits), to_cuda(batch.targets), *batch.shape.lengths, batch.blank
        with traffic.capture(), pytest.raises(RuntimeError, match=r"to\('cuda:0'\) before"):
            transducer_loss(*inputs)
        transducer_loss(*inputs)
        assert traffic.events == ["host to device"]


def test_labels_on_a_device_are_read_if_asked_for():
    batch, logits = logits_case("padded")
    targets = batch.targets.clone()
    targets[0, 1] = 7  # V
    with pretend_cuda() as traffic:
        inputs = to_cuda(logits), to_cuda(targets), *batch.shape.lengths, batch.blank
        losses = transducer_loss(*inputs, reduction="none", shape=batch.shape.to(CUDA))
        assert traffic.events == ["host to device"]
        assert to_host(losses).isnan().tolist() == [True, False, False]
        with pytest.raises(ValueError, match=r"targets\[0, 1\]"):
            transducer_loss(*inputs, validate=True)
        assert any(event.startswith("waits") for event in traffic.events)


def test_the_double_sees_what_it_should():
    """Each kind of traffic, so that its absence above means something."""
    host = torch.arange(6.0)
    with pretend_cuda() as traffic:
        there = to_cuda(host)
        mask = there > 2
        for run, expected in (
            (lambda: float(there.sum()), "waits"),
            (lambda: bool(mask.any()), "waits"),
            (lambda: there[mask], "waits"),
            (lambda: mask.nonzero(), "waits"),
            (lambda: there.cpu(), "device to host"),
            (lambda: there.tolist(), "waits"),
            (lambda: host.to(CUDA), "host to device"),
            (lambda: torch.ops.aten.copy_(there, host), "copy between"),
            (lambda: torch.where(mask, there, torch.tensor(1.0)), "host to device"),
            (lambda: torch.tensor([1.0], device=CUDA), "host to device"),
            (lambda: there.long().repeat_interleave(there.long()), "waits"),
        ):
            traffic.events.clear()
            run()
            assert any(event.startswith(expected) for event in traffic.events), expected
            with traffic.capture(), pytest.raises(RuntimeError, match="not permitted"):
                run()
        with pytest.raises(RuntimeError, match="same device"):
            there + host


def test_loss_of_logits_near_an_alignment_is_captured():
    batch, logits = logits_case("packed")
    alignment = torch.tensor([[1, 2, 4], [0, 0, 0], [0, 0, 9]])
    options = {"left": 1, "right": 1, "reduction": "none"}
    expected = transducer_loss(logits, *batch.index_arguments, alignment=alignment, **options)
    shape = batch.shape
    with pretend_cuda() as traffic:
        shape.to(CUDA)
        inputs = to_cuda(logits), to_cuda(batch.targets), *shape.lengths, batch.blank
        there = to_cuda(alignment)
        with traffic.capture():
            with pytest.raises(RuntimeError, match="alignment: expected device cuda:0 while a"):
                transducer_loss(*inputs, shape=shape, alignment=alignment, **options)
            losses = transducer_loss(*inputs, shape=shape, alignment=there, **options)
        losses = to_host(losses)
    torch.testing.assert_close(losses, expected)


def test_fused_loss_near_an_alignment_waits_for_nothing(monkeypatch):
    monkeypatch.setattr(joint_tiles, "KEPT_LOGITS_BYTES", {})
    shape, inputs, targets, _ = joint_case(torch.float32, band=False)
    alignment = torch.tensor([[1, 2, 4], [0, 0, 0], [0, 0, 9]])
    options = {"left": 0, "right": 1, "reduction": "none", "shape": shape, "alignment": alignment}
    expected = fused_joiner_loss(*inputs, targets, *shape.lengths, 0, **options)
    with pretend_cuda() as traffic:
        shape.to(CUDA)
        there = [to_cuda(tensor) for tensor in (*inputs, targets)]
        traffic.events.clear()
        losses = fused_joiner_loss(*there, *shape.lengths, 0, **options)
        assert set(traffic.events) == {"host to device"} and len(traffic.events) <= 2
        losses = to_host(losses)
    torch.testing.assert_close(losses, expected)


@pytest.mark.parametrize("rnnt_type", ["regular", "constrained"])
def test_simple_loss_with_a_boundary_on_the_device_is_captured(rnnt_type):
    batch = additive_batch([boundary_row(6, 3), boundary_row(4, 0, t_begin=1)], dtype=torch.float32)
    options = {"lm_only_scale": 0.25, "am_only_scale": 0.0, "rnnt_type": rnnt_type}
    options |= {"reduction": "none", "return_grad": True}
    expected, posteriors = rnnt_loss_smoothed(*batch.arguments, boundary=batch.boundary, **options)
    wanted = torch.autograd.grad(expected.sum(), batch.am)
    with pretend_cuda() as traffic:
        tensors = [to_cuda(tensor) for tensor in (*batch.inputs, batch.symbols)]
        boundary, ones = to_cuda(batch.boundary), to_cuda(torch.ones(2, dtype=torch.float64))
        with traffic.capture():
            loss, found = rnnt_loss_smoothed(*tensors, batch.blank, boundary=boundary, **options)
            _, (_, grad, *_) = gradients(additive.operator, traffic, with_uses=True)(ones, 2)
        assert traffic.events == []
        ranges = get_rnnt_prune_ranges(*found, boundary, 3, rnnt_type=rnnt_type)
        assert [event.split(":")[0] for event in traffic.events] == ["device to host"]
        results = [to_host(tensor) for tensor in (loss, *found, grad, ranges)]
    ranges = get_rnnt_prune_ranges(*posteriors, batch.boundary, 3, rnnt_type=rnnt_type)
    for actual, exact in zip(results, (expected, *posteriors, *wanted, ranges), strict=True):
        torch.testing.assert_close(actual, exact, rtol=1e-5, atol=1e-6)
