# SPDX-License-Identifier: Apache-2.0
"""Scores from 8-bit integers: stages against float32, outliers, values that are no number."""

import pytest
import torch
from torch.nn.functional import linear

from transducer_toolkit import LatticeShape
from transducer_toolkit.ops import quantized, stages
from transducer_toolkit.ops.joint_tiles import JointWeights
from transducer_toolkit.ops.lattice import CellScores, LatticeBatch, Lengths, RowTile
from transducer_toolkit.ops.native import ACTIVATIONS
from transducer_toolkit.ops.options import FusedOptions
from transducer_toolkit.ops.stages import Joint


def batch_of(shape, vocab_size):
    targets = torch.randint(1, vocab_size, (shape.num_utterances, shape.max_targets))
    options = {"max_frames": shape.max_frames, "padded": False, "num_rows": shape.num_cells}
    return LatticeBatch(Lengths(*shape.lengths), targets, **options)


def hidden_of(joint, batch, tile):
    out = torch.empty(tile.size, joint.enc.size(-1))
    stages.join_forward(joint, batch, tile, out)
    return out


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("width", [1, 15, 16, 31, 64, 513, 4096])
def test_rows_are_rounded_to_their_own_scale(activation, width):
    shape = LatticeShape.from_lengths([5, 3], [2, 4])
    batch, tile = batch_of(shape, 9), RowTile(2, 20)
    joint = Joint(3 * torch.randn(2, 5, width), torch.randn(2, 5, width), activation)
    joint.enc[1, 1] *= 1000.0  # one large frame
    joint.enc[0, 1, width // 2] = torch.nan
    joint.enc[0, 2, 0] = torch.inf
    hidden, scales = torch.empty(20, width, dtype=torch.int8), torch.empty(20)
    stages.join_quantized(joint, batch, tile, hidden, scales)
    expected = hidden_of(joint, batch, tile)
    is_finite = expected.isfinite().all(1)
    assert 0 < int((~is_finite).sum()) < 20
    assert torch.equal(scales.isnan(), ~is_finite)
    largest = expected[is_finite].abs().amax(1)
    slack = 3e-4 if activation == "tanh" else 0.0
    torch.testing.assert_close(scales[is_finite], largest / 127, rtol=1.3e-6, atol=slack / 127)
    error = (hidden[is_finite] * scales[is_finite, None] - expected[is_finite]).abs()
    assert (error <= 0.5001 * scales[is_finite, None] + slack).all()


@pytest.mark.parametrize("vocab_size", [2, 17, 500, 517])
@pytest.mark.parametrize("bias", [False, True])
def test_scores(vocab_size, bias):
    shape = LatticeShape.from_lengths([30, 40], [8, 5])
    batch, options = batch_of(shape, vocab_size), FusedOptions(0)
    joint = Joint(torch.randn(2, 40, 64), torch.randn(2, 9, 64), "tanh")
    weight = torch.randn(vocab_size, 64) / 8
    weight[1] *= 50  # does not make the other rows less accurate
    offset = torch.randn(vocab_size) if bias else None
    actual, expected = (CellScores.zeros(batch, joint.enc.device) for _ in range(2))
    quantized.Scorer(joint, JointWeights(weight, offset), batch, options, actual, 100)()
    tile = batch.all_rows()
    logits = linear(hidden_of(joint, batch, tile), weight, offset)
    stages.cell_scores(logits, batch, tile, options, expected)
    for name in ("normalizer", "blank", "label"):
        mine, wanted = getattr(actual, name), getattr(expected, name)
        assert torch.equal(mine.isinf(), wanted.isinf())
        finite = wanted.isfinite()
        difference = (mine[finite] - wanted[finite]).abs()
        assert difference.max() < 1.0 and difference.median() < 0.2
    weight[1] /= 50
    quantized.Scorer(joint, JointWeights(weight, offset), batch, options, actual)()
    logits = linear(hidden_of(joint, batch, tile), weight, offset)
    stages.cell_scores(logits, batch, tile, options, expected)
    for name in ("normalizer", "blank", "label"):
        mine, wanted = getattr(actual, name), getattr(expected, name)
        finite = wanted.isfinite()
        assert (mine[finite] - wanted[finite]).abs().max() < 0.03


@pytest.mark.parametrize("far", [60.0, 1000.0, -1000.0])
def test_scores_of_logits_far_from_the_first_ones(far):
    """Their exponentials may overflow or vanish."""
    shape = LatticeShape.from_lengths([3, 4], [3, 5])
    batch, options = batch_of(shape, 40), FusedOptions(0)
    joint = Joint(torch.randn(2, 4, 64), torch.randn(2, 6, 64), "tanh")
    weight, offset = torch.randn(40, 64) / 8, torch.zeros(40)
    offset[20:] = far
    actual, expected = (CellScores.zeros(batch, joint.enc.device) for _ in range(2))
    quantized.Scorer(joint, JointWeights(weight, offset), batch, options, actual)()
    logits = linear(hidden_of(joint, batch, batch.all_rows()), weight, offset)
    stages.cell_scores(logits, batch, batch.all_rows(), options, expected)
    for name in ("normalizer", "blank", "label"):
        mine, wanted = getattr(actual, name), getattr(expected, name)
        torch.testing.assert_close(mine, wanted, rtol=0, atol=0.03)


def test_what_is_no_number_stays_none():
    weight = torch.randn(5, 8)
    weight[1, 2], weight[2, 3], weight[3] = torch.nan, -torch.inf, 0.0
    made = quantized._quantize(weight)
    assert made.scales.isnan().tolist() == [False, True, True, False, False]
    assert made.scales[3] == 0 and made.rows[:, 3].eq(0).all()
    error = made.rows.t()[4] * made.scales[4] - weight[4]
    assert error.abs().max() <= 0.5001 * made.scales[4]
