# SPDX-License-Identifier: Apache-2.0
"""Prints the time of the fused step with all cells and with visited blocks, as a Markdown table.

    python -m benchmarks.precision_blocks    # about 2 minutes on one quiet core

Times are processor times of one thread; both kinds of steps alternate. The difference is the
largest of the four gradients', relative to that with all cells.
"""

from __future__ import annotations

import argparse
import time
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks import workloads
from benchmarks.workloads import Workload
from transducer_toolkit import fused_joiner_loss
from transducer_toolkit.ops import visited_blocks

SIZES = ((340, 70, 4), (1200, 260, 1))
# Lattice of the workload, and the gain of labels and the bias of blank of a trained one.
LATTICES = (
    ("trained", workloads.LABEL_GAIN, workloads.BLANK_BIAS),
    ("trained", 40.0, 8.0),
    ("trained", 32.0, 6.4),
    ("trained", 28.0, 5.6),
    *((lattice, 0.0, 0.0) for lattice in workloads.LATTICE_SCALES),
)


class Step:
    """The fused step of a workload."""

    def __init__(self, workload: Workload) -> None:
        self.inputs = [tensor.requires_grad_() for tensor in workload.joiner_inputs()]
        self.lengths = workload.targets(), *workload.shape.lengths
        self.share = 1.0  # of the cells that the last step visited
        self.loss = 0.0

    def run(self, *, with_blocks: bool) -> tuple[float, tuple[Tensor, ...]]:
        """Returns the seconds and the gradients."""
        visit, pays = visited_blocks.visit, visited_blocks.pays
        self.share = 1.0

        def recorded(*args):  # type: ignore[no-untyped-def]
            result = visit(*args)
            if result is not None:
                self.share = float(result.has_scores.double().mean())
            return result

        with (
            patch.object(visited_blocks, "visit", recorded),
            patch.object(visited_blocks, "pays", lambda *args: with_blocks and pays(*args)),
        ):
            begun = time.process_time()
            loss = fused_joiner_loss(*self.inputs, *self.lengths, 0, reduction="sum")
            grads = torch.autograd.grad(loss, self.inputs)
            seconds = time.process_time() - begun
        self.loss = loss.item()
        return seconds, grads


def row(step: Step, rounds: int) -> str:
    _, expected = step.run(with_blocks=False)
    _, actual = step.run(with_blocks=True)
    share = step.share
    pairs = zip(actual, expected, strict=True)
    difference = max(
        float((mine - all_cells).norm() / all_cells.norm()) for mine, all_cells in pairs
    )
    times = [[step.run(with_blocks=blocks)[0] for blocks in (False, True)] for _ in range(rounds)]
    all_cells, blocks = (1000 * min(column) for column in zip(*times, strict=True))
    cells = (
        f"{step.loss / len(step.lengths[1]):.0f}",
        f"{share:.0%}",
        f"{all_cells:.0f}",
        f"{blocks:.0f}",
        f"{all_cells / blocks:.2f}",
        f"{difference:.0e}",
    )
    return " | ".join(cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    columns = "T | U | B | nats an utterance | visited | all cells | blocks | ratio | difference"
    print(f"| lattice | {columns} |")
    print("|---" * 10 + "|")
    for frames, symbols, size in SIZES:
        for lattice, gain, bias in LATTICES:
            with patch.multiple(workloads, LABEL_GAIN=gain, BLANK_BIAS=bias):
                workload = Workload((frames,) * size, (symbols,) * size, 500, 512, lattice=lattice)
                step = Step(workload)
            name = f"{lattice} ({gain:g}, {bias:g})" if gain else lattice
            print(
                f"| {name} | {frames} | {symbols} | {size} | {row(step, args.rounds)} |", flush=True
            )


if __name__ == "__main__":
    main()
