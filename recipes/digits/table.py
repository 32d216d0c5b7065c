# SPDX-License-Identifier: Apache-2.0
"""Results of a multirun as a Markdown table: python recipes/digits/table.py MULTIRUN_FOLDER

One row for each set of overrides without the seed: word error rates in per cent as median over the
seeds and, of the test set named `test`, all of them; symbol delay in ms (mean over the words of
`test`); milliseconds a step and the part of it that joiner and loss take (medians).
"""

from __future__ import annotations

import argparse
import json
import re
from collections import defaultdict
from pathlib import Path
from statistics import median
from typing import Any


def read_runs(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Results of the finished runs in a multirun's folder, by overrides without the seed."""
    runs: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for path in sorted(folder.glob("*/results.json"), key=lambda path: int(path.parent.name)):
        lines = (path.parent / ".hydra" / "overrides.yaml").read_text().splitlines()
        overrides = [line.removeprefix("- ") for line in lines]
        kept = (line for line in overrides if not re.match(r"seed=|\[\]", line))
        runs[" ".join(kept) or "default"].append(json.loads(path.read_text()))
    return runs


def table(runs: dict[str, list[dict[str, Any]]]) -> str:
    """The rows, best median first."""
    sets = list(next(iter(runs.values()))[0]["test_wer"])
    others = [name for name in sets if name != "test"]
    head = ["", "`test`, median", "each seed", *(f"`{name}`" for name in others)]
    head += ["delay, ms", "ms a step", "loss, of a step"]
    rows = []
    for overrides, results in runs.items():
        results = sorted(results, key=lambda run: run["seed"])
        wers = {name: [100 * run["test_wer"][name] for run in results] for name in sets}
        delays = [delay["mean"] for run in results if (delay := run["symbol_delay_ms"]["test"])]
        cells = [f"`{overrides}`", f"{median(wers['test']):.2f}"]
        cells += [", ".join(f"{wer:.2f}" for wer in wers["test"])]
        cells += [f"{median(wers[name]):.1f}" for name in others]
        cells.append(_median(delays, "{:.0f}"))
        steps_ms = [1000 * s for run in results if (s := run["seconds_per_step"]) is not None]
        parts = [100 * part for run in results if (part := run["loss_part_of_step"]) is not None]
        cells += [_median(steps_ms, "{:.0f}"), _median(parts, "{:.0f} %")]
        rows.append((median(wers["test"]), cells))
    lines = [head, ["---"] * len(head), *(cells for _, cells in sorted(rows))]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _median(values: list[float], form: str) -> str:
    """A dash without values, as a training of a few steps has none."""
    return form.format(median(values)) if values else "-"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="of the multirun, with a folder for each run")
    folder = parser.parse_args().folder
    runs = read_runs(folder)
    if not runs:
        raise SystemExit(f"no finished runs in {folder}")
    print(table(runs))


if __name__ == "__main__":
    main()
