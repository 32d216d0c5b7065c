# SPDX-License-Identifier: Apache-2.0
"""What one writes without any library: log_softmax, one gather, a loop, autograd for the rest.

The loop goes over antidiagonals t + u = n, so that one step is three operations on (B, U + 1).
"""

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks import tdt
from benchmarks.decode import decode_job, one_frame_at_a_time
from benchmarks.jobs import Implementation, LossOfLogits, unpruned
from benchmarks.workloads import Workload

IMPOSSIBLE = -1e30  # log-probability; its differences are numbers, those of -inf are not


def skew(scores: Tensor) -> Tensor:
    """(B, T, U + 1) -> (T + U, B, U + 1): row n holds the cells with t + u = n."""
    batch, num_frames, num_columns = scores.shape
    # Rows one longer than they are read move by one place a row.
    padded = functional.pad(scores.transpose(1, 2), (0, num_columns), value=IMPOSSIBLE)
    width = num_frames + num_columns - 1
    moved = padded.flatten(1)[:, : num_columns * width].view(batch, num_columns, width)
    return moved.permute(2, 0, 1)


def make_loss(workload: Workload) -> LossOfLogits:
    targets, device = workload.targets(), workload.device
    # (B, 1, U + 1, 2): blank and the next label, of no use in the last column
    labels = functional.pad(targets, (0, 1))
    index = torch.stack([torch.zeros_like(labels), labels], -1)[:, None]
    frames = torch.tensor(workload.frames, device=device)
    symbols = torch.tensor(workload.symbols, device=device)
    utterance = torch.arange(len(workload.frames), device=device)

    def loss(logits: Tensor) -> Tensor:
        index_of_cells = index.expand(-1, logits.size(1), -1, -1)
        blank, label = logits.log_softmax(-1).gather(3, index_of_cells).unbind(-1)
        blank, label = skew(blank), skew(label)
        alpha = torch.full_like(blank[0], IMPOSSIBLE)
        alpha[:, 0] = 0
        alphas = [alpha]
        for blank_here, label_here in zip(blank[:-1], label[:-1], strict=True):
            by_label = functional.pad((alpha + label_here)[:, :-1], (1, 0), value=IMPOSSIBLE)
            alpha = torch.logaddexp(alpha + blank_here, by_label)
            alphas.append(alpha)
        last = frames - 1 + symbols, utterance, symbols
        return -(torch.stack(alphas)[last] + blank[last])

    return loss


def make_tdt_loss(workload: Workload) -> LossOfLogits:
    """The same for TDT: an arc of duration d leads d diagonals on, a label's one more."""
    targets, device = workload.targets(), workload.device
    labels = functional.pad(targets, (0, 1))
    index = torch.stack([torch.zeros_like(labels), labels], -1)[:, None]
    frames = torch.tensor(workload.frames, device=device)
    symbols = torch.tensor(workload.symbols, device=device)
    utterance = torch.arange(len(workload.frames), device=device)

    def loss(logits: Tensor) -> Tensor:
        tokens = logits[..., : workload.vocab_size].log_softmax(-1)
        durations = logits[..., workload.vocab_size :].log_softmax(-1)
        tokens = tokens.gather(3, index.expand(-1, logits.size(1), -1, -1)) - tdt.SIGMA
        # (K, T + U, B, U + 1), of all arcs of blank and of the label
        blank, label = (
            torch.stack([skew(tokens[..., arc] + score) for score in durations.unbind(-1)])
            for arc in (0, 1)
        )
        label = functional.pad(label[..., :-1], (1, 0), value=IMPOSSIBLE)  # of the cell it leads to
        start = torch.full_like(blank[0, 0], IMPOSSIBLE)
        start[:, 0] = 0
        alphas = [start]
        by_blank, by_label = [start + blank[:, 0]], [_after(start) + label[:, 0]]
        for step in range(1, blank.size(1)):
            arrivals = []
            for k, duration in enumerate(tdt.DURATIONS):
                if 0 < duration <= step:
                    arrivals.append(by_blank[step - duration][k])
                if duration + 1 <= step:
                    arrivals.append(by_label[step - duration - 1][k])
            alphas.append(torch.stack(arrivals).logsumexp(0))
            by_blank.append(alphas[-1] + blank[:, step])
            by_label.append(_after(alphas[-1]) + label[:, step])
        ends = torch.stack(by_blank)  # (T + U, K, B, U + 1)
        last = []
        for k, duration in enumerate(tdt.DURATIONS):
            if duration > 0:
                step = frames - duration + symbols
                end = ends[step.clamp(min=0), k, utterance, symbols]
                last.append(end.where(frames >= duration, IMPOSSIBLE))
        return -torch.stack(last).logsumexp(0)

    return loss


def _after(alpha: Tensor) -> Tensor:
    """(B, U + 1) -> the same, by the column that a label leads to."""
    return functional.pad(alpha[:, :-1], (1, 0), value=IMPOSSIBLE)


IMPLEMENTATIONS = [
    Implementation(
        "plain torch",
        project="plain_torch",
        module="torch",
        distribution="torch",
        jobs={
            **unpruned(make_loss, packed=False),
            "tdt": lambda workload: tdt.step_job(
                workload, tdt.padded_logits, make_tdt_loss(workload)
            ),
        },
    ),
    Implementation(
        "one frame at a time",
        project="plain_torch",
        module="torch",
        distribution="torch",
        jobs={"decode": lambda workload: decode_job(workload, one_frame_at_a_time)},
    ),
]
