# SPDX-License-Identifier: Apache-2.0
"""Stage 2 on every backend against the CPU; in several orders of threads, bit for bit."""

import pytest
import torch
from torch.nn.functional import logsigmoid

from tests.backends import accelerated, check_close, in_every_order, of
from tests.stage_cases import LAYOUTS, make_case, random_scores, run_lattice
from transducer_toolkit.ops.topology import TOPOLOGIES

SHAPES = {  # frames, symbols
    "ragged": ((9, 1, 6, 7), (4, 0, 5, 2)),
    "long": ((1100, 3), (3, 1)),
    "wide": ((3, 1), (1100, 2)),
    "square": ((64, 33), (60, 63)),
}


def check_stage_2(backend, case, scores=None, *, exact, tolerance=None, **options):
    batch = case.batch()
    scores = random_scores(batch) if scores is None else scores
    expected = run_lattice(scores, batch, "cpu", **options)
    there = case.batch(backend.device)
    actual = in_every_order(
        backend, lambda: run_lattice(scores, there, backend.device, exact=exact, **options)
    )
    tolerance = tolerance or (1e-10 if exact else 2e-6)
    check_close(actual, expected, tolerance, ("loss", "use_blank", "use_label"))
    return expected


@accelerated
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize("exact", [True, False])
def test_lattice(name, layout, topology, exact):
    for options in ({}, {"delay_penalty": 0.3, "fastemit_lambda": 0.5}):
        case = make_case(layout)
        expected = check_stage_2(of(name), case, topology=topology, exact=exact, **options)
    assert expected[0].isfinite().any()


@accelerated
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_lattice_loss_alone(name, layout, topology):
    backend = of(name)
    case = make_case(layout)
    scores = random_scores(case.batch())
    with_uses = run_lattice(scores, case.batch(), "cpu", topology=topology)
    there = case.batch(backend.device)
    (loss, *uses) = in_every_order(
        backend,
        lambda: run_lattice(scores, there, backend.device, topology=topology, with_uses=False),
    )
    torch.testing.assert_close(loss, with_uses[0], rtol=1e-12, atol=1e-12)
    assert all(tensor.numel() == 0 for tensor in uses)


@accelerated
@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize("shape", ["long", "wide", "square"])
@pytest.mark.parametrize("layout", ["packed", "band"])
def test_lattice_of_any_shape(name, shape, topology, layout):
    """More lanes than a block has, along frames and along symbols; and in strips."""
    width = 3 if shape == "long" else 40
    case = make_case(layout, *SHAPES[shape], band_width=width)
    check_stage_2(of(name), case, topology=topology, exact=True)
    check_stage_2(of(name), case, topology=topology, exact=False, tolerance=1e-5)


@accelerated
@pytest.mark.parametrize("topology", ["regular", "modified"])
def test_square_lattice_in_strips(name, topology):
    backend = of(name)
    case = make_case("packed", (1100,), (1100 if topology == "regular" else 1090,))
    batch = case.batch()
    scores = [-4 * torch.rand(batch.num_rows, dtype=torch.float64) for _ in range(2)]
    expected = run_lattice(scores, batch, "cpu", topology=topology)
    with backend.active("reverse"):
        there = case.batch(backend.device)
        actual = run_lattice(scores, there, backend.device, topology=topology, exact=False)
    actual = [tensor.cpu() for tensor in actual]
    check_close(actual, expected, 1e-5, ("loss", "use_blank", "use_label"))


@accelerated
@pytest.mark.parametrize("peak", [1.0, 30.0])
def test_float32_transcendentals_keep_posteriors_within_1e_5(name, peak):
    """The precision promise where the sums of logarithms are longest: T = 3000, U = 600."""
    backend = of(name)
    case = make_case("packed", (3000,), (600,))
    batch = case.batch()
    logits = torch.randn(batch.num_rows, dtype=torch.float64).mul(peak)
    scores = logsigmoid(logits), logsigmoid(-logits)
    expected = run_lattice(scores, batch, "cpu", topology="regular")
    with backend.active():
        there = case.batch(backend.device)
        actual = run_lattice(scores, there, backend.device, topology="regular", exact=False)
    actual = [tensor.cpu() for tensor in actual]
    check_close(actual[:1], expected[:1], 1e-7, ("loss",))
    for use, expected_use in zip(actual[1:], expected[1:], strict=True):
        assert (use - expected_use).abs().max() < 5e-6


@accelerated
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_lattice_of_nan_and_of_no_path(name, topology):
    case = make_case("padded", (5, 5, 5, 5), (3, 3, 3, 3))
    batch = case.batch()
    blank, label = random_scores(batch)
    label = label.clamp(min=-50)
    rows = batch.num_rows // 4
    blank[rows + 4] = torch.nan  # cell (1, 0)
    label[2 * rows + 2] = torch.nan  # cell (0, 2): on no path of one symbol a frame
    blank[3 * rows : 4 * rows] = -torch.inf
    label[3 * rows : 4 * rows] = -torch.inf
    expected = check_stage_2(of(name), case, (blank, label), topology=topology, exact=True)
    assert expected[0].isnan().tolist() == [False, True, True, False]
    assert expected[0][3] == torch.inf
    assert expected[1][rows].isnan() and expected[1][3 * rows] == 0
