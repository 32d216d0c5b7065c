# SPDX-License-Identifier: Apache-2.0
"""Draws in which precision the fused loss computes the cells of a lattice.

python -m benchmarks.precision_picture docs/images/precision.png
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.lattice_picture import Batch, TinyTransducer, made_up, train
from transducer_toolkit.ops.fused_joiner import FusedInputs, FusedPlan, operator
from transducer_toolkit.ops.options import FusedOptions

CLASSES = ("bfloat16 or int8 in forward only", "and bfloat16 in backward", "float32")


@torch.no_grad()
def precision_of_cells(model: TinyTransducer, batch: Batch) -> Tensor:
    """Returns the index in CLASSES of each cell (T, U + 1) of the only utterance."""
    features, targets, shape = batch
    enc, pred = (side.contiguous() for side in model(features, targets))
    inputs = FusedInputs(enc, pred, model.output.weight, model.output.bias, targets, *shape.lengths)
    plan = FusedPlan(shape.num_cells, keep_logits=False, with_uses=True, is_coarse=True)
    result = operator(inputs, FusedOptions(blank=0), plan)
    classes = torch.zeros(shape.num_cells)
    classes[result.rows[: int(result.num_full)]] = 2
    classes[result.low_rows[: int(result.num_low)]] = 1
    return classes.view(shape.max_frames, -1)


def draw(path: Path, panels: dict[str, Tensor]) -> None:
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    colors = "0.92", "#f0b060", "#2060a0"
    figure = Figure(figsize=(8, 5.6), layout="constrained")
    grid = figure.subplots(len(panels), 1, sharex=True)
    for axes, (title, classes) in zip(grid, panels.items(), strict=True):
        shares = [float((classes == index).float().mean()) for index in range(3)]
        axes.imshow(
            classes.T.numpy(),
            origin="lower",
            aspect="auto",
            cmap=ListedColormap(colors),
            vmin=0,
            vmax=2,
            interpolation="nearest",
        )
        axes.set_title(f"{title}: {shares[2]:.0%} in float32, {shares[1]:.0%} low", fontsize=11)
        axes.set_ylabel("symbol u")
    grid[-1].set_xlabel("frame t")
    patches = [
        Patch(color=color, label=label) for color, label in zip(colors, CLASSES, strict=True)
    ]
    figure.legend(handles=patches, loc="outside lower center", ncols=3, fontsize=9)
    figure.savefig(path, dpi=140)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("path", type=Path)
    path = parser.parse_args().path
    batch = made_up(1, 60, seed=1)
    model = TinyTransducer.initial()
    before = precision_of_cells(model, batch)
    draw(
        path, {"before training": before, "after training": precision_of_cells(train(model), batch)}
    )


if __name__ == "__main__":
    main()
