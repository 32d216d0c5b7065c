# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from transducer_toolkit import LatticeShape
from transducer_toolkit.decoding import (
    TOPOLOGIES,
    lattice_occupancy,
    lattice_posteriors,
    lattice_scores,
)
from transducer_toolkit.losses.reference import lattice_paths


@pytest.fixture
def batch():
    torch.manual_seed(0)
    shape = LatticeShape.from_lengths([4, 3, 4, 1], [2, 0, 3, 0])
    targets = torch.tensor([[1, 4, -1], [-1, 10**8, -1], [2, 2, 3], [-1, -1, -1]])
    return torch.randn(shape.num_cells, 5, dtype=torch.float64), targets, shape


def brute_force(batch, topology):
    """Log-likelihoods, occupancy and posteriors of the labels from a list of all paths."""
    logits, targets, shape = batch
    blank, label = lattice_scores(logits, targets, shape, blank=0)
    log_likelihood = torch.zeros(len(targets), dtype=torch.float64)
    occupancy, labels = torch.zeros_like(blank), torch.zeros_like(label)
    for row, (num_frames, num_targets) in enumerate(
        zip(shape.logit_lengths.tolist(), shape.target_lengths.tolist(), strict=True)
    ):
        paths = []
        for arcs in lattice_paths(num_frames, num_targets, topology):
            uses = []  # (kind, t, u) of each score that the path multiplies
            for kind, t, u in arcs:
                uses.append((kind, t, u))
                if TOPOLOGIES[topology].label_takes_blank and kind == "label":
                    uses.append(("blank", t, u + 1))
            scores = {"blank": blank[row], "label": label[row]}
            paths.append((uses, sum(scores[kind][t, u] for kind, t, u in uses)))
        log_likelihood[row] = torch.stack([score for _, score in paths]).logsumexp(0)
        for uses, score in paths:
            posterior = (score - log_likelihood[row]).exp()
            for kind, t, u in uses:
                occupancy[row, t, u] += posterior
                if kind == "label":
                    labels[row, t, u] += posterior
    return log_likelihood, occupancy, labels


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_posteriors_equal_brute_force(batch, topology):
    logits, targets, shape = batch
    found = lattice_posteriors(logits, targets, shape, blank=0, topology=topology)
    log_likelihood, occupancy, labels = brute_force(batch, topology)
    torch.testing.assert_close(found.log_likelihood, log_likelihood)
    torch.testing.assert_close(found.occupancy, occupancy)
    torch.testing.assert_close(found.labels, labels)
    torch.testing.assert_close(
        lattice_occupancy(logits, targets, shape, blank=0, topology=topology), occupancy
    )
    # The sums that the documentation promises.
    row = TOPOLOGIES[topology]
    has_both = row.labels_share_frames or row.label_takes_blank
    arcs = shape.logit_lengths + (shape.target_lengths if has_both else 0)
    torch.testing.assert_close(found.occupancy.sum((1, 2)), arcs.double())
    real = torch.arange(shape.max_targets) < shape.target_lengths[:, None]
    torch.testing.assert_close(found.labels.sum(1), real.double())
    frames = torch.arange(shape.max_frames, dtype=torch.float64)
    torch.testing.assert_close(
        found.expected_frames(), (labels * frames[:, None]).sum(1), rtol=0, atol=1e-12
    )


def test_expected_frames_of_a_certain_alignment():
    shape = LatticeShape.from_lengths([3], [1])
    logits = torch.full((3, 2, 2), -50.0)
    logits[:, :, 0] = 50.0
    logits[2, 0] = torch.tensor([-50.0, 50.0])  # the label is certain on frame 2
    found = lattice_posteriors(logits.view(6, 2), torch.tensor([[1]]), shape, blank=0)
    assert found.expected_frames().tolist() == [[2.0]]


@pytest.mark.parametrize("topology", ["regular", "constrained"])
def test_posteriors_work_in_inference_mode_and_leave_their_input_alone(batch, topology):
    logits, targets, shape = batch
    before = logits.clone()
    with torch.inference_mode():
        inside = lattice_posteriors(logits * 1, targets, shape, blank=0, topology=topology)
    outside = lattice_posteriors(logits, targets, shape, blank=0, topology=topology)
    torch.testing.assert_close(inside.occupancy, outside.occupancy)
    torch.testing.assert_close(inside.labels, outside.labels)
    assert torch.equal(logits, before) and not logits.requires_grad


def test_what_has_no_path_is_named(batch):
    logits, targets, shape = batch
    with pytest.raises(ValueError, match="topology: expected one of"):
        lattice_posteriors(logits, targets, shape, blank=0, topology="ctc")
    shape = LatticeShape.from_lengths([2], [3])
    with pytest.raises(ValueError, match="utterance 0: topology 'modified' needs at least"):
        lattice_posteriors(torch.randn(8, 5), targets[2:3], shape, blank=0, topology="modified")
