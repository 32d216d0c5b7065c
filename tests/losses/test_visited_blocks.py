# SPDX-License-Identifier: Apache-2.0
"""Which blocks of cells the coarse pass visits, and what it loses by leaving out the others."""

import math
import random

import pytest
import torch

from tests.losses.coarse_case import BUDGET, Case
from tests.losses.test_cuda_precision import JOINT_NAMES, check_all
from transducer_toolkit import LatticeShape
from transducer_toolkit.ops import native, stages, visited_blocks
from transducer_toolkit.ops.lattice import CellScores, LatticeBatch, Lengths
from transducer_toolkit.ops.options import FusedOptions
from transducer_toolkit.ops.topology import TOPOLOGIES

pytestmark = pytest.mark.usefixtures("coarse_pass")
BLOCK = native.extension.BLOCK_FRAMES, native.extension.BLOCK_SYMBOLS
WITH_BLOCKS = [name for name, topology in TOPOLOGIES.items() if not topology.label_takes_blank]
TRAINED_FRAMES, TRAINED_SYMBOLS = [260, 150, 1, 40], [52, 40, 0, 0]


class Lattices:
    """A batch, and scores (rows,) of its blanks and labels that a test may change."""

    def __init__(self, frames, symbols, topology="regular", scale=1.0, blank_bias=0.0):
        self.shape = LatticeShape.from_lengths(frames, symbols)
        self.options = FusedOptions(0, topology=topology)
        self.batch = LatticeBatch(
            Lengths(*self.shape.lengths),
            torch.ones(len(frames), max(symbols), dtype=torch.int64),
            max_frames=max(frames),
            padded=False,
            num_rows=self.shape.num_cells,
        )
        logits = scale * torch.randn(self.shape.num_cells, 3, dtype=torch.float64)
        logits[:, 0] += blank_bias
        self.blank, self.label, _ = torch.log_softmax(logits, 1).unbind(1)
        self.blank, self.label = self.blank.contiguous(), self.label.contiguous()

    def grids(self, b):
        """Views (T_b, U_b + 1) of both scores of an utterance."""
        size = int(self.shape.logit_lengths[b]), int(self.shape.target_lengths[b]) + 1
        cells = slice(*self.shape.cell_offsets[b : b + 2].tolist())
        return self.blank[cells].view(size), self.label[cells].view(size)

    def add_path(self, b, choose, off_path=-20.0):
        """Makes one random path probable. Returns its cells."""
        blank, label = self.grids(b)
        num_frames, columns = blank.shape
        advances = TOPOLOGIES[self.options.topology].label_durations[0]
        spoken = sorted(choose.sample(range(num_frames - advances), columns - 1))
        on_path = math.log1p(-math.exp(off_path))  # probabilities of at most 1 together
        cells, t, u = [], 0, 0
        while t < num_frames:
            cells.append((t, u))
            if u < columns - 1 and spoken[u] == t:
                blank[t, u], label[t, u] = off_path, on_path
                t, u = t + advances, u + 1
            else:
                blank[t, u], label[t, u] = on_path, off_path
                t += 1
        return cells

    def visit(self, may_leave_out=None):
        """The result, the scores that it left, and the rows in the order of their visits."""
        scores = CellScores(*(torch.zeros_like(self.blank) for _ in range(3)))
        visited = []

        def score_rows(rows):
            visited.append(rows.clone())
            scores.blank[rows], scores.label[rows] = self.blank[rows], self.label[rows]

        if may_leave_out is None:
            may_leave_out = torch.ones(self.batch.num_utterances, dtype=torch.bool)
        result = visited_blocks.visit(self.batch, scores, self.options, score_rows, may_leave_out)
        return result, scores, torch.cat(visited)

    def losses(self, scores=None):
        scores = CellScores(self.blank, self.label, self.blank) if scores is None else scores
        return stages.lattice(scores, self.batch, self.options, with_uses=False)[0]


def random_lattices(seed):
    """Scores of any scale, masked and not, with and without a probable path, ragged."""
    torch.manual_seed(seed)
    choose = random.Random(seed)
    topology = choose.choice(WITH_BLOCKS)
    size = choose.randint(1, 4)
    symbols = [choose.choice([0, 0, 3, 7, 8, 20, 45]) for _ in range(size)]
    frames = [u + choose.choice([1, 2, 15, 17, 60, 130]) for u in symbols]
    scale = 10 ** choose.uniform(0, 2)
    lattices = Lattices(frames, symbols, topology, scale, choose.choice([0.0, 3.0, 10.0]))
    if choose.random() < 0.2:
        lattices.blank[torch.rand_like(lattices.blank) < 0.05] = -torch.inf
        lattices.label[torch.rand_like(lattices.blank) < 0.3] = -torch.inf
    for b in range(size):
        if choose.random() < 0.7:
            lattices.add_path(b, choose, choose.choice([-2.0, -8.0, -20.0, -torch.inf]))
        if choose.random() < 0.1:
            blank, label = lattices.grids(b)
            choose.choice([blank, label])[choose.randrange(len(blank))] = torch.nan
    return lattices


@pytest.mark.parametrize(
    ("bound", "narrow"), [(visited_blocks.LEFT_OUT, visited_blocks.NARROW), (0.5, 0.1)]
)
def test_the_certificate_holds_on_random_lattices(bound, narrow, monkeypatch):
    """The loss of all cells is at most that of the visited ones, and within what entered others."""
    monkeypatch.setattr(visited_blocks, "LEFT_OUT", bound)
    monkeypatch.setattr(visited_blocks, "NARROW", narrow)
    num_partly = num_cells = num_visited = 0
    for seed in range(400):
        lattices = random_lattices(seed)
        result, scores, rows = lattices.visit()
        assert rows.unique().numel() == rows.numel()  # none twice
        truth, losses = lattices.losses(), lattices.losses(scores)
        assert torch.equal(truth.isnan(), losses.isnan()), seed
        if result is None:
            assert rows.numel() == lattices.batch.num_rows
            torch.testing.assert_close(losses, truth, rtol=0, atol=0, equal_nan=True)
            continue
        torch.testing.assert_close(result.has_scores.nonzero().flatten(), rows.sort().values)
        assert scores.blank[~result.has_scores].eq(-torch.inf).all()
        is_partly = ~result.is_whole
        state = [part[is_partly] for part in (result.state.total, result.state.left_out)]
        total, left_out = state
        torch.testing.assert_close(-total, losses[is_partly], rtol=1e-12, atol=1e-12)
        assert (left_out - total <= math.log(bound)).all()
        lost = losses[is_partly] - truth[is_partly]
        at_most = (left_out - total).exp().log1p()
        assert (lost >= -1e-9).all() and (lost <= at_most + 1e-9).all(), seed
        assert visited_blocks.still_holds(result, lattices.batch, scores, lattices.options)
        num_partly += int(is_partly.sum())
        num_cells += lattices.batch.num_rows
        num_visited += rows.numel()
    assert num_partly > 100 and num_visited < 0.7 * num_cells


@pytest.mark.parametrize("topology", WITH_BLOCKS)
def test_visits_the_blocks_on_the_only_path(topology):
    lattices = Lattices([160], [63], topology)
    path = lattices.add_path(0, random.Random(1), off_path=-1e4)
    result, _, rows = lattices.visit()
    expected = {(t // BLOCK[0], u // BLOCK[1]) for t, u in path}
    assert {tuple(block) for block in result.state.has_scores[0].nonzero().tolist()} == expected
    columns = 64
    visited = {(row // columns // BLOCK[0], row % columns // BLOCK[1]) for row in rows.tolist()}
    assert visited == expected and rows.numel() == len(expected) * BLOCK[0] * BLOCK[1]


def test_a_block_is_visited_if_what_enters_it_matters():
    """One arc out of the path enters a block beside it, which leads nowhere else."""
    for log_probability, is_visited in ((-15.0, True), (-40.0, False)):
        lattices = Lattices([160], [63])
        blank, label = lattices.grids(0)
        path = lattices.add_path(0, random.Random(1), off_path=-1e4)
        t, u = next(
            cell for cell in path if cell[1] % BLOCK[1] == BLOCK[1] - 1 and blank[cell] > -1
        )
        label[t, u] = log_probability
        beside = t // BLOCK[0], u // BLOCK[1] + 1
        if beside in {(t // BLOCK[0], u // BLOCK[1]) for t, u in path}:
            continue
        result, _, _ = lattices.visit()
        assert bool(result.state.has_scores[0][beside]) == is_visited


def test_utterances_that_must_be_visited_as_a_whole():
    frames, symbols = [160, 160, 160, 160, 1, 160], [63, 63, 63, 63, 0, 63]
    lattices = Lattices(frames, symbols)
    for b in range(6):
        lattices.add_path(b, random.Random(b))
    blank, label = lattices.grids(1)
    blank[50] = torch.nan
    blank, label = lattices.grids(2)
    label[:, 20] = -torch.inf  # no path
    lattices.grids(5)[0][-1, -2] = torch.nan  # in a visited block, of an arc that leads nowhere
    is_whole = torch.tensor([False, True, True, True, True, True])
    may_leave_out = torch.tensor([True, True, True, False, True, True])
    result, _, rows = lattices.visit(may_leave_out)
    assert torch.equal(result.is_whole, is_whole)
    assert not result.state.has_scores[3].any()  # not in waves
    shares = result.has_scores.split((lattices.shape.cell_offsets.diff()).tolist())
    assert [bool(share.all()) for share in shares] == is_whole.tolist()
    assert shares[0].float().mean() < 0.7 and rows.unique().numel() == rows.numel()


def test_improbable_paths_are_given_up_soon():
    lattices = Lattices([320], [63])
    lattices.blank -= 20
    lattices.label -= 20
    calls = []
    stage = stages.visit_wave

    def visit_wave(*args):
        calls.append(args)
        return stage(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "visit_wave", visit_wave)
        result, _, _ = lattices.visit()
    assert result is None and len(calls) <= 3


def test_the_check_finds_what_other_scores_let_in():
    lattices = Lattices([160], [63])
    path = lattices.add_path(0, random.Random(1), off_path=-1e4)
    result, scores, _ = lattices.visit()
    args = result, lattices.batch, scores, lattices.options
    assert visited_blocks.still_holds(*args)
    t, u = next(cell for cell in path if cell[1] % BLOCK[1] == BLOCK[1] - 1)
    scores.label.view(160, 64)[t, u] = scores.blank.view(160, 64)[t, u] = -0.7
    assert not visited_blocks.still_holds(*args)


def test_the_number_of_threads_changes_nothing(monkeypatch):
    threads = torch.get_num_threads()
    lattices = Lattices([160, 90, 200], [63, 20, 40])
    for b in range(3):
        lattices.add_path(b, random.Random(b), off_path=-8.0)
    results = []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            result, _, rows = lattices.visit()
            results.append((rows, result.state.total, result.state.left_out))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(torch.equal(*pair) for pair in zip(result, results[0], strict=True))


# --- the loss ------------------------------------------------------------------------------------


class TrainedCase(Case):
    """A joiner that knows where each symbol is spoken, as in benchmarks/workloads.py."""

    def __init__(self, frames=TRAINED_FRAMES, symbols=TRAINED_SYMBOLS, *, gain=60.0, seed=0):
        torch.manual_seed(seed)
        choose = random.Random(seed)
        vocab_size = width = 128
        super().__init__(frames, symbols, vocab_size=vocab_size, width=width)
        self.targets.clamp_(max=vocab_size - 4)  # the last ones may be durations
        after = torch.randn(vocab_size, width)
        after -= after.mean(0)
        enc = 0.5 * torch.randn_like(self.inputs[0])
        for b, (t, u) in enumerate(zip(frames, symbols, strict=True)):
            for index, frame in enumerate(sorted(choose.sample(range(t - 1), u))):
                enc[b, frame] -= after[self.targets[b, index]]
        first = torch.zeros(len(frames), 1, width)
        pred = torch.cat([first, after[self.targets]], 1)
        weight, bias = -gain / width * after, torch.zeros(vocab_size)
        weight[0], bias[0] = 0, gain / 5
        self.inputs = [enc, pred, weight, bias]


@pytest.fixture
def shares(monkeypatch):
    """The share of the rows that each call visits."""
    found = []
    visit = visited_blocks.visit

    def recorded(*args):
        result = visit(*args)
        found.append(1.0 if result is None else float(result.has_scores.double().mean()))
        return result

    monkeypatch.setattr(visited_blocks, "visit", recorded)
    return found


@pytest.mark.parametrize("topology", WITH_BLOCKS)
@pytest.mark.parametrize("gain", [40.0, 60.0, 120.0])
@pytest.mark.parametrize("options", [{}, {"fastemit_lambda": 0.1}, {"clamp": 0.05}], ids=str)
def test_gradients_stay_within_the_budget(topology, gain, options, shares):
    case = TrainedCase(gain=gain)
    options = {"topology": topology} | options
    expected = case.exact(**options)
    plain = case.run(precision="full", **options)
    actual = case.run(**options)
    assert shares and shares[0] < 0.7
    check_all(actual[:1], expected[:1], 1e-6, ["loss"])
    for name, grad, of_float32, exact in zip(
        JOINT_NAMES[1:], actual[1:], plain[1:], expected[1:], strict=True
    ):
        error, own = (float((g.double() - exact).norm()) for g in (grad, of_float32))
        assert error <= max(BUDGET * float(exact.norm()), 2 * own), name


def test_one_utterance_with_nan_spoils_no_other(shares):
    case = TrainedCase()
    clean = case.run()
    case.inputs[0][1, 2] = torch.nan
    losses, grad_enc, *_ = case.run()
    assert losses[1].isnan() and torch.equal(losses[[0, 2, 3]], clean[0][[0, 2, 3]])
    assert grad_enc[1, 2].isnan().all() and grad_enc[[0, 2, 3]].isfinite().all()
    assert shares[0] < shares[1] < 1  # the others still leave cells out


def test_a_certificate_that_no_longer_holds(monkeypatch, shares):
    """All cells are visited then, and the fine logits are computed again."""
    case = TrainedCase()
    monkeypatch.setattr(visited_blocks, "still_holds", lambda *args: False)
    actual = case.run()
    monkeypatch.setattr(visited_blocks, "pays", lambda *args: False)
    check_all(actual, case.run(), 1e-6, JOINT_NAMES)
    check_all(actual, case.exact(), BUDGET, JOINT_NAMES)
    assert len(shares) == 1 and shares[0] < 0.7


@pytest.mark.parametrize("part", ["enc", "pred", "weight"])
def test_huge_numbers_are_visited_as_a_whole(part, shares):
    """A cell of its own could overflow, and no path would find it."""
    case = TrainedCase()
    case.run()
    if part == "weight":
        case.inputs[2][5] *= 1e30
    else:
        case.inputs[part == "pred"][0, 1] *= 1e30
    case.run()
    assert shares[0] < 0.5 < shares[1]
    assert (shares[1] == 1) == (part == "weight")


@pytest.mark.parametrize(
    "options",
    [{"topology": "constrained"}, {"delay_penalty": 0.1}, {"topology": "tdt-0-1-2"}],
    ids=str,
)
def test_losses_without_blocks(options, shares):
    case = TrainedCase()
    case.run(**options)
    assert shares == []


def test_small_work_in_each_wave_does_not_pay(monkeypatch, shares):
    monkeypatch.undo()
    lattices = Lattices([340] * 4, [70] * 4)
    weight = torch.empty(500, 512)
    assert visited_blocks.pays(lattices.batch, lattices.options, weight)
    assert not visited_blocks.pays(lattices.batch, lattices.options, weight[:50])
