# SPDX-License-Identifier: Apache-2.0
"""What one writes without any library: log_softmax, one gather, a loop, autograd for the rest.

The loop goes over antidiagonals t + u = n, so that one step is three operations on (B, U + 1).
"""

import torch
from torch import Tensor
from torch.nn import functional

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


IMPLEMENTATIONS = [
    Implementation(
        "plain torch",
        project="plain_torch",
        module="torch",
        distribution="torch",
        jobs=unpruned(make_loss, packed=False),
    ),
    Implementation(
        "one frame at a time",
        project="plain_torch",
        module="torch",
        distribution="torch",
        jobs={"decode": lambda workload: decode_job(workload, one_frame_at_a_time)},
    ),
]
