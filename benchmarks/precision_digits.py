# SPDX-License-Identifier: Apache-2.0
"""Trains the digits recipe in float32 and in two precisions, and compares error rates and time.

python -m benchmarks.precision_digits build/precision_digits --seeds 1 2 3 --plot parts.png

The recipe's output layer is too small for a coarse pass to pay, so precision=auto never takes it
there. Here the loss is made to take it in every step. Finished runs are not repeated.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import torch

from transducer_toolkit.ops import coarse_to_fine

PRECISIONS = ("full", "auto")
PARTS = {
    "selected": "float32 in forward",
    "full": "float32 in backward",
    "low": "bfloat16 in backward",
}

WINDOW = 20  # logged steps of a median in the picture


def train(arguments: list[str]) -> None:
    """Runs transducer-train with a coarse pass for every batch of float32."""
    from transducer_toolkit.cli.train import main

    with (
        patch.object(sys, "argv", ["transducer-train", *arguments]),
        patch.object(coarse_to_fine, "pays", lambda enc, *_: enc.dtype == torch.float32),
    ):
        main()


def results_of(folder: Path, precision: str, seed: int) -> dict[str, Any]:
    """Returns the results of a run, and trains it first if there are none."""
    run = folder / f"{precision}_{seed}"
    if not (run / "results.json").exists():
        overrides = ["loss=fused", f"loss.precision={precision}", f"seed={seed}", f"run_dir={run}"]
        command = [sys.executable, "-m", "benchmarks.precision_digits", "--train", *overrides]
        subprocess.run(command, check=True)
    results: dict[str, Any] = json.loads((run / "results.json").read_text())
    return results


def table(results: dict[str, list[dict[str, Any]]]) -> str:
    sets = list(results["auto"][0]["test_wer"])
    lines = [f"| precision | {' | '.join(f'`{name}`' for name in sets)} | ms a step |"]
    lines.append("|---" * (len(sets) + 2) + "|")
    for precision, runs in results.items():
        cells = [", ".join(f"{100 * run['test_wer'][name]:.2f}" for run in runs) for name in sets]
        cells.append(f"{1000 * median(run['seconds_per_step'] for run in runs):.0f}")
        lines.append(f"| {precision} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(metrics: Path, path: Path) -> None:
    """Draws the parts of the cells over the epochs of a run, and their running medians."""
    from matplotlib.figure import Figure

    with metrics.open() as file:
        rows = [row for row in csv.DictReader(file) if row["train/selected"]]
    last = float(rows[-1]["step"]) + 1
    num_epochs = int(rows[-1]["epoch"]) + 1
    epochs = [num_epochs * float(row["step"]) / last for row in rows]
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    for name, label in PARTS.items():
        values = [100 * float(row[f"train/{name}"]) for row in rows]
        ends = range(1, len(values) + 1)
        medians = [median(values[max(0, end - WINDOW) : end]) for end in ends]
        (line,) = axes.plot(epochs, medians, label=label)
        axes.plot(epochs, values, color=line.get_color(), linewidth=0.7, alpha=0.3)
    axes.set(xlabel="epoch", ylabel="% of the cells", xlim=(0, num_epochs), ylim=(0, None))
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def main() -> None:
    if sys.argv[1:2] == ["--train"]:
        train(sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="of the runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--plot", type=Path, help="picture of the parts in the first seed's run")
    args = parser.parse_args()
    results = {
        precision: [results_of(args.folder.absolute(), precision, seed) for seed in args.seeds]
        for precision in PRECISIONS
    }
    print(table(results))
    if args.plot is not None:
        draw(args.folder / f"auto_{args.seeds[0]}" / "metrics" / "metrics.csv", args.plot)


if __name__ == "__main__":
    main()
