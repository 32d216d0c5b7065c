# SPDX-License-Identifier: Apache-2.0
"""How many kernels and copies a step launches on CUDA. Each launch costs time on the host."""

from collections import Counter

import pytest
import torch

from tests.losses.coarse_case import Case
from tests.pretend_cuda import CUDA, gradients, pretend_cuda, to_cuda
from transducer_toolkit import fused_joiner_loss, get_rnnt_prune_ranges, rnnt_loss_smoothed
from transducer_toolkit.ops import additive, fused_joiner, joint_tiles
from transducer_toolkit.ops.prune_windows import greedy_ranges

FRAMES, SYMBOLS, VOCAB, WIDTH, DIM = (12, 9, 7), (4, 3, 2), 11, 3, 8


def launches_of_a_pruned_step():
    """Returns the launches of each part; "... again" is an operator's forward and backward."""
    torch.manual_seed(0)
    utterances, counts = len(FRAMES), {}

    def rows(width):
        """For each frame and for each column."""
        sizes = max(FRAMES), max(SYMBOLS) + 1
        return [to_cuda(torch.randn(utterances, size, width)) for size in sizes]

    with pretend_cuda() as traffic:

        def count(name):
            counts[name] = traffic.num_launches - sum(counts.values())

        symbols = to_cuda(torch.randint(1, VOCAB, (utterances, max(SYMBOLS))))
        boundary = to_cuda(
            torch.tensor([[0, 0, u, t] for u, t in zip(SYMBOLS, FRAMES, strict=True)])
        )
        (am, lm), (enc, pred) = rows(VOCAB), rows(DIM)
        joint = enc, pred, to_cuda(torch.randn(VOCAB, DIM)), to_cuda(torch.zeros(VOCAB))
        ones = torch.ones(utterances)
        _, posteriors = rnnt_loss_smoothed(
            lm, am, symbols, 0, 0.25, 0.0, boundary, reduction="none", return_grad=True
        )
        count("simple")
        ranges = get_rnnt_prune_ranges(*posteriors, boundary, WIDTH)
        count("ranges")
        lengths = torch.tensor(FRAMES), torch.tensor(SYMBOLS)
        fused_joiner_loss(
            *joint, symbols, *lengths, 0, ranges=ranges, reduction="none", precision="full"
        )
        count("pruned, without a gradient")
        gradients(additive.operator, traffic)(to_cuda(ones.double()), 2)
        count("simple again")
        plan = {"with_uses": True, "keep_logits": True}
        gradients(fused_joiner.operator, traffic, **plan)(to_cuda(ones), 4)
        count("pruned again")
        return counts, Counter(traffic.operators)


def test_a_pruned_step_launches_few_kernels():
    counts, operators = launches_of_a_pruned_step()
    assert counts["simple"] <= 10, (counts, operators)
    assert counts["ranges"] <= 2, (counts, operators)
    assert counts["simple again"] <= 14, (counts, operators)
    assert counts["pruned again"] <= 42, (counts, operators)


def launches_of_a_fused_step(case, *, is_coarse):
    """Returns the launches of forward and backward, and torch's operators among them."""
    with pretend_cuda() as traffic:
        case.shape.to(CUDA)
        there = [to_cuda(tensor) for tensor in (*case.inputs, case.targets)]
        fused_joiner_loss(*there, *case.shape.lengths, 0, shape=case.shape)
        plan = {"keep_logits": is_coarse, "with_uses": True, "is_coarse": is_coarse}
        run = gradients(fused_joiner.operator, traffic, **plan)
        ones = to_cuda(torch.ones(len(case.targets)))
        traffic.operators.clear()
        before = traffic.num_launches
        run(ones, 4)
        return traffic.num_launches - before, Counter(traffic.operators)


@pytest.fixture
def case_of(monkeypatch):
    """Makes a small case with as many tiles as a batch of 726,474 cells has on an H100."""

    def make(scale):
        frames = [40 - index % 2 for index in range(8)]
        case = Case(frames, range(4, 12), scale=scale, vocab_size=50, width=52)
        share = case.shape.num_cells / 726_474 * (2 * 52 + 50) / (2 * 512 + 500)
        for name in ("TILE_BYTES", "TILE_BYTES_BESIDE_KEPT"):
            size = getattr(joint_tiles, name)["cuda"]
            monkeypatch.setitem(getattr(joint_tiles, name), "cuda", int(size * share))
        monkeypatch.setattr(joint_tiles, "KEPT_LOGITS_BYTES", {})
        return case

    return make


@pytest.mark.usefixtures("coarse_pass")
@pytest.mark.parametrize(("scale", "limit"), [(1.0, 160), (12.0, 125)], ids=["initial", "peaky"])
def test_a_coarse_pass_launches_few_kernels(case_of, scale, limit):
    """With torch's operators for the numbers of each row, it launched 415 and 451.

    More than half of the cells of this initial lattice matter, so backward has seven tiles.
    """
    count, operators = launches_of_a_fused_step(case_of(scale), is_coarse=True)
    assert count <= limit, operators
    for name in operators:  # several kernels each
        assert not any(part in name for part in ("index", "segment", "repeat")), operators


@pytest.mark.parametrize(("scale", "limit"), [(1.0, 135), (12.0, 80)], ids=["initial", "peaky"])
def test_a_step_in_full_precision_launches_few_kernels(case_of, scale, limit):
    count, operators = launches_of_a_fused_step(case_of(scale), is_coarse=False)
    assert count <= limit, operators


def test_every_kind_of_launch_is_counted():
    host = torch.arange(6.0)
    with pretend_cuda() as traffic:
        there, boundary = to_cuda(host), torch.tensor([[0, 0, 1, 2]])
        posteriors = there[:2].view(1, 1, 2), there[2:].view(1, 2, 2)
        for run, expected in (
            (lambda: there.view(2, 3)[1], 0),
            (lambda: torch.empty_like(there), 0),
            (lambda: there + 1, 1),
            (lambda: there.zero_(), 1),
            (lambda: there[::2].contiguous(), 1),
            (lambda: host.to("cuda:0"), 1),
            (lambda: there.cpu(), 1),
            (lambda: torch.zeros(3, device="cuda:0"), 1),
            (lambda: greedy_ranges(*posteriors, to_cuda(boundary), 1, 1) + 1, 2),
        ):
            before = traffic.num_launches
            run()
            assert traffic.num_launches - before == expected
