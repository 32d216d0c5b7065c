# SPDX-License-Identifier: Apache-2.0
"""The stages of the coarse pass on every backend, against torch."""

import pytest
import torch

from tests.backends import check_close, in_every_order, of
from tests.losses.coarse_reference import row_weights
from tests.stage_cases import make_case
from transducer_toolkit.ops import stages
from transducer_toolkit.ops.durations import PathSums, path_sums
from transducer_toolkit.ops.lattice import CellScores, RowTile
from transducer_toolkit.ops.options import LossOptions
from transducer_toolkit.ops.topology import TOPOLOGIES

backends = pytest.mark.parametrize("name", ["cpu", "emulated", "cuda"])
FRAMES, SYMBOLS = (60, 1, 26, 33), (70, 0, 9, 12)  # the first has several runs
OPTIONS = {
    "regular": LossOptions(0),
    "clamp": LossOptions(0, clamp=0.02),
    "hat": LossOptions(0, normalization="hat"),
    "tdt": LossOptions(0, topology="tdt-0-1-2", clamp=0.3),
    "multi-blank": LossOptions(0, topology="multi_blank-2-4", sigma=0.05),
}
SELECTION = stages.RowWeights(False, 1.5, 0.01, 0.0, 10.0, 1e-2)
BACKWARD = stages.RowWeights(True, 1.0, 0.0, 2.0**-8, 2.0, 1e-2)


def random_scores(num_rows, options, scale=2.0):
    """Scores of a row each, which are those of a softmax, and of one of durations."""
    durations = options.arcs.num_durations
    logits = scale * torch.randn(num_rows, 6, dtype=torch.float64)
    scores = torch.log_softmax(logits, 1)
    extra = scores[:, 2 : 2 + options.arcs.num_big_blanks].contiguous()
    if durations:
        extra = torch.log_softmax(torch.randn(num_rows, durations, dtype=torch.float64), 1)
    blank, label = scores[:, 0].contiguous(), scores[:, 1].contiguous()
    return CellScores(blank, label, blank, extra if options.num_extra else None)


def copied(scores, device):
    parts = (scores.blank, scores.label, scores.normalizer, scores.extra)
    return CellScores(*(None if part is None else part.to(device, copy=True) for part in parts))


@backends
@pytest.mark.parametrize("kind", OPTIONS)
@pytest.mark.parametrize("weights", [SELECTION, BACKWARD], ids=["selection", "backward"])
def test_row_weights(name, kind, weights):
    backend, options = of(name), OPTIONS[kind]
    case = make_case("packed", FRAMES, SYMBOLS)
    batch, there = case.batch(), case.batch(backend.device)
    scores = random_scores(batch.num_rows, options)
    sums = path_sums(scores, batch, options, with_uses=True)
    sums.losses[3] = torch.inf
    error = torch.tensor([0.3, 0.0, 0.02, 0.1], dtype=torch.float64)
    places = torch.where(torch.rand(batch.num_rows) < 0.3, torch.arange(batch.num_rows), -1)
    expected = row_weights(batch, scores, sums, options, weights, error, places >= 0)
    on = copied(scores, backend.device)
    inputs = [tensor.to(backend.device) for tensor in (*sums, error, places)]

    def run():
        losses, *uses, error, places = inputs
        extra = {"loss": losses, "error": error, "places": places}
        return (stages.row_weights(on, tuple(uses), there, options, weights, **extra),)

    actual = in_every_order(backend, run)
    check_close(actual, [expected], 1e-12, ["weight"])
    assert expected.isnan().any() and (expected == 0).any() and (expected > 0).any()


@backends
def test_row_weights_without_losses_keep_utterances_apart(name):
    """A NaN in one utterance is not in another; invalid lengths are left alone."""
    backend = of(name)
    case = make_case("packed", FRAMES, SYMBOLS)
    batch = case.batch(backend.device)
    options = LossOptions(0)
    scores = random_scores(batch.num_rows, options)
    uses = [torch.rand(batch.num_rows, dtype=torch.float64) for _ in range(2)]
    uses[0][3] = torch.nan
    sums = PathSums(torch.zeros(4), *uses, torch.empty(batch.num_rows, 0, dtype=torch.float64))
    error, places = torch.full((4,), 0.1, dtype=torch.float64), torch.zeros(batch.num_rows).long()
    on = copied(scores, backend.device)
    inputs = [tensor.to(backend.device) for tensor in (*sums[1:], error, places)]

    def run():
        *uses, error, places = inputs
        extra = {"loss": None, "error": error, "places": places}
        return (stages.row_weights(on, tuple(uses), batch, options, BACKWARD, **extra),)

    (weight,) = in_every_order(backend, run)
    end = FRAMES[0] * (SYMBOLS[0] + 1)
    assert weight[:end].isnan().all() and weight[end:].isfinite().all()


@backends
@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize("layout", ["packed", "band"])
def test_a_lattice_does_not_read_the_uses_that_it_overwrites(name, topology, layout):
    backend, options = of(name), LossOptions(0, topology=topology)
    symbols = [min(pair) for pair in zip(FRAMES, SYMBOLS, strict=True)]
    batch = make_case(layout, FRAMES, symbols).batch(backend.device)
    first, second = (copied(random_scores(batch.num_rows, options), backend.device) for _ in "12")
    first.blank[5] = torch.nan
    second.label[-20:] = -torch.inf

    def run():
        before = path_sums(first, batch, options, with_uses=True)
        return tuple(path_sums(second, batch, options, with_uses=True, before=before))

    with backend.active():
        expected = path_sums(second, batch, options, with_uses=True)
    for mine, wanted in zip(in_every_order(backend, run), expected, strict=True):
        assert torch.equal(mine.nan_to_num(nan=7.0), wanted.cpu().nan_to_num(nan=7.0))


@backends
@pytest.mark.parametrize("kind", ["regular", "tdt"])
def test_replace_scores(name, kind):
    backend, options = of(name), OPTIONS[kind]
    case = make_case("packed", FRAMES, SYMBOLS)
    batch, there = case.batch(), case.batch(backend.device)
    coarse, fine = (random_scores(batch.num_rows, options) for _ in range(2))
    coarse.label[::7] = fine.label[::7] = -torch.inf  # no error
    last = batch.num_rows - 1
    fine.blank[last] = torch.nan
    rows = torch.arange(0, batch.num_rows, 3)
    rows = torch.cat([rows[rows != last], torch.tensor([last])])
    error = torch.tensor([0.0, 5.0, 0.0, 0.0], dtype=torch.float64)
    inputs = [tensor.to(backend.device) for tensor in (rows, error)]
    on_fine = copied(fine, backend.device)

    def run():
        scores, (there_rows, first_error) = copied(coarse, backend.device), inputs
        found = first_error.clone()
        places = torch.full((batch.num_rows,), -1, device=backend.device)
        tile = RowTile(0, rows.numel(), there_rows)
        stages.replace_scores(
            scores, on_fine, there, tile, first_place=10, places=places, error=found
        )
        extra = scores.blank.new_empty(0) if scores.extra is None else scores.extra
        return scores.blank, scores.label, extra, places, found

    blank, label, extra, places, found = in_every_order(backend, run)
    expected_places = torch.full((batch.num_rows,), -1)
    expected_places[rows] = 10 + torch.arange(rows.numel())
    assert torch.equal(places, expected_places)
    is_fine = expected_places >= 0
    for mine, new, old in ((blank, fine.blank, coarse.blank), (label, fine.label, coarse.label)):
        wanted = torch.where(is_fine, new, old)
        assert torch.equal(mine.nan_to_num(7.0), wanted.nan_to_num(7.0))
    of_label = (fine.label - coarse.label).abs().nan_to_num(0.0)  # of -inf and -inf
    of_row = torch.maximum((fine.blank - coarse.blank).abs(), of_label)
    if kind == "tdt":
        assert torch.equal(extra, torch.where(is_fine[:, None], fine.extra, coarse.extra))
        of_row += (fine.extra - coarse.extra).abs().amax(1)
    of_row = of_row.nan_to_num(torch.inf).masked_fill(~is_fine, 0.0)
    wanted = torch.maximum(error, batch.per_utterance(of_row, "max"))
    assert wanted[1] == 5 and wanted[3] > 1e300  # the NaN
    wanted[3] = torch.inf
    check_close([found], [wanted], 1e-12, ["error"])
