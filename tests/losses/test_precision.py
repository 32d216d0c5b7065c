# SPDX-License-Identifier: Apache-2.0
"""Which cells of the fused loss are computed in which precision, and what that may cost."""

import random
from types import SimpleNamespace

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from tests.losses.coarse_case import BUDGET, Case
from tests.losses.coarse_reference import logits_gradient
from tests.pretend_cuda import CUDA, gradients, pretend_cuda, to_cuda, to_host
from transducer_toolkit import FusedJoinerLoss, LatticeShape, fused_joiner_loss
from transducer_toolkit.ops import coarse_to_fine, fused_joiner, native, stages
from transducer_toolkit.ops.durations import PathSums, occupancies
from transducer_toolkit.ops.fused_joiner import FusedInputs, FusedPlan, operator
from transducer_toolkit.ops.joint_tiles import JointTiles
from transducer_toolkit.ops.lattice import CellScores, LatticeBatch, Lengths
from transducer_toolkit.ops.native import ACTIVATIONS
from transducer_toolkit.ops.options import FusedOptions
from transducer_toolkit.ops.topology import TOPOLOGIES

pytestmark = pytest.mark.usefixtures("coarse_pass")


def random_case(seed):
    """A case of any topology, activation and scale; masked vocabularies; outliers; known paths."""
    torch.manual_seed(seed)
    choose = random.Random(seed)
    topology = choose.choice(tuple(TOPOLOGIES))
    frames = [choose.choice([1, 2, 5, 20, 50, 90]) for _ in range(choose.choice([1, 2, 3]))]
    symbols = [choose.randint(0, min(40, t)) for t in frames]
    frames = [
        max(t, TOPOLOGIES[topology].min_frames(u)) for t, u in zip(frames, symbols, strict=True)
    ]
    vocab_size, width = choose.choice([7, 30, 64, 129]), choose.choice([8, 32, 64])
    scale = 10 ** choose.uniform(0, 2)
    case = Case(frames, symbols, scale=scale, vocab_size=vocab_size, width=width)
    enc, pred, weight, bias = case.inputs
    enc *= choose.choice([0.3, 1, 1, 3])
    pred *= choose.choice([0.3, 1, 1])
    kind = choose.choice(["plain", "masked", "outlier rows", "outlier channel", "known path"])
    if kind == "masked":
        is_unused = torch.rand(vocab_size) < 0.4
        is_unused[0] = False
        is_unused[case.targets.flatten()] = False
        bias[is_unused] = choose.choice([-torch.inf, -1e4])
    elif kind == "outlier rows":
        weight[torch.randint(0, vocab_size, (3,))] *= choose.choice([10, 50])
    elif kind == "outlier channel":
        weight[:, choose.randrange(width)] *= 30
    elif kind == "known path":
        strength = choose.choice([2, 5, 10])
        for b, (t, u) in enumerate(zip(frames, symbols, strict=True)):
            for index, frame in enumerate(sorted(choose.sample(range(t), min(t, u)))):
                row = weight[case.targets[b, index]]
                enc[b, frame] += strength * row / row.norm()
        bias[0] += strength
    return case, {
        "topology": topology,
        "activation": choose.choice(["tanh", *ACTIVATIONS]),
        "fastemit_lambda": choose.choice([0.0, 0.1]),
        "delay_penalty": choose.choice([0.0, 0.2]),
        "clamp": choose.choice([0.0, 0.0, 0.05]),
    }


@pytest.mark.parametrize("first_seed", range(0, 200, 50))
def test_random_lattices_stay_within_the_budget(first_seed):
    """2,000 of them were tried; no more error than float32 alone has, where that is above."""
    for seed in range(first_seed, first_seed + 50):
        case, options = random_case(seed)
        expected = case.exact(**options)
        plain = case.run(precision="full", **options)
        actual = case.run(**options)
        assert torch.equal(actual[0].isfinite(), expected[0].isfinite())
        for grad, of_float32, exact in zip(actual[1:], plain[1:], expected[1:], strict=True):
            error, own = ((g.double() - exact).norm() for g in (grad, of_float32))
            assert error <= max(BUDGET * float(exact.norm()), 2 * float(own)), seed


# --- which cells get which precision -------------------------------------------------------------


def test_other_dtypes_have_no_coarser_one():
    case = Case()
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        inputs = [tensor.to(dtype) for tensor in case.inputs]
        losses, parts = case.loss(*inputs, return_parts=True)
        assert parts.selected == 1 and parts.low == 0
        assert torch.equal(losses, case.loss(*inputs, precision="full"))
    with torch.autocast("cpu", torch.bfloat16):
        assert case.parts()["selected"] == 1


def scored_batch(frames, symbols, scale=4.0):
    """A batch and scores of all its cells, as if of a vocabulary of 3."""
    shape = LatticeShape.from_lengths(frames, symbols)
    targets = torch.ones(len(frames), max(symbols), dtype=torch.int64)
    batch = LatticeBatch(
        Lengths(*shape.lengths),
        targets,
        max_frames=max(frames),
        padded=False,
        num_rows=shape.num_cells,
    )
    logits = scale * torch.randn(shape.num_cells, 3, dtype=torch.float64)
    scores = torch.log_softmax(logits, 1)
    return shape, batch, scores[:, 0].contiguous(), scores[:, 1].contiguous()


def refined_from(batch, blank, label, noise):
    """Coarse scores are off by `noise`; a refinement writes the right ones."""
    options = FusedOptions(0)
    scores = CellScores(blank + noise, label - noise, torch.zeros_like(blank))
    rounds = []

    def score_rows(rows, out, num_before):
        assert num_before == sum(known.numel() for known in rounds)
        rounds.append(rows)
        out.blank[rows], out.label[rows] = blank[rows], label[rows]

    return coarse_to_fine.refine(batch, scores, options, score_rows), scores, rounds


@pytest.mark.parametrize("scale", [1.0, 4.0, 12.0])
@pytest.mark.parametrize("error", [1e-3, 3e-2, 0.5])
def test_selection_leaves_out_no_more_than_the_budget(scale, error):
    shape, batch, blank, label = scored_batch([50, 30, 8], [20, 12, 0], scale)
    noise = error * (2 * torch.rand(shape.num_cells, dtype=torch.float64) - 1)
    refined, _, rounds = refined_from(batch, blank, label, noise)
    all_rows = torch.cat(rounds)
    assert all_rows.unique().numel() == all_rows.numel()  # none twice
    assert torch.equal(refined.is_fine.nonzero().flatten(), all_rows.sort().values)
    exact, *uses = stages.lattice(
        CellScores(blank, label, blank), batch, FusedOptions(0), with_uses=True
    )
    torch.testing.assert_close(refined.sums.losses, exact, rtol=1e-7, atol=1e-7)
    left = torch.where(refined.is_fine, 0.0, sum(occupancies(refined.sums, FusedOptions(0))))
    for b, begin in enumerate(shape.cell_offsets[:-1].tolist()):
        cells = slice(begin, int(shape.cell_offsets[b + 1]))
        found = noise[cells][refined.is_fine[cells]].abs().max()
        assert refined.error[b] == pytest.approx(float(found), rel=1e-6)
        length = int(shape.logit_lengths[b] + shape.target_lengths[b])
        budget = coarse_to_fine.CHECK_SLACK * coarse_to_fine.COARSE_BUDGET
        assert left[cells].sum() * found <= budget * 2 * length
    for mine, wanted in zip(refined.sums[1:3], uses, strict=True):
        assert (mine - wanted).abs().sum() <= 1e-6 * wanted.sum()


def test_the_check_finds_what_the_coarse_scores_hid():
    """Whole frames are off: the first selection misses the path, and the check finds it."""
    shape, batch, blank, label = scored_batch([60, 40], [20, 15], 6.0)
    noise = torch.zeros(shape.num_cells, dtype=torch.float64)
    noise[: shape.cell_offsets[1]] = 3 * torch.randn(int(shape.cell_offsets[1])).double()
    refined, _, rounds = refined_from(batch, blank, label, noise)
    assert len(rounds) > 2  # the sample, the selection, the check
    exact, *uses = stages.lattice(
        CellScores(blank, label, blank), batch, FusedOptions(0), with_uses=True
    )
    torch.testing.assert_close(refined.sums.losses, exact, rtol=1e-6, atol=0)
    for mine, wanted in zip(refined.sums[1:3], uses, strict=True):
        assert (mine - wanted).abs().sum() <= 1e-5 * wanted.sum()
    of_first, of_second = (
        refined.is_fine[: shape.cell_offsets[1]],
        refined.is_fine[shape.cell_offsets[1] :],
    )
    assert of_first.double().mean() > of_second.double().mean()


@pytest.mark.parametrize("seed", range(4))
def test_a_check_that_fails_is_followed_by_few_refinements(seed):
    torch.manual_seed(seed)
    shape, batch, blank, label = scored_batch([150, 150], [40, 44], 6.0)
    noise = torch.randn(shape.num_cells, dtype=torch.float64)
    _, _, rounds = refined_from(batch, blank, label, noise)
    # The sample, the selection, and at most three for checks. Half of the cells matter here.
    assert len(rounds) <= 5
    assert sum(rows.numel() for rows in rounds) < 0.6 * shape.num_cells


def test_backward_is_divided_within_the_budget():
    shape, batch, blank, label = scored_batch([50, 30, 8], [20, 12, 0], 3.0)
    noise = 0.02 * torch.randn(shape.num_cells, dtype=torch.float64)
    refined, scores, _ = refined_from(batch, blank, label, noise)
    options = FusedOptions(0, dropped_mass=1e-5)
    counts = torch.empty(2, dtype=torch.int64)
    visit = coarse_to_fine.plan_backward(batch, scores, options, refined, counts)
    full, low = (rows[:count] for rows, count in zip(visit, counts.tolist(), strict=True))
    assert refined.is_fine[full].all() and low.numel()
    for rows in (full, low):
        assert torch.equal(rows, rows.sort().values)
    assert set(full.tolist()).isdisjoint(low.tolist())
    occupancy = sum(occupancies(refined.sums, FusedOptions(0)))
    gradient, sensitivity = logits_gradient(scores, refined.sums, FusedOptions(0))
    is_full = torch.zeros(shape.num_cells, dtype=torch.bool).index_fill(0, full, True)
    is_kept = is_full.index_fill(0, low, True)
    for b, begin in enumerate(shape.cell_offsets[:-1].tolist()):
        cells = slice(begin, int(shape.cell_offsets[b + 1]))
        error = float(refined.error[b].clamp(min=coarse_to_fine.PRODUCT_ERROR))
        left = sensitivity[cells][~is_full[cells] & refined.is_fine[cells]].sum()
        assert left * error <= coarse_to_fine.LOW_BUDGET * gradient[cells].sum()
        length = int(shape.logit_lengths[b] + shape.target_lengths[b])
        assert occupancy[cells][~is_kept[cells]].sum() <= 1e-5 * length


def test_size_of_the_gradient_of_the_logits():
    """The L1 norm from two scores and two uses is that of the gradient itself."""
    logits = 2 * torch.randn(50, 6, dtype=torch.float64)
    probs = logits.softmax(1)
    uses = torch.rand(2, 50, dtype=torch.float64)
    sums = PathSums(uses[0], *uses, uses.new_empty(50, 0))
    grad = uses.sum(0)[:, None] * probs
    grad[:, 0] -= uses[0]
    grad[:, 1] -= uses[1]
    scores = CellScores(probs[:, 0].log(), probs[:, 1].log(), probs[:, 0])
    size, sensitivity = logits_gradient(scores, sums, FusedOptions(0))
    torch.testing.assert_close(size, grad.abs().sum(1))
    # d softmax . error, with the largest error of 1 in any direction
    variance = uses.sum(0) * (probs * (1 - probs)).sum(1)
    assert (2 * sensitivity >= variance).all()
    clamped, _ = logits_gradient(scores, sums, FusedOptions(0, clamp=0.1))
    assert (clamped <= grad.abs().clamp(max=0.1).sum(1) + 1e-12).all()


# --- autograd, torch.compile, devices ------------------------------------------------------------


def test_backward_twice_checkpointing_and_frozen_inputs():
    case = Case()
    leaves = [tensor.requires_grad_() for tensor in case.inputs]
    loss = case.loss(*leaves).sum()
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    second = torch.autograd.grad(loss, leaves)
    recomputed = checkpoint(lambda *x: case.loss(*x).sum(), *leaves, use_reentrant=False)
    third = torch.autograd.grad(recomputed, leaves)
    for a, b, c in zip(first, second, third, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)
    for index in range(4):
        (grad,) = torch.autograd.grad(case.loss(*leaves).sum(), leaves[index])
        torch.testing.assert_close(grad, first[index], rtol=1e-6, atol=1e-7)
    with torch.no_grad():
        assert torch.equal(case.loss(*leaves).sum(), loss)
    without_bias = [*leaves[:3], None]
    assert torch.autograd.grad(case.loss(*without_bias).sum(), leaves[:3])[0].isfinite().all()


def test_strided_inputs():
    case = Case()
    expected = case.run()
    case.inputs = [
        torch.stack([tensor, torch.zeros_like(tensor)], -1)[..., 0] for tensor in case.inputs
    ]
    assert not any(tensor.is_contiguous() for tensor in case.inputs)
    for mine, wanted in zip(case.run(), expected, strict=True):
        torch.testing.assert_close(mine, wanted)


def test_opcheck(monkeypatch):
    # The operator is compared with itself, and the logits that are not fine are undefined, as the
    # ends of the lists of rows are.
    monkeypatch.setattr(native, "empty", lambda *size, like: like.new_zeros(size))
    monkeypatch.setattr(native, "mapped", lambda size, like: like.new_zeros(size))
    case = Case([9, 4], [3, 2])
    leaves = [tensor.requires_grad_() for tensor in case.inputs]
    inputs = FusedInputs(*leaves, case.targets, *case.shape.lengths)
    for keep_logits in (False, True):
        plan = FusedPlan(case.shape.num_cells, keep_logits, with_uses=True, is_coarse=True)
        arguments = tuple(operator.flat(inputs, FusedOptions(0), plan))
        torch.library.opcheck(torch.ops.transducer_toolkit.fused_joiner_loss, arguments)


def test_backward_uses_the_logits_that_were_kept(monkeypatch):
    """All fine logits, some or none: the same gradients from fewer products."""
    case = Case([90, 60], [20, 12])
    leaves = [tensor.requires_grad_() for tensor in case.inputs]
    inputs = FusedInputs(*leaves, case.targets, *case.shape.lengths)
    vocab_size = case.inputs[2].size(0)
    plan = FusedPlan(case.shape.num_cells, keep_logits=True, with_uses=True, is_coarse=True)
    num_rows = []  # of the products of each run
    logits = JointTiles.logits
    monkeypatch.setattr(
        JointTiles,
        "logits",
        lambda self, hidden, *out: num_rows.append(hidden.size(0)) or logits(self, hidden, *out),
    )
    runs = []
    for budget in (2**30, 4 * vocab_size * 300, 0):
        monkeypatch.setattr(coarse_to_fine, "FINE_LOGITS_BYTES", {"cpu": budget})
        num_rows.clear()
        loss = operator(inputs, FusedOptions(0, tile_cells=64), plan)
        grads = torch.autograd.grad(loss.losses.sum(), leaves)
        runs.append((grads, sum(num_rows), int(loss.counts[3])))
    (expected, least, num_fine), (of_some, fewer, num_some), (of_none, most, num_none) = runs
    assert num_fine == int(loss.num_fine) > 300 >= num_some > 300 - 64
    assert num_none == 0 and least < fewer < most
    for grads in (of_some, of_none):
        for grad, want in zip(grads, expected, strict=True):
            assert (grad - want).norm() <= 1e-6 * want.norm()


@pytest.mark.parametrize("keep_logits", [False, True])
@pytest.mark.parametrize("activation", ["tanh", "relu"])
def test_forward_waits_for_each_selection_and_backward_once(keep_logits, activation):
    case = Case([30, 20], [8, 5])
    leaves = [tensor.clone().requires_grad_() for tensor in case.inputs]
    exact = torch.autograd.grad(
        case.loss(*leaves, precision="full", activation=activation).sum(), leaves
    )
    with pretend_cuda() as traffic:
        case.shape.to(CUDA)
        there = [to_cuda(tensor) for tensor in (*case.inputs, case.targets)]
        ones = to_cuda(torch.ones(2))
        traffic.events.clear()
        options = {"shape": case.shape, "activation": activation}
        fused_joiner_loss(*there, *case.shape.lengths, 0, **options)
        assert set(traffic.events) == {"waits: __int__"} and len(traffic.events) <= 3
        waits = len(traffic.events)
        traffic.events.clear()
        run = gradients(
            fused_joiner.operator, traffic, keep_logits=keep_logits, with_uses=True, is_coarse=True
        )
        _, grads = run(ones, 4)
        assert traffic.events == ["waits: __int__"] * waits + ["waits: tolist"]
    for grad, want in zip(grads[:4], exact, strict=True):
        assert (to_host(grad) - want).norm() <= BUDGET * want.norm()


def test_a_captured_graph_takes_the_plain_path():
    case = Case([30, 20], [8, 5])
    leaves = [tensor.clone().requires_grad_() for tensor in case.inputs]
    expected = case.loss(*leaves, precision="full")
    exact = torch.autograd.grad(expected.sum(), leaves)
    with pretend_cuda() as traffic:
        case.shape.to(CUDA)
        there = [to_cuda(tensor) for tensor in (*case.inputs, case.targets)]
        ones = to_cuda(torch.ones(2))
        traffic.events.clear()
        with traffic.capture():
            fused_joiner_loss(*there, *case.shape.lengths, 0, shape=case.shape)
            run = gradients(
                fused_joiner.operator, traffic, keep_logits=True, with_uses=True, is_coarse=True
            )
            losses, grads = run(ones, 4)
        assert traffic.events == []
    torch.testing.assert_close(to_host(losses), expected)
    for grad, want in zip(grads[:4], exact, strict=True):
        torch.testing.assert_close(to_host(grad), want, rtol=1e-5, atol=1e-5)


# --- the option ----------------------------------------------------------------------------------


def test_option():
    case = Case()
    with pytest.raises(ValueError, match="precision: expected one of"):
        case.loss(*case.inputs, precision="half")
    with pytest.raises(ValueError, match="return_parts: expected False with return_kept"):
        case.loss(*case.inputs, return_kept=True, return_parts=True)
    criterion = FusedJoinerLoss(blank=0, precision="full", return_parts=True)
    loss, parts = criterion(*case.inputs, case.targets, *case.shape.lengths)
    assert parts.low == 0 and loss.dim() == 0


def test_rule(monkeypatch):
    monkeypatch.undo()
    enc, wide = torch.zeros(1, 1, 512), torch.zeros(1, 1, 16)
    for has_bfloat16 in (False, True):
        monkeypatch.setattr(coarse_to_fine, "_CPU_HAS_BFLOAT16", has_bfloat16)
        assert coarse_to_fine.pays(enc, 500, 120_000) == has_bfloat16
        assert not coarse_to_fine.pays(enc, 500, 8_000)  # their logits are kept: 15 MiB
        assert not coarse_to_fine.pays(wide, 500, 120_000)
        assert not coarse_to_fine.pays(enc.double(), 500, 120_000)
        assert not coarse_to_fine.pays(enc.bfloat16(), 500, 240_000)


def test_rule_on_a_gpu(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(coarse_to_fine, "are_logits_few", lambda *_: False)
    monkeypatch.setattr(coarse_to_fine, "has_fast_bfloat16", lambda _: True)
    enc = SimpleNamespace(
        dtype=torch.float32, device=torch.device("cuda"), size=lambda _: 512, is_cuda=True
    )
    assert coarse_to_fine.pays(enc, 500, 726_474)
    assert not coarse_to_fine.pays(enc, 500, 200_000)  # the host would take longer than it saves
    matmul = torch.backends.cuda.matmul
    before, matmul.allow_tf32 = matmul.allow_tf32, True
    try:
        assert not coarse_to_fine.pays(enc, 5000, 726_474)
    finally:
        matmul.allow_tf32 = before
