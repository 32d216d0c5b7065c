# SPDX-License-Identifier: Apache-2.0
import math

import pytest
import torch

from transducer_toolkit import LatticeShape
from transducer_toolkit.decoding import (
    TOPOLOGIES,
    align,
    best_path,
    lattice_posteriors,
    lattice_scores,
)
from transducer_toolkit.losses.reference import lattice_paths


def all_paths(blank, label, topology="regular"):
    """Every path as (frames of the labels, log-probability)."""
    if TOPOLOGIES[topology].label_takes_blank:
        label = label + blank[:, 1:]
    scores = {"blank": blank, "label": label}
    for path in lattice_paths(*label.shape, topology):
        frames = [t for kind, t, _ in path if kind == "label"]
        yield frames, sum(float(scores[kind][t, u]) for kind, t, u in path)


def random_scores(num_frames, num_targets, seed):
    generator = torch.Generator().manual_seed(seed)
    blank = torch.randn(num_frames, num_targets + 1, generator=generator, dtype=torch.float64)
    label = torch.randn(num_frames, num_targets, generator=generator, dtype=torch.float64)
    return blank, label


@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize(
    ("num_frames", "num_targets"), [(1, 0), (1, 1), (1, 3), (4, 0), (3, 3), (5, 3), (6, 5), (3, 5)]
)
@pytest.mark.parametrize("seed", range(5))
def test_best_path_equals_brute_force(num_frames, num_targets, topology, seed):
    blank, label = random_scores(num_frames, num_targets, seed)
    paths = list(all_paths(blank, label, topology))
    if not paths:
        with pytest.raises(ValueError, match="expected a path with a finite log-probability"):
            best_path(blank, label, topology=topology)
        return
    frames, log_prob = max(paths, key=lambda path: path[1])
    alignment = best_path(blank, label, topology=topology)
    assert alignment.frames == frames
    assert alignment.log_prob == pytest.approx(log_prob, abs=1e-12)


def test_best_path_goes_round_forbidden_cells():
    blank, label = torch.zeros(3, 2), torch.zeros(3, 1)
    label[0] = label[2] = -math.inf
    assert best_path(blank, label).frames == [1]
    label[1] = -math.inf
    with pytest.raises(ValueError, match="expected a path with a finite log-probability"):
        best_path(blank, label)
    with pytest.raises(ValueError, match="blank_log_probs: expected log-probabilities, got NaN"):
        best_path(blank * math.nan, label * 0)


@pytest.mark.parametrize(
    ("topology", "expected"),
    [
        ("regular", [2, 2]),
        ("modified", [1, 2]),
        ("constrained", [1, 2]),
        ("one_sym_per_frame", [0, 1]),
    ],
)
def test_of_equal_paths_the_later_labels_are_taken(topology, expected):
    assert best_path(torch.zeros(3, 3), torch.zeros(3, 2), topology=topology).frames == expected


def test_best_path_names_an_unknown_topology():
    with pytest.raises(ValueError, match=r"topology: expected one of .*regular.*, got 'ctc'"):
        best_path(torch.zeros(3, 2), torch.zeros(3, 1), topology="ctc")


def test_best_path_names_bad_shapes():
    with pytest.raises(ValueError, match=r"blank_log_probs: expected shape \(T, U \+ 1\)"):
        best_path(torch.zeros(3), torch.zeros(3, 1))
    with pytest.raises(ValueError, match=r"label_log_probs: expected shape \(3, 1\), got \(3, 2\)"):
        best_path(torch.zeros(3, 2), torch.zeros(3, 2))


@pytest.fixture
def batch():
    torch.manual_seed(0)
    shape = LatticeShape.from_lengths([4, 3, 2], [2, 0, 3])
    targets = torch.tensor([[1, 4, -1], [-1, 10**8, -1], [2, 2, 3]])
    return torch.randn(shape.num_cells, 5, dtype=torch.float64), targets, shape


@pytest.mark.parametrize("topology", ["regular", "modified", "constrained"])
def test_align_equals_brute_force_on_each_utterance(batch, topology):
    logits, targets, shape = batch
    if topology != "regular":  # a frame for each label
        shape = LatticeShape.from_lengths([4, 3, 3], [2, 0, 3])
        logits = torch.randn(shape.num_cells, 5, dtype=torch.float64)
    padded = shape.unpack(logits.log_softmax(-1))
    for row, alignment in enumerate(align(logits, targets, shape, blank=0, topology=topology)):
        num_frames, num_targets = int(shape.logit_lengths[row]), int(shape.target_lengths[row])
        scores = padded[row, :num_frames, : num_targets + 1]
        label = (
            torch.stack([scores[:, u, targets[row, u]] for u in range(num_targets)], dim=1)
            if num_targets
            else scores[:, :0, 0]
        )
        paths = all_paths(scores[..., 0], label, topology)
        frames, log_prob = max(paths, key=lambda path: path[1])
        assert alignment.frames == frames
        assert alignment.log_prob == pytest.approx(log_prob, abs=1e-12)


def test_scores_of_padding_are_minus_infinity(batch):
    logits, targets, shape = batch
    blank, label = lattice_scores(logits, targets, shape, blank=0)
    assert torch.equal(blank.isfinite(), shape.unpack(torch.ones(shape.num_cells)).bool())
    assert label.isfinite().sum() == (shape.logit_lengths * shape.target_lengths).sum()


def test_what_does_not_fit_is_named():
    shape = LatticeShape.from_lengths([3, 2], [2, 1])
    logits, targets = torch.randn(13, 5), torch.tensor([[1, 4], [2, -1]])
    right = {"logits": logits, "targets": targets, "shape": shape, "blank": 0}
    for changes, error, message in (
        ({"logits": logits[1:]}, ValueError, r"logits: expected shape \(13, V\), .* got \(12, 5\)"),
        ({"logits": logits.long()}, TypeError, "logits: expected dtype"),
        ({"logits": logits.to("meta")}, ValueError, "logits: expected a tensor with data"),
        ({"targets": targets[:, :1]}, ValueError, r"targets: expected shape \(2, U\) with U >= 2"),
        ({"targets": targets.float()}, TypeError, "targets: expected dtype int32, int64"),
        ({"targets": targets + 1}, ValueError, r"targets\[0, 1\] .* a label in \[0, 5\), got 5"),
        ({"shape": None}, TypeError, "shape: expected a LatticeShape, got NoneType"),
        ({"blank": 5}, ValueError, "blank: expected 0 <= blank < 5"),
        ({"blank": 1.0}, TypeError, "blank: expected an int, got float"),
    ):
        for function in (align, lattice_scores, lattice_posteriors):
            with pytest.raises(error, match=message):
                function(**right | changes)
    logits[12] = math.nan
    with pytest.raises(
        ValueError, match="utterance 1: blank_log_probs: expected log-probabilities, got NaN"
    ):
        align(**right)
    with pytest.raises(TypeError, match=r"label_log_probs: expected a torch.Tensor, got list"):
        best_path(torch.zeros(1, 2), [[0.0]])
    with pytest.raises(ValueError, match="label_log_probs: expected a tensor with data"):
        best_path(torch.zeros(1, 2), torch.zeros(1, 1, device="meta"))
