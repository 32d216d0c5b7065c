# SPDX-License-Identifier: Apache-2.0
"""Draws which lattice cells the fused loss visits in backward, before and after a training.

    python -m benchmarks.lattice_picture docs/images/lattice.png    # a few seconds

A small transducer is trained on made-up utterances: each symbol is a random vector that lasts a few
frames, plus noise. Both panels show the same utterance, which the training does not contain.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from transducer_toolkit import LatticeShape, fused_joiner_loss, joiner_logits
from transducer_toolkit.decoding import lattice_occupancy

VOCAB_SIZE = 30  # blank is 0
NUM_FEATURES = 16
JOINER_DIM = 48
DROPPED_MASS = 1e-7  # the default of fused_joiner_loss


class Panel(NamedTuple):
    """One utterance under one model.

    Attributes:
        occupancy: (T, U + 1) probability that a path passes each cell.
        visited: (T, U + 1) bool, the cells that backward visits.
        kept: part of the cells that backward visits, as the loss reports it.
    """

    occupancy: Tensor
    visited: Tensor
    kept: float


class Batch(NamedTuple):
    """Features (B, T, F), targets (B, U) and the lattices of some utterances."""

    features: Tensor
    targets: Tensor
    shape: LatticeShape


class TinyTransducer(nn.Module):
    """Two frames to either side, the last symbol, and an output layer."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Conv1d(NUM_FEATURES, JOINER_DIM, kernel_size=5, padding=2)
        self.predictor = nn.Embedding(VOCAB_SIZE, JOINER_DIM)
        self.output = nn.Linear(JOINER_DIM, VOCAB_SIZE)

    @classmethod
    def initial(cls) -> TinyTransducer:
        """The same initial weights every time."""
        torch.manual_seed(0)
        return cls()

    def forward(self, features: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """(B, T, F), (B, U) -> encoder frames (B, T, D), predictor outputs (B, U + 1, D)."""
        enc = self.encoder(features.transpose(1, 2)).transpose(1, 2)
        return enc, self.predictor(nn.functional.pad(targets, (1, 0)))

    def loss(self, features: Tensor, targets: Tensor, shape: LatticeShape) -> tuple[Tensor, Tensor]:
        """The mean loss, and the part of the cells that backward visits."""
        enc, pred = self(features, targets)
        weights = self.output.weight, self.output.bias
        lengths = shape.lengths
        return fused_joiner_loss(
            enc, pred, *weights, targets, *lengths, blank=0, shape=shape, return_kept=True
        )


def made_up(size: int, num_targets: int, *, seed: int) -> Batch:
    """Utterances of random symbols that last three to six frames each, plus noise."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(1, VOCAB_SIZE, (size, num_targets), generator=generator)
    durations = torch.randint(3, 7, (size, num_targets), generator=generator)
    vectors = torch.randn(VOCAB_SIZE, NUM_FEATURES, generator=torch.Generator().manual_seed(0))
    spoken = [vectors[t].repeat_interleave(d, 0) for t, d in zip(targets, durations, strict=True)]
    features = pad_sequence(spoken, batch_first=True)
    noise = torch.randn(features.shape, generator=generator)
    shape = LatticeShape.from_lengths(durations.sum(1), [num_targets] * size)
    return Batch(features + 0.7 * noise, targets, shape)


def train(model: TinyTransducer, num_steps: int = 400) -> TinyTransducer:
    """The model, trained in place on new utterances in every step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(num_steps):
        loss, _ = model.loss(*made_up(8, 10, seed=1000 + step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


def panels() -> tuple[Panel, Panel]:
    """One utterance under the initial and under the trained model."""
    shown = made_up(1, 24, seed=1)
    model = TinyTransducer.initial()
    before = _panel(model, *shown)
    return before, _panel(train(model), *shown)


@torch.no_grad()
def _panel(model: TinyTransducer, features: Tensor, targets: Tensor, shape: LatticeShape) -> Panel:
    _, kept = model.loss(features, targets, shape)
    weights = model.output.weight, model.output.bias
    logits = joiner_logits(*model(features, targets), *weights, shape)
    occupancy = lattice_occupancy(logits.double(), targets, shape, blank=0)[0]
    # The rule of fused_joiner_loss: leave out the cells of lowest occupancy.
    values, order = occupancy.flatten().sort()
    budget = DROPPED_MASS * sum(map(int, (shape.max_frames, shape.max_targets)))
    visited = torch.empty_like(order, dtype=torch.bool)
    visited[order] = values.cumsum(0) > budget
    return Panel(occupancy, visited.view_as(occupancy), float(kept))


def draw(path: Path, before: Panel, after: Panel) -> None:
    """Writes the picture: color is occupancy; gray cells are not visited in backward."""
    from matplotlib import colormaps
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5.6), layout="constrained")
    grid = figure.subplots(2, 1, sharex=True)
    colors = colormaps["viridis"].with_extremes(bad="0.9")
    image: Any = None
    titles = ("before training", "after training")
    for axes, panel, title in zip(grid, (before, after), titles, strict=True):
        shown = panel.occupancy.where(panel.visited, torch.nan)
        image = axes.imshow(
            shown.T.numpy(),
            origin="lower",
            aspect="auto",
            cmap=colors,
            norm=LogNorm(1e-6, 1),
            interpolation="nearest",
        )
        axes.set_title(f"{title}: backward visits {panel.kept:.0%} of the cells", fontsize=11)
        axes.set_ylabel("symbol u")
    grid[-1].set_xlabel("frame t")
    bar = figure.colorbar(image, ax=grid, shrink=0.8, extend="min")
    bar.set_label("occupancy: probability that a path passes the cell")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=140, metadata={"Comment": kept_line(before, after)})


def kept_line(before: Panel, after: Panel) -> str:
    """Shares of the cells that backward visits, as the PNG carries them."""
    return f"kept {before.kept:.2f} {after.kept:.2f}"


def check(path: Path, before: Panel, after: Panel) -> None:
    """Raises if the picture at `path` shows other shares than these panels, by more than 0.05.

    Trained weights, and so the shares, differ a little between processors.
    """
    from PIL import Image

    drawn = [float(part) for part in Image.open(path).info["Comment"].split()[1:]]
    now = [before.kept, after.kept]
    if max(abs(a - b) for a, b in zip(drawn, now, strict=True)) > 0.05:
        raise SystemExit(f"{path}: expected {kept_line(before, after)}, got {drawn}: draw it again")
    print(f"{path}: {kept_line(before, after)}")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.lattice_picture",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("picture", type=Path, metavar="PNG")
    parser.add_argument(
        "--check",
        action="store_true",
        help="compare the picture that is there with the numbers",
    )
    options = parser.parse_args()
    before, after = panels()
    if options.check:
        check(options.picture, before, after)
    else:
        draw(options.picture, before, after)


if __name__ == "__main__":
    main()
