# SPDX-License-Identifier: Apache-2.0
"""What several families of functions have in common: utterances, windows and results."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from tests.soak.truth import (
    LARGE,
    Expected,
    Options,
    Results,
    Solution,
    defined,
    largest,
    loss_results,
    number,
)
from transducer_toolkit.ops.topology import get_topology


def utterance_is_valid(
    labels: list[int], frames: int, symbols: int, max_frames: int, vocab: int
) -> bool:
    if not (1 <= frames <= max_frames and 0 <= symbols <= len(labels)):
        return False
    return all(0 <= label < vocab for label in labels[:symbols])


def clamp_of(a: dict[str, Any]) -> float:
    clamp = a.get("clamp", 0.0)
    return 0.0 if abs(clamp) == math.inf else number(clamp)


def boundary_rows(a: dict[str, Any], num_utterances: int, symbols: int, frames: int) -> list:
    """Rows s_begin, t_begin, s_end, t_end."""
    if a.get("boundary") is None:
        return [[0, 0, symbols, frames]] * num_utterances
    return a["boundary"].tolist()


def k2_arguments(a: dict[str, Any], num_frames: int) -> tuple:
    """Symbols, options, and the rows of the boundary."""
    symbols = a["symbols"].detach()
    options = Options(
        a["termination_symbol"],
        a.get("rnnt_type", "regular"),
        fastemit_lambda=number(a.get("fastemit_lambda", 0.0)),
        delay_penalty=number(a.get("delay_penalty", 0.0)),
    )
    return symbols, options, boundary_rows(a, symbols.size(0), symbols.size(1), num_frames)


def posterior_results(solutions: list[Solution], rows: list, shapes: tuple, eps: float) -> Results:
    px, py = (torch.zeros(shape, dtype=torch.float64) for shape in shapes)
    for b, (s_begin, t_begin, s_end, t_end) in enumerate(rows):
        if solutions[b].loss.isnan():  # nothing is said of the padding
            px[b], py[b] = math.nan, math.nan
            continue
        px[b, s_begin:s_end, t_begin:t_end] = solutions[b].label_posterior.T
        py[b, s_begin : s_end + 1, t_begin:t_end] = solutions[b].blank_posterior.T
    named = {"px_grad": px, "py_grad": py}
    return {name: Expected(x, eps, 0.0, ~x.isnan()) for name, x in named.items()}


def k2_loss_results(
    a: dict[str, Any],
    weights: Tensor,
    solutions: list[Solution],
    rows: list,
    inputs: dict[str, tuple[Tensor, Tensor]],
    num_frames: int,
    eps: float,
) -> Results:
    reduction = a.get("reduction", "mean")
    cells = max(t_end - t_begin + s_end - s_begin for s_begin, t_begin, s_end, t_end in rows)
    losses = [solution.loss for solution in solutions]
    results = loss_results(losses, reduction, weights, inputs, cells=cells, eps=eps)
    size = largest(*(x for x, _ in inputs.values()))
    if a.get("return_grad", False) and size <= LARGE:
        num_symbols, extra = a["symbols"].size(1), a.get("rnnt_type", "regular") == "regular"
        shapes = (
            (len(rows), num_symbols, num_frames + extra),
            (len(rows), num_symbols + 1, num_frames),
        )
        results |= posterior_results(solutions, rows, shapes, 64 * eps * size * cells)
    return results


def is_band(window: Tensor, max_targets: int) -> bool:
    """Whether each row is consecutive symbols of [0, max_targets]."""
    start = window[:, :1]
    consecutive = (window == start + torch.arange(window.size(1))).all()
    inside = ((start >= 0) & (start <= max_targets + 1 - window.size(1))).all()
    return bool(consecutive and inside)


def unbanded(cells: Tensor, window: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    """Band (T, R, V) -> full (T, columns, V), and which cells there are."""
    defined(is_band(window, columns - 1))
    index = torch.arange(len(window))[:, None].expand_as(window), window
    full = cells.new_zeros(len(window), columns, cells.size(-1)).index_put(index, cells)
    exists = torch.zeros(len(window), columns, dtype=torch.bool)
    exists[index] = True
    return full, exists


def log_prob_results(
    log_probs: list[Tensor | None], exists: list, common: tuple, num_frames: int, error: float
) -> Results:
    symbols, options, rows = common
    blank, row = options.blank, get_topology(options.topology)
    shapes = (
        (len(rows), symbols.size(1), num_frames + row.labels_share_frames),
        (len(rows), symbols.size(1) + 1, num_frames),
    )
    values = [torch.zeros(shape, dtype=torch.float64) for shape in shapes]
    counts = [torch.zeros(shape, dtype=torch.bool) for shape in shapes]
    for b, (s_begin, t_begin, s_end, t_end) in enumerate(rows):
        if log_probs[b] is None:
            continue
        x = log_probs[b].detach()
        if exists[b] is not None:
            x = torch.where(exists[b][..., None], x, -math.inf)
        index = symbols[b, s_begin:s_end].long().expand(len(x), -1)[..., None]
        label, stop = x[:, :-1].gather(2, index).squeeze(2), x[:, :, blank]
        if row.label_takes_blank:
            label = label + stop[:, 1:]
        places = (
            (b, slice(s_begin, s_end), slice(t_begin, t_end)),
            (b, slice(s_begin, s_end + 1), slice(t_begin, t_end)),
        )
        for place, value, count, part in zip(places, values, counts, (label, stop), strict=True):
            value[place] = part.T
            count[place] = True
    return {
        name: Expected(value, error, 0.0, count)
        for name, value, count in zip(("px", "py"), values, counts, strict=True)
    }
