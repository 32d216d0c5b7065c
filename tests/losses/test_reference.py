# SPDX-License-Identifier: Apache-2.0
"""The oracle itself: two independent forms agree, and agree with published numbers."""

from math import comb

import pytest
import torch

from transducer_toolkit.losses.reference import (
    brute_force_loss,
    lattice_paths,
    recursion_loss,
    reference_loss,
)
from transducer_toolkit.ops.topology import TOPOLOGIES


@pytest.mark.parametrize("num_frames", [1, 2, 5])
@pytest.mark.parametrize("num_targets", [0, 1, 3])
def test_number_of_paths(num_frames, num_targets):
    def count(topology):
        return len(list(lattice_paths(num_frames, num_targets, topology)))

    assert count("regular") == comb(num_frames - 1 + num_targets, num_targets)
    assert count("modified") == comb(num_frames, num_targets)
    assert count("constrained") == comb(num_frames, num_targets)
    assert count("one_sym_per_frame") == comb(num_frames - 1, num_targets)


@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize("delay_penalty", [0.0, 0.4])
def test_recursion_equals_enumeration(topology, delay_penalty):
    for num_frames, num_targets in [(1, 0), (1, 1), (4, 0), (4, 3), (3, 3), (2, 3), (6, 2)]:
        logits = torch.randn(num_frames, num_targets + 1, 5, dtype=torch.float64)
        logits.requires_grad_()
        targets = torch.randint(1, 5, (num_targets,))
        results = []
        for loss_of in (brute_force_loss, recursion_loss):
            loss = loss_of(logits.log_softmax(-1), targets, 0, topology, delay_penalty)
            grad = torch.zeros_like(logits)
            if loss.requires_grad and torch.isfinite(loss):
                (grad,) = torch.autograd.grad(loss, logits)
            results.append((loss.detach(), grad))
        torch.testing.assert_close(results[0], results[1], rtol=0, atol=1e-12)


def test_infeasible_is_infinite():
    one = torch.tensor([1])
    logits = torch.zeros(1, 1, 2, 3)
    for topology, expected in (("one_sym_per_frame", True), ("modified", False)):
        loss = reference_loss(logits, torch.tensor([[1]]), one, one, 0, topology=topology)
        assert torch.isinf(loss) == expected


def test_published_constants():
    # warp-transducer's example; the value is repeated by several projects.
    logits = torch.tensor(
        [
            [[0.1, 0.6, 0.1, 0.1, 0.1], [0.1, 0.1, 0.6, 0.1, 0.1], [0.1, 0.1, 0.2, 0.8, 0.1]],
            [[0.1, 0.6, 0.1, 0.1, 0.1], [0.1, 0.1, 0.2, 0.1, 0.1], [0.7, 0.1, 0.2, 0.1, 0.1]],
        ],
        dtype=torch.float64,
    )
    targets = torch.tensor([[1, 2]])
    two = torch.tensor([2])
    loss = reference_loss(logits[None], targets, two, two, 0)
    assert loss.item() == pytest.approx(4.495666, abs=1e-6)
    first = reference_loss(logits[None, :1], targets, torch.tensor([1]), two, 0)
    assert first.item() == pytest.approx(4.274244594423859, abs=1e-12)
