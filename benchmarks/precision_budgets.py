# SPDX-License-Identifier: Apache-2.0
"""Prints time and error of the fused step for several error budgets, as a Markdown table.

    python -m benchmarks.precision_budgets    # about 4 minutes on one quiet core

The batch is that of the suite `step`. Times are processor times of one thread, in GEMM units of the
same process: both precisions and the unit alternate. Errors are against float64 in plain PyTorch.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.measure import gemm_unit
from benchmarks.truth import step_truth
from benchmarks.workloads import Workload, choose_batch, utterance_shapes
from transducer_toolkit import fused_joiner_loss
from transducer_toolkit.ops import coarse_to_fine

# Name, lattice of the workload, factors of the budget.
LATTICES = (
    ("as initialized", "initial", (0.1, 1.0, 10.0)),
    ("x 3", "x3", (1.0,)),
    ("x 12, peaky", "peaky", (0.1, 1.0, 10.0)),
    ("trained", "trained", (0.1, 1.0, 10.0)),
)
FACTORS = {0.1: "/ 10", 1.0: "**default**", 10.0: "x 10"}


def cpu_s(function: Callable[[], Any]) -> float:
    begun = time.process_time()
    function()
    return time.process_time() - begun


def with_budget(factor: float, function: Callable[[], Any]) -> Any:
    """Calls a function while the error budgets are multiplied by a factor."""
    scaled = {
        name: factor * getattr(coarse_to_fine, name) for name in ("LOW_BUDGET", "COARSE_BUDGET")
    }
    with patch.multiple(coarse_to_fine, **scaled):
        return function()


class Step:
    """The fused step of a workload, and its error."""

    def __init__(self, workload: Workload) -> None:
        self.inputs = [tensor.requires_grad_() for tensor in workload.joiner_inputs()]
        self.lengths = workload.targets(), *workload.shape.lengths
        self.truth = step_truth(workload)[1]

    def gradients(self, precision: str) -> tuple[Tensor, ...]:
        loss = fused_joiner_loss(
            *self.inputs, *self.lengths, 0, precision=precision, reduction="sum"
        )
        return torch.autograd.grad(loss, self.inputs)

    def error(self, precision: str) -> float:
        """Largest relative error of the four gradients."""
        pairs = zip(self.gradients(precision), self.truth, strict=True)
        return max(float((mine.double() - exact).norm() / exact.norm()) for mine, exact in pairs)

    def parts(self) -> str:
        with torch.no_grad():
            _, parts = fused_joiner_loss(*self.inputs, *self.lengths, 0, return_parts=True)
        return ", ".join(f"{float(part):.2f}" for part in (parts.selected, parts.full, parts.low))


def row(step: Step, unit: Callable[[Any], Any], name: str, factor: float, rounds: int) -> str:
    """A line of the table. The unit and both precisions alternate."""
    units: dict[str, list[float]] = {"auto": [], "full": []}
    for precision in units:  # warm-up
        with_budget(factor, lambda precision=precision: step.gradients(precision))
    for _ in range(rounds):
        unit_s = cpu_s(lambda: unit(None))
        for precision, of_one in units.items():
            seconds = with_budget(
                factor, lambda precision=precision: cpu_s(lambda: step.gradients(precision))
            )
            of_one.append(seconds / unit_s)
    error = with_budget(factor, lambda: step.error("auto"))
    cells = (
        f"{median(units['auto']):.2f} ({median(units['full']):.2f})",
        with_budget(factor, step.parts),
        f"{error:.0e} ({step.error('full'):.0e})",
    )
    return f"| {name} | {FACTORS[factor]} | {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shapes", type=Path, help=".npy of (N, 2) frames and tokens")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    batch = choose_batch(utterance_shapes(args.shapes), max_frames=1400, batch="sorted")
    frames, symbols = (tuple(column.tolist()) for column in batch.T)
    workload = Workload(frames, symbols, vocab_size=500, joiner_dim=512)
    unit = gemm_unit(workload, workload.shape.num_cells)
    print("| weights | budget | units (`full`) | selected, float32, bfloat16 | error (`full`) |")
    print("|---|---|---|---|---|")
    for name, lattice, factors in LATTICES:
        step = Step(replace(workload, lattice=lattice))
        for factor in factors:
            print(row(step, unit, name, factor, args.rounds), flush=True)


if __name__ == "__main__":
    main()
