# SPDX-License-Identifier: Apache-2.0
"""Prints what the occupancy filter of the fused loss does to gradients, as a Markdown table.

    python -m benchmarks.dropped_mass    # a few seconds

The model and the utterances are those of benchmarks.lattice_picture. The error is the relative L2
distance of the gradient of all parameters from that of the unfused loss in float64.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.lattice_picture import Batch, TinyTransducer, made_up, train
from transducer_toolkit import fused_joiner_loss, joiner_logits, transducer_loss

DROPPED_MASSES = (0.0, 1e-8, 1e-7, 1e-6, 1e-5, 1e-4)
DEFAULT = 1e-7


def gradient(model: TinyTransducer, loss: Callable[[TinyTransducer], Tensor]) -> Tensor:
    """Gradient of all parameters of a copy of the model, as one float64 vector."""
    model = copy.deepcopy(model)
    loss(model).backward()
    return torch.cat([p.grad.double().flatten() for p in model.parameters()])


def unfused(model: TinyTransducer, batch: Batch) -> Tensor:
    features, targets, shape = batch
    enc, pred = model(features.to(model.output.weight.dtype), targets)
    logits = joiner_logits(enc, pred, model.output.weight, model.output.bias, shape)
    return transducer_loss(logits, targets, *shape.lengths, blank=0)


def fused(model: TinyTransducer, batch: Batch, dropped_mass: float) -> tuple[Tensor, Tensor]:
    """The loss, and the part of the cells that backward visits."""
    features, targets, shape = batch
    weights = model.output.weight, model.output.bias
    return fused_joiner_loss(
        *model(features, targets),
        *weights,
        targets,
        *shape.lengths,
        blank=0,
        dropped_mass=dropped_mass,
        return_kept=True,
    )


def rows(model: TinyTransducer, batch: Batch) -> list[tuple[str, float, float]]:
    """Name, error of the gradient and part of the cells kept, of each way to compute it."""
    truth = gradient(copy.deepcopy(model).double(), lambda m: unfused(m, batch))

    def error(loss: Callable[[TinyTransducer], Tensor]) -> float:
        return float((gradient(model, loss) - truth).norm() / truth.norm())

    result = [("unfused", error(lambda m: unfused(m, batch)), 1.0)]
    for mass in DROPPED_MASSES:
        name = f"fused, dropped_mass={mass:g}" + (" (default)" if mass == DEFAULT else "")
        kept = float(fused(model, batch, mass)[1])
        result.append((name, error(lambda m, mass=mass: fused(m, batch, mass)[0]), kept))
    return result


def table() -> str:
    """Markdown: errors and kept cells before and after training."""
    batch = made_up(4, 24, seed=2)
    initial = TinyTransducer.initial()
    trained = train(copy.deepcopy(initial))
    lines = [
        "| float32 | error, untrained | kept | error, trained | kept |",
        "|---|---|---|---|---|",
    ]
    for before, after in zip(rows(initial, batch), rows(trained, batch), strict=True):
        cells = [before[0]]
        for _, error, kept in (before, after):
            cells += [f"{error:.1e}", f"{kept:.0%}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
