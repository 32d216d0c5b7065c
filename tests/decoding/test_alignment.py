# SPDX-License-Identifier: Apache-2.0
import itertools
import math

import pytest
import torch

from transducer_toolkit import LatticeShape
from transducer_toolkit.decoding import align, best_path, lattice_occupancy, lattice_scores


def all_paths(blank, label):
    """Every path as (frames of the labels, log-probability)."""
    num_frames, num_targets = label.shape
    for frames in itertools.combinations_with_replacement(range(num_frames), num_targets):
        score = sum(float(label[t, u]) for u, t in enumerate(frames))
        # Frame t ends with the blank of column u, u being the labels emitted up to it.
        for t in range(num_frames):
            score += float(blank[t, sum(frame <= t for frame in frames)])
        yield list(frames), score


def random_scores(num_frames, num_targets, seed):
    generator = torch.Generator().manual_seed(seed)
    blank = torch.randn(num_frames, num_targets + 1, generator=generator, dtype=torch.float64)
    label = torch.randn(num_frames, num_targets, generator=generator, dtype=torch.float64)
    return blank, label


@pytest.mark.parametrize(("num_frames", "num_targets"), [(1, 0), (1, 3), (4, 0), (5, 3), (3, 5)])
@pytest.mark.parametrize("seed", range(5))
def test_best_path_equals_brute_force(num_frames, num_targets, seed):
    blank, label = random_scores(num_frames, num_targets, seed)
    frames, log_prob = max(all_paths(blank, label), key=lambda path: path[1])
    alignment = best_path(blank, label)
    assert alignment.frames == frames
    assert alignment.log_prob == pytest.approx(log_prob, abs=1e-12)


def test_best_path_goes_round_forbidden_cells():
    blank, label = torch.zeros(3, 2), torch.zeros(3, 1)
    label[0] = label[2] = -math.inf
    assert best_path(blank, label).frames == [1]
    label[1] = -math.inf
    with pytest.raises(ValueError, match="leave no path"):
        best_path(blank, label)
    with pytest.raises(ValueError, match="the scores hold NaN"):
        best_path(blank * math.nan, label * 0)


def test_best_path_names_bad_shapes():
    with pytest.raises(ValueError, match=r"blank_log_probs must have shape \(T, U \+ 1\)"):
        best_path(torch.zeros(3), torch.zeros(3, 1))
    with pytest.raises(ValueError, match=r"label_log_probs must have shape \(3, 1\), got \(3, 2\)"):
        best_path(torch.zeros(3, 2), torch.zeros(3, 2))


@pytest.fixture
def batch():
    torch.manual_seed(0)
    shape = LatticeShape.from_lengths([4, 3, 2], [2, 0, 3])
    targets = torch.tensor([[1, 4, -1], [-1, 10**8, -1], [2, 2, 3]])
    return torch.randn(shape.num_cells, 5, dtype=torch.float64), targets, shape


def test_align_equals_brute_force_on_each_utterance(batch):
    logits, targets, shape = batch
    padded = shape.unpack(logits.log_softmax(-1))
    for row, alignment in enumerate(align(logits, targets, shape, blank=0)):
        num_frames, num_targets = int(shape.logit_lengths[row]), int(shape.target_lengths[row])
        scores = padded[row, :num_frames, : num_targets + 1]
        label = (
            torch.stack([scores[:, u, targets[row, u]] for u in range(num_targets)], dim=1)
            if num_targets
            else scores[:, :0, 0]
        )
        frames, log_prob = max(all_paths(scores[..., 0], label), key=lambda path: path[1])
        assert alignment.frames == frames
        assert alignment.log_prob == pytest.approx(log_prob, abs=1e-12)


def test_occupancy_equals_brute_force(batch):
    logits, targets, shape = batch
    occupancy = lattice_occupancy(logits, targets, shape, blank=0)
    blank, label = lattice_scores(logits, targets, shape, blank=0)
    expected = torch.zeros_like(occupancy)
    for row, (num_frames, num_targets) in enumerate(
        zip(shape.logit_lengths.tolist(), shape.target_lengths.tolist(), strict=True)
    ):
        paths = list(
            all_paths(
                blank[row, :num_frames, : num_targets + 1], label[row, :num_frames, :num_targets]
            )
        )
        total = math.log(sum(math.exp(score) for _, score in paths))
        for frames, score in paths:
            cells = [(t, u) for u, t in enumerate(frames)]
            cells += [(t, sum(frame <= t for frame in frames)) for t in range(num_frames)]
            for t, u in cells:
                expected[row, t, u] += math.exp(score - total)
    torch.testing.assert_close(occupancy, expected)
    lengths = shape.logit_lengths + shape.target_lengths
    torch.testing.assert_close(occupancy.sum((1, 2)), lengths.double())


def test_occupancy_works_in_inference_mode_and_leaves_its_input_alone(batch):
    logits, targets, shape = batch
    before = logits.clone()
    with torch.inference_mode():
        inside = lattice_occupancy(logits * 1, targets, shape, blank=0)
    torch.testing.assert_close(inside, lattice_occupancy(logits, targets, shape, blank=0))
    assert torch.equal(logits, before) and not logits.requires_grad
