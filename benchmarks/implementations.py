# SPDX-License-Identifier: Apache-2.0
"""The same two jobs by every implementation: `loss` (logits given) and `step` (joiner and loss)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.workloads import Workload


@dataclass(frozen=True)
class Job:
    """Forward and backward once.

    `run` gets what `prepare` made, which is neither timed nor counted as memory, and returns the
    losses (B,) and a gradient to compare: of the logits for `loss`, packed or padded; of the output
    layer's weight for `step`.
    """

    run: Callable[[Any], tuple[Tensor, Tensor]]
    prepare: Callable[[], Any] = lambda: None


def _ours_loss(workload: Workload, *, inplace: bool) -> Job:
    from transducer_toolkit import transducer_loss

    shape, targets = workload.shape, workload.targets()
    indices = targets, shape.logit_lengths, shape.target_lengths
    leaf = workload.logits().requires_grad_()

    def run(logits: Tensor) -> tuple[Tensor, Tensor]:
        losses = transducer_loss(logits, *indices, blank=0, reduction="none", inplace=inplace)
        return losses.detach(), torch.autograd.grad(losses.sum(), logits)[0]

    return Job(run, lambda: leaf + 0)


def _torchaudio_loss(workload: Workload) -> Job:
    from torchaudio.functional import rnnt_loss

    shape, targets = workload.shape, workload.targets().int()
    leaf = shape.unpack(workload.logits()).requires_grad_()
    lengths = shape.logit_lengths.int(), shape.target_lengths.int()

    def run(_: None) -> tuple[Tensor, Tensor]:
        losses = rnnt_loss(leaf, targets, *lengths, blank=0, reduction="none")
        return losses.detach(), torch.autograd.grad(losses.sum(), leaf)[0]

    return Job(run)


def _ours_step(workload: Workload, *, inplace: bool) -> Job:
    from transducer_toolkit import joiner_logits, transducer_loss

    shape, targets = workload.shape, workload.targets()
    inputs = [tensor.requires_grad_() for tensor in workload.joiner_inputs()]

    def run(_: None) -> tuple[Tensor, Tensor]:
        enc, pred, weight, bias = inputs
        logits = joiner_logits(enc, pred, weight, bias, shape)
        losses = transducer_loss(
            logits,
            targets,
            shape.logit_lengths,
            shape.target_lengths,
            blank=0,
            reduction="none",
            inplace=inplace,
        )
        del logits
        return losses.detach(), torch.autograd.grad(losses.sum(), inputs)[2]

    return Job(run)


def _torchaudio_step(workload: Workload) -> Job:
    from torchaudio.functional import rnnt_loss

    shape, targets = workload.shape, workload.targets().int()
    lengths = shape.logit_lengths.int(), shape.target_lengths.int()
    inputs = [tensor.requires_grad_() for tensor in workload.joiner_inputs()]

    def run(_: None) -> tuple[Tensor, Tensor]:
        enc, pred, weight, bias = inputs
        logits = functional.linear(torch.tanh(enc[:, :, None] + pred[:, None]), weight, bias)
        losses = rnnt_loss(logits, targets, *lengths, blank=0, reduction="none")
        del logits
        return losses.detach(), torch.autograd.grad(losses.sum(), inputs)[2]

    return Job(run)


SUITES: dict[str, dict[str, Callable[[Workload], Job]]] = {
    "loss": {
        "torchaudio": _torchaudio_loss,
        "packed": lambda workload: _ours_loss(workload, inplace=False),
        "packed, inplace": lambda workload: _ours_loss(workload, inplace=True),
    },
    "step": {
        "torchaudio": _torchaudio_step,
        "packed": lambda workload: _ours_step(workload, inplace=False),
        "packed, inplace": lambda workload: _ours_step(workload, inplace=True),
    },
}
