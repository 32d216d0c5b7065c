# SPDX-License-Identifier: Apache-2.0
"""Documents of the benchmarks, and the tables that are made of them."""

import os
import subprocess
from pathlib import Path

import pytest

from benchmarks import report, results, run
from benchmarks.workloads import Workload

PROJECT_ROOT = Path(__file__).resolve().parents[1]
TINY = Workload(frames=(7, 5, 1), symbols=(3, 4, 1), vocab_size=6, joiner_dim=4)


def timed_row(name, seconds, **changes):
    return {
        "name": name,
        "project": "floor" if name == "GEMM unit" else name,
        "status": "ok",
        "seconds": seconds,
        "fastest": seconds,
        "slowest": seconds,
        "peak_bytes": 2**20,
        "loss_error": 0.0,
        "gradient_error": 0.0,
        "reference": "float64",
        **changes,
    }


def run_of(rows, suite="step", **options):
    given = run.parser().parse_args(["--suite", suite, "--vocab-size", "6"])
    given.lattice = "initial"
    vars(given).update(options)
    return results.make_run(given, "a machine", "a commit", TINY, rows)


def test_runs_stand_side_by_side_under_what_tells_them_apart():
    gone = {"status": "out of memory", "detail": "limit 4 GiB; MemoryError: "}
    one = run_of([timed_row("GEMM unit", 1.0), timed_row("torchaudio", 3.0)])
    two = run_of([timed_row("torchaudio", 2.0, **gone)], threads=2, lattice="peaky")
    lines = report.overview([one, two]).splitlines()
    assert "| step | initial, 1 thread(s) | peaky, 2 thread(s) |" in lines
    assert "| GEMM unit | 1000 / 1.0 |  |" in lines
    assert "| torchaudio | 3000 / 1.0 | out of memory |" in lines
    assert lines[-1] == "- torchaudio: out of memory: limit 4 GiB; MemoryError:"
    assert len(set(report.labels([one, one]))) == 2


def test_runs_are_added_to_a_document_of_their_suite(tmp_path, capsys):
    path = tmp_path / "step.json"
    rows = [timed_row("GEMM unit", 1.0)]
    for append in (False, True, True):
        results.write(path, run_of(rows), append=append)
    assert len(results.read(path)) == 3
    with pytest.raises(SystemExit):
        run.main(["--suite", "loss", "--json", str(path), "--append"])
    assert "--append: step.json has suite step" in capsys.readouterr().err
    results.write(path, run_of(rows), append=False)
    assert len(results.read(path)) == 1


def test_series_of_several_runs_are_one_table():
    runs = [
        run_of([timed_row("torchaudio", 1.0, variable=variable, value=7)], suite="scaling")
        for variable in "VD"
    ]
    (whole,) = results.merged(runs)
    table = report.table(whole)
    assert "| V | 7 | 1000 / 1.0 |" in table and "| D | 7 | 1000 / 1.0 |" in table


def test_memory_is_told_beyond_the_gradients():
    sizes = {"variable": "V", "value": 500}
    rows = [timed_row("GEMM unit", 1.0, **sizes)]
    rows += [timed_row("ours: fused", 1.0, **sizes, peak_bytes=2**22)]
    table = report.table(run_of(rows, suite="memory"))
    assert "| V | gradients | ours: fused |" in table and "| 500 | 1.0 | 3.0 |" in table


def test_marked_tables_are_made_anew(tmp_path):
    (tmp_path / "results").mkdir()
    results.write(tmp_path / "results" / "a.json", run_of([timed_row("x", 1.0)]), append=False)
    text = "before\n<!-- results/a.json -->\nold\n<!-- end -->\nafter\n"
    kept = "<!-- results/b.json -->\nNot measured yet.\n<!-- end -->\n"
    filled = report.fill(text + kept, tmp_path)
    assert filled.startswith("before\n<!-- results/a.json -->\na machine\n")
    assert "| x | 1000 (1000-1000) |" in filled and "old" not in filled
    assert filled.endswith("\n<!-- end -->\nafter\n" + kept)
    assert report.fill(filled, tmp_path) == filled


def test_tables_of_the_page_are_those_of_the_documents():
    page = PROJECT_ROOT / "docs" / "benchmarks.md"
    assert len(report.MARKED.findall(page.read_text())) == 10
    assert report.fill(page.read_text(), page.parent) == page.read_text()


def test_every_command_of_the_full_run_is_understood(tmp_path):
    python, said = tmp_path / "python", tmp_path / "said"
    python.write_text(f'#!/bin/sh\necho "$@" >> {said}\n')
    python.chmod(0o755)
    script = PROJECT_ROOT / "benchmarks" / "full_run.sh"
    subprocess.run(
        [script, "--peers-dir", "peers"],
        env={**os.environ, "PYTHON": str(python)},
        check=True,
        capture_output=True,
    )
    *commands, picture, last = said.read_text().splitlines()
    suites = set()
    for command in commands:
        options = run.parser().parse_args(command.removeprefix("-m benchmarks.run ").split())
        run.choose_implementations(options.peers, (), run.parser())
        assert options.append and options.peers_dir == Path("peers")
        suites.add(options.suite)
    assert suites == set(run.SUITES)
    assert picture.startswith("-m benchmarks.report ")
    assert picture.endswith("--step docs/images/step.png")
    assert last.startswith("-m benchmarks.report ") and last.endswith("--fill docs/benchmarks.md")
