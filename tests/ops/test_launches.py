# SPDX-License-Identifier: Apache-2.0
"""How many kernels and copies a pruned training step launches: a GPU waits for a slow host."""

from collections import Counter

import torch

from tests.pretend_cuda import gradients, pretend_cuda, to_cuda
from transducer_toolkit import fused_joiner_loss, get_rnnt_prune_ranges, rnnt_loss_smoothed
from transducer_toolkit.ops import additive, fused_joiner
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
