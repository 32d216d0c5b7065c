# SPDX-License-Identifier: Apache-2.0
"""recipes/plan.py: the simulated batches, and the arithmetic on them."""

import importlib.util
import sys
from pathlib import Path

import pytest

PATH = Path(__file__).parents[1] / "recipes" / "plan.py"


@pytest.fixture(scope="module")
def plan():
    spec = importlib.util.spec_from_file_location("recipes_plan", PATH)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def test_ranks_are_in_balance_and_little_is_padding(plan):
    batches = plan.simulate_batches(plan.Assumptions(sample=12_000, gpus=16))
    assert batches["filled"] > 0.9 and batches["balance_padded"] > 0.9
    assert batches["cells"] <= 800_000


def test_the_figures_follow_from_the_assumptions(plan):
    few = {"sample": 4000, "gpus": 8}

    def rows(**options):
        return {what: value for what, value, _ in plan.plan(plan.Assumptions(**few, **options))}

    base, twice, opus, slow = (
        rows(),
        rows(hours=200_000),
        rows(audio_kbit_s=70.0),
        rows(cpu_ms_per_audio_s=1000.0),
    )
    assert (base["stored audio"], twice["stored audio"]) == ("6.3 TB", "12.6 TB")
    hours = [float(row["epoch"].split()[0]) for row in (base, twice, slow)]
    assert hours[1] == pytest.approx(2 * hours[0], rel=0.01) and hours[2] > 10 * hours[0]
    reading = [float(row["reading"].split()[0]) for row in (base, opus)]
    assert reading[1] == pytest.approx(reading[0] / 2, rel=0.02)
    steps = [float(row["steps of an epoch"].replace(",", "")) for row in (base, twice)]
    assert steps[1] == pytest.approx(2 * steps[0], rel=1e-3)


def test_it_prints_a_table(plan, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["plan.py", "--sample", "1000", "--gpus", "2"])
    plan.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["| what | how much | from |", "|---|---|---|"]
    assert len(lines) > 10 and all(line.count("|") == 4 for line in lines)
