# SPDX-License-Identifier: Apache-2.0
"""The suite `tdt`: joiner and loss of a token-and-duration transducer (TDT), as Parakeet has it.

The hidden layer of a cell is ``relu(enc + pred)``. One output layer computes the logits of V
tokens, of which 0 is blank, and behind them those of K durations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.jobs import Job, LogitsOfInputs, LossOfLogits, step_job_of
from benchmarks.truth import TILE_CELLS, cell_coordinates, joiner_gradients
from benchmarks.workloads import LATTICE_SCALES, Workload

DURATIONS = (0, 1, 2, 3, 4)  # frames
SIGMA = 0.05
OPTIONS = {"activation": "relu", "durations": DURATIONS, "sigma": SIGMA}  # of fused_joiner_loss
NUM_UTTERANCES = 2
TOKENS_PER_FRAME = 0.32  # of 80 ms
IMPOSSIBLE = -1e30  # log-probability; its differences are numbers, those of -inf are not


def lengths(max_frames: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Frames and symbols of utterances of equal length that have so many frames in all."""
    frames = max(1, max_frames // NUM_UTTERANCES)
    symbols = max(1, round(frames * TOKENS_PER_FRAME))
    return (frames,) * NUM_UTTERANCES, (symbols,) * NUM_UTTERANCES


def joiner_inputs(workload: Workload) -> list[Tensor]:
    """enc (B, T, D), pred (B, U + 1, D), weight (V + K, D), bias (V + K,)."""
    enc, pred, weight, bias = workload.joiner_inputs()
    generator = torch.Generator().manual_seed(workload.seed + 4)
    size = len(DURATIONS), workload.joiner_dim
    scale = LATTICE_SCALES[workload.lattice] / workload.joiner_dim**0.5
    of_durations = (scale * torch.randn(size, generator=generator)).to(workload.device)
    bias = functional.pad(bias, (0, len(DURATIONS)))
    return [enc, pred, torch.cat([weight, of_durations]), bias]


def step_job(workload: Workload, logits_of: LogitsOfInputs, loss: LossOfLogits) -> Job:
    """enc, pred, weight, bias -> losses and the gradients of all four."""
    return step_job_of(joiner_inputs(workload), lambda *inputs: loss(logits_of(*inputs)))


def padded_logits(enc: Tensor, pred: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """(B, T, U + 1, V + K)."""
    return functional.linear((enc[:, :, None] + pred[:, None]).relu_(), weight, bias)


def truth(workload: Workload) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Losses, and gradients of enc, pred, weight and bias, in float64 and tile by tile."""
    inputs = [tensor.double() for tensor in joiner_inputs(workload)]
    enc, pred, weight, bias = inputs
    b, t, u = cell_coordinates(workload)
    targets = workload.targets()
    labels = targets[b, u.clamp(max=targets.size(1) - 1)]  # of no use in the last column
    num_tokens = workload.vocab_size

    def tiles() -> Iterator[slice]:
        for start in range(0, len(b), TILE_CELLS):
            yield slice(start, min(start + TILE_CELLS, len(b)))

    def hidden_of(rows: slice) -> Tensor:
        return torch.relu(enc[b[rows], t[rows]] + pred[b[rows], u[rows]])

    def logits_of(rows: slice) -> tuple[Tensor, Tensor]:
        logits = hidden_of(rows) @ weight.T + bias
        return logits[:, :num_tokens], logits[:, num_tokens:]

    def scores_of(rows: slice) -> Tensor:
        tokens, durations = (part.log_softmax(-1) for part in logits_of(rows))
        label = tokens.gather(1, labels[rows, None])
        return torch.cat([tokens[:, :1], label, durations], 1)

    scores = torch.cat([scores_of(rows) for rows in tiles()]).requires_grad_()
    cells = [frames * (symbols + 1) for frames, symbols in _lengths(workload)]
    losses = torch.stack(
        [
            _plain_loss(of_one.view(frames, symbols + 1, -1))
            for (frames, symbols), of_one in zip(
                _lengths(workload), scores.split(cells), strict=True
            )
        ]
    )
    (grad_scores,) = torch.autograd.grad(losses.sum(), scores)

    def gradient_tiles() -> Iterator[tuple[slice, Tensor]]:
        for rows in tiles():
            tokens, durations = logits_of(rows)
            uses = -grad_scores[rows]
            occupancy = uses[:, :1] + uses[:, 1:2]
            grad_tokens = tokens.softmax(-1) * occupancy
            grad_tokens[:, :1] -= uses[:, :1]
            grad_tokens.scatter_add_(1, labels[rows, None], -uses[:, 1:2])
            grad_durations = durations.softmax(-1) * occupancy - uses[:, 2:]
            yield rows, torch.cat([grad_tokens, grad_durations], 1)

    slope: Callable[[Tensor], Tensor] = lambda hidden: (hidden > 0).double()  # noqa: E731
    grads = joiner_gradients(workload, inputs, hidden_of, slope, gradient_tiles())
    return losses.detach(), grads


def _lengths(workload: Workload) -> list[tuple[int, int]]:
    return list(zip(workload.frames, workload.symbols, strict=True))


def _plain_loss(scores: Tensor) -> Tensor:
    """The loss of one utterance, frame by frame, from (T, U + 1, 2 + K) scores.

    Within a frame, labels of duration 0 make a cumulative logsumexp (see truth.py).
    """
    blank, label, durations = scores[..., 0] - SIGMA, scores[..., 1] - SIGMA, scores[..., 2:]
    frames, columns = blank.shape
    start = torch.full((columns,), IMPOSSIBLE, dtype=scores.dtype, device=scores.device)
    start[0] = 0
    alphas: list[Tensor] = []
    last: list[Tensor] = []
    for t in range(frames + 1):
        arrivals = [start] if t == 0 else []
        for k, frames_of_arc in enumerate(DURATIONS):
            before = t - frames_of_arc
            if frames_of_arc == 0 or before < 0:
                continue
            arc = alphas[before] + durations[before, :, k]
            by_blank, by_label = arc + blank[before], (arc + label[before])[:-1]
            if t == frames:
                last.append(by_blank[-1])
            else:
                arrivals += [by_blank, functional.pad(by_label, (1, 0), value=IMPOSSIBLE)]
        if t == frames:
            break
        alpha = torch.stack(arrivals).logsumexp(0)
        if DURATIONS[0] == 0:
            steps = label[t, :-1] + durations[t, :-1, 0]
            before_column = functional.pad(steps.cumsum(0), (1, 0))
            alpha = before_column + (alpha - before_column).logcumsumexp(0)
        alphas.append(alpha)
    return -torch.stack(last).logsumexp(0)
