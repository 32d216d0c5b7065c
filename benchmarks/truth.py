# SPDX-License-Identifier: Apache-2.0
"""Losses and gradients in float64 and plain torch: what every implementation has to agree with.

Shares no code with the compiled stages. Tile by tile, so that it fits where the others do. Within a
frame the recursion along u is a cumulative logsumexp: with c(u) the sum of the label scores before
u, ``alpha(t, u) = c(u) + log sum_{v <= u} exp(alpha(t-1, v) + blank(t-1, v) - c(v))``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from benchmarks.workloads import Workload

TILE_CELLS = 4096


def cell_coordinates(workload: Workload) -> tuple[Tensor, Tensor, Tensor]:
    """b, t and u of every packed cell."""
    coordinates = []
    for b, (frames, symbols) in enumerate(zip(workload.frames, workload.symbols, strict=True)):
        grid = torch.arange(frames * (symbols + 1))
        coordinates.append(
            torch.stack([torch.full_like(grid, b), grid // (symbols + 1), grid % (symbols + 1)])
        )
    b, t, u = torch.cat(coordinates, 1).to(workload.device)
    return b, t, u


def posteriors(blank: Tensor, label: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Loss of one utterance, and the posterior of the blank and of the label arc of every cell.

    Args:
        blank: (T, U + 1) log-probabilities.
        label: (T, U + 1), the last column unused.
    """
    num_frames = blank.size(0)
    before = torch.zeros_like(blank)
    before[:, 1:] = label[:, :-1].cumsum(1)  # c(t, u)
    alpha, beta = torch.empty_like(blank), torch.empty_like(blank)
    alpha[0] = before[0]
    for t in range(1, num_frames):
        alpha[t] = before[t] + (alpha[t - 1] + blank[t - 1] - before[t]).logcumsumexp(0)
    after_blank = torch.full_like(blank, float("-inf"))  # log-probability of the rest
    after_blank[-1, -1] = 0
    for t in reversed(range(num_frames)):
        if t < num_frames - 1:
            after_blank[t] = beta[t + 1]
        arrivals = before[t] + blank[t] + after_blank[t]
        beta[t] = arrivals.flip(0).logcumsumexp(0).flip(0) - before[t]
    total = beta[0, 0]
    use_blank = (alpha + blank + after_blank - total).exp()
    use_label = torch.zeros_like(blank)
    use_label[:, :-1] = (alpha[:, :-1] + label[:, :-1] + beta[:, 1:] - total).exp()
    return -total, use_blank, use_label


class Truth:
    """The loss of a workload on packed logits that are made tile by tile, and its gradient.

    Args:
        logits_of: rows of cells -> their logits, float64.
    """

    def __init__(self, workload: Workload, logits_of: Callable[[slice], Tensor]) -> None:
        self.logits_of = logits_of
        self.num_cells = workload.shape.num_cells
        b, _, u = cell_coordinates(workload)
        targets = workload.targets()
        self.labels = targets[b, u.clamp(max=targets.size(1) - 1)]  # of no use in the last column
        scores = torch.cat([self._scores(rows) for rows in self._tiles()])  # (cells, 2)
        losses, uses, start = [], [], 0
        for frames, symbols in zip(workload.frames, workload.symbols, strict=True):
            cells = frames * (symbols + 1)
            blank, label = scores[start : start + cells].view(frames, symbols + 1, 2).unbind(-1)
            loss, *use = posteriors(blank, label)
            losses.append(loss)
            uses.append(torch.stack(use, -1).view(cells, 2))
            start += cells
        self.losses = torch.stack(losses)
        self.uses = torch.cat(uses)  # (cells, 2): expected uses of blank and of label

    def _tiles(self) -> Iterator[slice]:
        for start in range(0, self.num_cells, TILE_CELLS):
            yield slice(start, min(start + TILE_CELLS, self.num_cells))

    def _scores(self, rows: slice) -> Tensor:
        log_probs = self.logits_of(rows).log_softmax(-1)
        label = log_probs.gather(1, self.labels[rows, None])
        return torch.cat([log_probs[:, :1], label], 1)

    def gradient_tiles(self) -> Iterator[tuple[slice, Tensor]]:
        """(rows, gradient (rows, V)) of the sum of the losses with respect to the logits."""
        for rows in self._tiles():
            use_blank, use_label = self.uses[rows].unbind(-1)
            gradient = self.logits_of(rows).softmax(-1) * (use_blank + use_label)[:, None]
            gradient[:, 0] -= use_blank
            gradient.scatter_add_(1, self.labels[rows, None], -use_label[:, None])
            yield rows, gradient


def loss_truth(workload: Workload) -> Truth:
    """Of the suite `loss`: logits given."""
    logits = workload.logits()
    return Truth(workload, lambda rows: logits[rows].double())


def step_truth(workload: Workload) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Of the suite `step`: losses, and gradients of enc, pred, weight and bias."""
    inputs = [tensor.double() for tensor in workload.joiner_inputs()]
    enc, pred, weight, bias = inputs
    b, t, u = cell_coordinates(workload)

    def hidden_of(rows: slice) -> Tensor:
        return torch.tanh(enc[b[rows], t[rows]] + pred[b[rows], u[rows]])

    truth = Truth(workload, lambda rows: hidden_of(rows) @ weight.T + bias)
    slope = lambda hidden: 1 - hidden**2  # noqa: E731
    tiles = truth.gradient_tiles()
    return truth.losses, joiner_gradients(workload, inputs, hidden_of, slope, tiles)


def joiner_gradients(
    workload: Workload,
    inputs: Sequence[Tensor],
    hidden_of: Callable[[slice], Tensor],
    slope: Callable[[Tensor], Tensor],
    gradient_tiles: Iterable[tuple[slice, Tensor]],
) -> tuple[Tensor, ...]:
    """Gradients of enc, pred, weight and bias from those of the logits.

    Args:
        inputs: enc, pred, weight and bias.
        hidden_of: rows of cells -> their hidden layer.
        slope: hidden layer -> derivative of the activation there.
        gradient_tiles: rows, and the gradient of their logits.
    """
    b, t, u = cell_coordinates(workload)
    grads = tuple(torch.zeros_like(tensor) for tensor in inputs)
    for rows, grad_logits in gradient_tiles:
        hidden = hidden_of(rows)
        grad_hidden = (grad_logits @ inputs[2]) * slope(hidden)
        grads[0].index_put_((b[rows], t[rows]), grad_hidden, accumulate=True)
        grads[1].index_put_((b[rows], u[rows]), grad_hidden, accumulate=True)
        grads[2].addmm_(grad_logits.T, hidden)
        grads[3].add_(grad_logits.sum(0))
    return grads
