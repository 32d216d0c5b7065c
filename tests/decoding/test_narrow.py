# SPDX-License-Identifier: Apache-2.0
"""Three log-probabilities a cell give the alignments and posteriors of all logits."""

import pytest
import torch

from transducer_toolkit.decoding import (
    TOPOLOGIES,
    align,
    lattice_posteriors,
    narrow_lattice,
)
from transducer_toolkit.modules import Joiner
from transducer_toolkit.ops.lattice import LatticeShape


@pytest.mark.parametrize("max_logits", [1, 150, 10**6])
@pytest.mark.parametrize(
    ("num_frames", "num_targets", "vocab_size", "blank"),
    [(9, 4, 7, 0), (9, 4, 7, 6), (1, 0, 3, 0), (5, 0, 3, 1), (6, 3, 2, 1), (6, 2, 2, 0)],
)
def test_alignments_and_posteriors_are_those_of_all_logits(
    num_frames, num_targets, vocab_size, blank, max_logits, monkeypatch
):
    monkeypatch.setitem(narrow_lattice.__globals__, "MAX_LOGITS", max_logits)
    torch.manual_seed(0)
    joiner = Joiner(encoder_dim=4, predictor_dim=3, joiner_dim=8, vocab_size=vocab_size).eval()
    encoder_out, predictor_out = torch.randn(1, num_frames, 4), torch.randn(1, num_targets + 1, 3)
    symbols = torch.tensor([x for x in range(vocab_size) if x != blank])
    targets = symbols[torch.randint(len(symbols), (1, num_targets))]
    shape = LatticeShape.from_lengths([num_frames], [num_targets])
    with torch.no_grad():
        logits = 3 * joiner(encoder_out, predictor_out, shape)
        lattice = narrow_lattice(
            lambda *arguments: 3 * joiner(*arguments), encoder_out, predictor_out, targets, blank,
            vocab_size=vocab_size,
        )  # fmt: skip
    assert lattice.logits.shape == (shape.num_cells, 3)
    for topology in TOPOLOGIES:
        expected = align(logits, targets, shape, blank, topology=topology)[0]
        found = align(*lattice.arguments(), topology=topology)[0]
        assert found.frames == expected.frames
        of_all = lattice_posteriors(logits, targets, shape, blank, topology=topology)
        of_three = lattice_posteriors(*lattice.arguments(), topology=topology)
        for name in ("log_likelihood", "occupancy", "labels"):
            torch.testing.assert_close(getattr(of_three, name), getattr(of_all, name))


def test_scores_that_are_not_finite_stay_visible():
    encoder_out, predictor_out = torch.zeros(1, 3, 1), torch.zeros(1, 2, 1)
    for bad in (float("nan"), float("inf")):

        def joiner(frames, columns, shape, bad=bad):
            logits = torch.zeros(shape.num_cells, 4)
            logits[0, 3] = bad
            return logits

        lattice = narrow_lattice(
            joiner, encoder_out, predictor_out, torch.tensor([[2]]), 0, vocab_size=4
        )
        assert not lattice.logits[0].isfinite().any() and lattice.logits[1:].isfinite().all()
