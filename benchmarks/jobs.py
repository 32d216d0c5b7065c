# SPDX-License-Identifier: Apache-2.0
"""What is measured: `loss` (logits given), `step` (joiner and loss) and `pruned` (two stages).

An adapter says how a project's loss is called on logits; the jobs around it are the same for all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.workloads import Workload

# Losses (B,), or their sum where an implementation gives no more, and the gradients of the sum.
Outcome = tuple[Tensor, tuple[Tensor, ...]]
LossOfLogits = Callable[[Tensor], Tensor]
LogitsOfInputs = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

LM_ONLY_SCALE, AM_ONLY_SCALE = 0.25, 0.0  # of the smoothed loss, as icefall's recipes have it


@dataclass(frozen=True)
class Job:
    """Forward and backward once: `run` gets what `prepare` made, which is not measured."""

    run: Callable[[Any], Outcome]
    prepare: Callable[[], Any] = lambda: None


@dataclass(frozen=True)
class Implementation:
    """A row of the tables.

    Attributes:
        name: as printed.
        project: what --peers selects; "ours" is always measured.
        module: the module it needs.
        jobs: suite -> what makes the job from a workload.
        needs: attributes that the module must have; without them it is reported as absent.
        distribution: what the module's version is asked of.
    """

    name: str
    project: str
    module: str
    jobs: dict[str, Callable[[Workload], Job]] = field(default_factory=dict)
    needs: tuple[str, ...] = ()
    distribution: str = ""


def loss_job(
    workload: Workload, loss: LossOfLogits, *, packed: bool, overwrites: bool = False
) -> Job:
    """Logits -> losses and gradient of the logits, packed or padded.

    Args:
        overwrites: the loss destroys its logits, so that every run needs a fresh copy.
    """
    logits = workload.logits()
    leaf = (logits if packed else workload.shape.unpack(logits)).requires_grad_()

    def run(logits: Tensor) -> Outcome:
        losses = loss(logits)
        return losses.detach(), torch.autograd.grad(losses.sum(), logits)

    return Job(run, (lambda: leaf + 0) if overwrites else (lambda: leaf))


def step_job(workload: Workload, logits_of: LogitsOfInputs, loss: LossOfLogits) -> Job:
    """enc, pred, weight, bias -> losses and the gradients of all four."""
    return step_job_of(workload.joiner_inputs(), lambda *inputs: loss(logits_of(*inputs)))


def step_job_of(inputs: Sequence[Tensor], losses_of: Callable[..., Tensor]) -> Job:
    """Inputs of a joiner -> losses and the gradients of all inputs."""
    inputs = [tensor.requires_grad_() for tensor in inputs]

    def run(_: None) -> Outcome:
        losses = losses_of(*inputs)
        return losses.detach(), torch.autograd.grad(losses.sum(), inputs)

    return Job(run)


def padded_logits(enc: Tensor, pred: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """(B, T, U + 1, V): what every project without a packed layout has to make."""
    return functional.linear((enc[:, :, None] + pred[:, None]).tanh_(), weight, bias)


def unpruned(
    make_loss: Callable[[Workload], LossOfLogits],
    *,
    packed: bool,
    overwrites: bool = False,
    make_logits: Callable[[Workload], LogitsOfInputs] = lambda workload: padded_logits,
) -> dict[str, Callable[[Workload], Job]]:
    """The suites `loss` and `step` of a loss on logits."""
    return {
        "loss": lambda workload: loss_job(
            workload, make_loss(workload), packed=packed, overwrites=overwrites
        ),
        "step": lambda workload: step_job(workload, make_logits(workload), make_loss(workload)),
    }


def pruned_job(
    workload: Workload,
    api: ModuleType,
    fused: Callable[..., Tensor] | None = None,
) -> Job:
    """The two stages of pruned training, in functions of k2's names.

    enc and pred -> simple joiner's am and lm -> smoothed loss and posteriors -> ranges -> joiner on
    the band -> pruned loss; forward and backward of the sum of both losses. `fused`, if given, does
    everything after the ranges.

    Everyone finds windows, but the joiner works on the same: which of two windows with all of the
    mass is better is decided by the last digit, and losses on different windows cannot be compared.
    """
    boundary = boundary_of(workload)
    symbols, blank = workload.targets(), 0
    shape = workload.shape
    inputs = [*workload.joiner_inputs(), *workload.simple_projections()]
    for tensor in inputs:
        tensor.requires_grad_()
    common_ranges = exact_ranges(workload)

    def run(_: None) -> Outcome:
        enc, pred, weight, bias, am_projection, lm_projection = inputs
        simple, (px_grad, py_grad) = api.rnnt_loss_smoothed(
            lm=functional.linear(pred, lm_projection),
            am=functional.linear(enc, am_projection),
            symbols=symbols,
            termination_symbol=blank,
            lm_only_scale=LM_ONLY_SCALE,
            am_only_scale=AM_ONLY_SCALE,
            boundary=boundary,
            reduction="none",
            return_grad=True,
        )
        api.get_rnnt_prune_ranges(px_grad, py_grad, boundary, workload.band_width)
        ranges = common_ranges
        if fused is not None:
            lengths = shape.logit_lengths, shape.target_lengths
            pruned = fused(
                enc, pred, weight, bias, symbols, *lengths, blank, ranges=ranges, reduction="none"
            )
        else:
            am_pruned, lm_pruned = api.do_rnnt_pruning(am=enc, lm=pred, ranges=ranges)
            logits = functional.linear((am_pruned + lm_pruned).tanh_(), weight, bias)
            del am_pruned, lm_pruned
            pruned = api.rnnt_loss_pruned(
                logits=logits,
                symbols=symbols,
                ranges=ranges,
                termination_symbol=blank,
                boundary=boundary,
                reduction="none",
            )
            del logits
        losses = torch.cat([simple, pruned])
        return losses.detach(), torch.autograd.grad(losses.sum(), inputs)

    return Job(run)


def exact_ranges(workload: Workload) -> Tensor:
    """(B, T, R) windows from posteriors in float64."""
    from transducer_toolkit import get_rnnt_prune_ranges, rnnt_loss_smoothed

    enc, pred, _, _ = workload.joiner_inputs()
    am_projection, lm_projection = workload.simple_projections()
    boundary = boundary_of(workload)
    with torch.no_grad():
        _, (px_grad, py_grad) = rnnt_loss_smoothed(
            functional.linear(pred.double(), lm_projection.double()),
            functional.linear(enc.double(), am_projection.double()),
            workload.targets(),
            0,
            LM_ONLY_SCALE,
            AM_ONLY_SCALE,
            boundary,
            return_grad=True,
        )
    return get_rnnt_prune_ranges(px_grad, py_grad, boundary, workload.band_width)


def boundary_of(workload: Workload) -> Tensor:
    """(B, 4) int64 [0, 0, U_b, T_b], as k2 wants it."""
    boundary = torch.zeros(len(workload.frames), 4, dtype=torch.int64)
    boundary[:, 2] = torch.tensor(workload.symbols)
    boundary[:, 3] = torch.tensor(workload.frames)
    return boundary.to(workload.device)


def int32_indices(workload: Workload) -> tuple[Tensor, Tensor, Tensor]:
    """Targets, logit lengths and target lengths as most peers want them."""
    shape, targets = workload.shape, workload.targets()
    tensors = targets, shape.logit_lengths, shape.target_lengths
    return tuple(tensor.int().to(targets.device) for tensor in tensors)  # type: ignore[return-value]
