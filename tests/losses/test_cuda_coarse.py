# SPDX-License-Identifier: Apache-2.0
"""The coarse pass of the fused loss on every backend, against float64 on the CPU."""

import pytest
import torch

from tests.backends import accelerated, of
from tests.losses.coarse_case import BUDGET, Case, V
from tests.losses.test_cuda_precision import JOINT_NAMES, check_all, loss_and_grads
from transducer_toolkit import fused_joiner_loss
from transducer_toolkit.ops import joint_tiles
from transducer_toolkit.ops.native import ACTIVATIONS
from transducer_toolkit.ops.topology import TOPOLOGIES

pytestmark = pytest.mark.usefixtures("coarse_pass")
backends = pytest.mark.parametrize("name", ["cpu", "emulated", "cuda"])


@backends
@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize("band", [0, 4])
@pytest.mark.parametrize("tile_cells", [None, 100])
def test_gradients_stay_within_the_budget(name, topology, band, tile_cells):
    """With fine logits kept and computed again."""
    case = Case(band=band)
    for options in (
        {"topology": topology, "fastemit_lambda": 0.3, "delay_penalty": 0.1},
        {"topology": topology, "clamp": 0.05},
    ):
        expected = case.exact(**options)
        actual = case.run(of(name), tile_cells=tile_cells, **options)
        assert [tensor.dtype for tensor in actual] == [torch.float32] * 5
        check_all(actual[:1], expected[:1], 1e-6, ["loss"])
        check_all(actual[1:], expected[1:], BUDGET, JOINT_NAMES[1:])


@backends
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("scale", [1.0, 12.0])
def test_activations(name, activation, scale):
    case = Case(scale=scale)
    actual = case.run(of(name), activation=activation)
    check_all(actual, case.exact(activation=activation), BUDGET, JOINT_NAMES)


@backends
def test_parts(name):
    case, backend = Case([120, 90], [40, 30], scale=8.0), of(name)
    parts = case.parts(backend)
    assert parts["kept"] == pytest.approx(parts["full"] + parts["low"])
    assert 0 < parts["full"] <= parts["selected"] < 0.7 and parts["low"] > 0
    assert case.parts(backend, precision="full") == pytest.approx(
        {"kept": parts["kept"], "selected": 1.0, "full": parts["kept"], "low": 0.0}, rel=3e-2
    )


@backends
def test_nan_and_masked_vocabulary_lose_no_utterance(name):
    case, backend = Case(), of(name)
    case.inputs[3][5:20] = -torch.inf
    case.targets[:] = torch.randint(20, V, case.targets.shape)
    clean = case.run(backend)
    check_all(clean, case.exact(), BUDGET, JOINT_NAMES)
    case.inputs[0][1, 2] = torch.nan
    losses, grad_enc, *_ = case.run(backend)
    assert losses[1].isnan() and torch.equal(losses[[0, 2, 3]], clean[0][[0, 2, 3]])
    assert grad_enc[1, 2].isnan().all()
    loss = lambda *leaves: case.loss(*leaves).nan_to_num(nan=0.0)  # noqa: E731
    inputs = [tensor.to(backend.device) for tensor in case.inputs]
    with backend.active():
        masked = loss_and_grads(loss, inputs)
    for grad in masked:
        assert grad.isfinite().all()
    torch.testing.assert_close(masked[1][[0, 2, 3]], clean[1][[0, 2, 3]], rtol=1e-4, atol=1e-6)


@backends
def test_what_overflows_in_bfloat16_alone_is_computed_in_float32(name):
    """A weight that bfloat16 rounds to infinity, on a channel that is zero in one utterance."""
    case, backend = Case(), of(name)
    enc, pred, weight, _ = case.inputs
    enc[1, :, 3] = pred[1, :, 3] = 0.0
    enc[[0, 2, 3], :, 3] = -30.0  # tanh is -1: symbol 36 is impossible there
    pred[[0, 2, 3], :, 3] = -30.0
    case.targets.clamp_(max=35)
    weight[36, 3] = 3.4e38
    assert weight.bfloat16()[36, 3].isinf()
    actual, expected = case.run(backend), case.exact()
    assert expected[0].isfinite().all()
    check_all(actual[:1], expected[:1], 1e-6, ["loss"])
    check_all([actual[3], actual[4]], [expected[3], expected[4]], BUDGET, ["weight", "bias"])
    check_all([actual[2][1]], [expected[2][1]], BUDGET, ["pred"])


@backends
@pytest.mark.parametrize("scale", [1.0, 12.0])
def test_a_padded_vocabulary_changes_nothing(name, scale, monkeypatch):
    """The sums of both precisions have its columns; V is 37."""
    case, backend = Case(scale=scale), of(name)
    expected = [tensor.cpu() for tensor in case.run(backend)]
    monkeypatch.setattr(joint_tiles, "VOCAB_MULTIPLE", {"cpu": 8, "cuda": 16})
    actual = case.run(backend)
    check_all(actual, expected, BUDGET, JOINT_NAMES)
    check_all(actual, case.exact(), BUDGET, JOINT_NAMES)


@backends
def test_no_path(name):
    case = Case(band=2)
    case.ranges[0] = torch.tensor([0, 1])  # the band never reaches symbol 20
    losses, *grads = case.run(of(name), validate=False)
    assert losses[0] == torch.inf and losses[1:].isfinite().all()
    assert all(grad.isfinite().all() for grad in grads) and grads[0][0].eq(0).all()


@backends
def test_invalid_labels_without_validation_are_nan(name):
    case = Case()
    for label in (V, V + 1, 10**8):  # the first may lie in the padding of the coarse logits
        case.targets[0, 1] = label
        losses = case.run(of(name), validate=False)[0]
        assert losses[0].isnan() and losses[1:].isfinite().all()


@accelerated
def test_repeats_bit_for_bit(name):
    backend, case = of(name), Case()
    results = []
    for order, seed in backend.orders:
        inputs = [tensor.to(backend.device) for tensor in case.inputs]
        with backend.active(order, seed):
            results.append(loss_and_grads(case.loss, inputs))
    for result in results[1:]:
        assert all(torch.equal(*pair) for pair in zip(result, results[0], strict=True))


@pytest.mark.parametrize("name", ["cpu", "cuda"])
def test_compiles_into_one_graph(name):
    backend = of(name)
    torch.compiler.reset()

    def loss_of(case, shape, *leaves):
        return case.loss(*leaves, shape=shape).sum()

    compiled = torch.compile(loss_of, fullgraph=True, backend="aot_eager")
    for step in range(3):
        case = Case([30 + step, 20], [8, 5])
        shape = case.shape.to(backend.device)
        leaves = [tensor.to(backend.device).requires_grad_() for tensor in case.inputs]
        actual, expected = (f(case, shape, *leaves) for f in (compiled, loss_of))
        torch.testing.assert_close(actual, expected)
        grads = (torch.autograd.grad(loss, leaves) for loss in (actual, expected))
        for grad, want in zip(*grads, strict=True):
            torch.testing.assert_close(grad, want)


def test_cuda_graph_with_a_coarse_plan():
    of("cuda")
    case = Case()
    shape = case.shape.to("cuda")
    leaves = [tensor.cuda().requires_grad_() for tensor in case.inputs]
    targets = case.targets.cuda()

    def step():
        loss = fused_joiner_loss(*leaves, targets, *shape.lengths, 0, shape=shape)
        return loss.detach(), *torch.autograd.grad(loss, leaves)

    expected = [tensor.cpu() for tensor in step()]
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    check_all(captured, expected, BUDGET, JOINT_NAMES)
