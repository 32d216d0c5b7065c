# SPDX-License-Identifier: Apache-2.0
"""The table of the digits recipe."""

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[1] / "recipes" / "digits" / "table.py"


def run_of(folder, number, seed, loss, wer, **others):
    overrides = [f"seed={seed}", f"loss={loss}"]
    (folder / str(number) / ".hydra").mkdir(parents=True)
    lines = "".join(f"- {override}\n" for override in overrides)
    (folder / str(number) / ".hydra" / "overrides.yaml").write_text(lines)
    results = {
        "seed": seed,
        "test_wer": {"test": wer, "other": 2 * wer},
        "symbol_delay_ms": {"test": {"mean": 200.4}, "other": None},
        "seconds_per_step": 0.07,
        "loss_part_of_step": 0.25,
        **others,
    }
    (folder / str(number) / "results.json").write_text(json.dumps(results))


def test_medians_over_the_seeds_best_first(tmp_path):
    for number, (loss, seed, wer) in enumerate(
        [("packed", 10, 0.09), ("packed", 1, 0.05), ("packed", 2, 0.06), ("fused", 1, 0.04)]
    ):
        run_of(tmp_path, number, seed, loss, wer)
    (tmp_path / "4").mkdir()  # not finished
    command = [sys.executable, str(SCRIPT), str(tmp_path)]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert printed.splitlines()[2:] == [
        "| `loss=fused` | 4.00 | 4.00 | 8.0 | 200 | 70 | 25 % |",
        "| `loss=packed` | 6.00 | 5.00, 6.00, 9.00 | 12.0 | 200 | 70 | 25 % |",
    ]


def test_a_run_too_short_to_be_timed(tmp_path):
    missing = {"test": None, "other": None}
    untimed = {"seconds_per_step": None, "loss_part_of_step": None, "symbol_delay_ms": missing}
    run_of(tmp_path, 0, 1, "fused", 1.0, **untimed)
    command = [sys.executable, str(SCRIPT), str(tmp_path)]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert printed.splitlines()[2] == "| `loss=fused` | 100.00 | 100.00 | 200.0 | - | - | - |"


def test_a_folder_without_runs_is_refused(tmp_path):
    result = subprocess.run([sys.executable, str(SCRIPT), str(tmp_path)], capture_output=True)
    assert result.returncode == 1 and b"no finished runs" in result.stderr
