# SPDX-License-Identifier: Apache-2.0
"""The float64 reference that the results of a call are compared with.

It knows no rule about arguments: it is asked only about calls that the package accepts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from transducer_toolkit.losses.reference import (
    arc_scores,
    duration_loss,
    hat_log_probs,
    path_sum,
)
from transducer_toolkit.ops.topology import Topology, get_topology

LARGE = 1e4  # logits beyond it: differences of them have no digits left


class Undefined(Exception):
    """There is no right result: the call should have raised an error."""


class Undecided(Exception):
    """The reference says nothing: rounding or the order of sums decides."""


@dataclass
class Expected:
    """A result. Elements where `counts` is False are not compared.

    The error allowed is absolute + relative * abs(value).
    """

    value: Tensor
    absolute: float = 0.0
    relative: float = 0.0
    counts: Tensor | None = None


Results = dict[str, Expected]


def defined(condition: bool) -> None:
    """Raise :class:`Undefined` unless the condition holds."""
    if not condition:
        raise Undefined


def number(x: float) -> float:
    """A factor in a formula; Undecided for one so large that no digits are left."""
    defined(math.isfinite(x))
    if abs(x) > 1e3:
        raise Undecided
    return float(x)


# --- one lattice --------------------------------------------------------------------------------


class _ScaledGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad * ctx.scale, None


class _GivenGradient(torch.autograd.Function):
    """A number whose gradient is known."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor, grad: Tensor) -> Tensor:
        ctx.save_for_backward(grad)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, weight: Tensor) -> Any:
        (grad,) = ctx.saved_tensors
        return (torch.zeros_like(grad) if weight == 0 else grad * weight), None, None


@dataclass
class Options:
    """What changes the loss of a lattice or its gradient."""

    blank: int
    topology: str = "regular"
    from_log_softmax: bool = False
    fastemit_lambda: float = 0.0
    delay_penalty: float = 0.0
    clamp: float = 0.0
    normalization: str = "softmax"
    sigma: float = 0.0


@dataclass
class Solution:
    """Of one utterance: the loss, differentiable, and the posteriors of its arcs."""

    loss: Tensor
    label_posterior: Tensor
    blank_posterior: Tensor


def _constant(logits: Tensor, loss: float, grad: float, exists: Tensor) -> Solution:
    """The same gradient and posterior for every cell."""
    value = torch.tensor(loss, dtype=torch.float64)
    cells = torch.where(exists, grad, 0.0).double()
    grads = torch.where(exists[..., None], torch.full_like(logits, grad), 0.0)
    return Solution(_GivenGradient.apply(logits, value, grads), cells[:, :-1], cells)


def solve(
    logits: Tensor,
    targets: Tensor,
    options: Options,
    *,
    exists: Tensor | None = None,
    may_label: Tensor | None = None,
    begin: int = 0,
) -> Solution:
    """The loss of logits (T, U + 1, V) float64; of a band, cells that do not exist are False.

    With durations, the logits have their columns behind V. may_label (T, U): the label arcs.
    """
    x = logits.detach().requires_grad_()
    topology = get_topology(options.topology)
    everywhere = torch.ones(x.shape[:2], dtype=torch.bool)
    exists = everywhere if exists is None else exists
    log_probs = x
    if not options.from_log_softmax:
        if not _have_normalizers(x[exists].detach(), options, topology):
            return _constant(logits, math.nan, math.nan, exists)
        log_probs = _log_probs(torch.where(exists[..., None], x, 0.0), options, topology)
    if options.normalization == "hat" and bool((targets == options.blank).any()):
        return _constant(logits, math.nan, math.nan, exists)
    log_probs = torch.where(exists[..., None], log_probs, -math.inf)
    if topology.num_extra:
        return _solve_durations(logits, x, log_probs, targets, options)
    blank, label = arc_scores(
        log_probs, targets, options.blank, options.topology, options.delay_penalty
    )
    if may_label is not None:
        label = torch.where(may_label, label, -math.inf)
    picked = torch.cat([blank.detach().flatten(), label.detach().flatten()])
    if picked.isnan().any() or (picked == math.inf).any():
        return _constant(logits, math.nan, math.nan, exists)
    gain = 1 + options.fastemit_lambda
    loss = -path_sum(blank, _ScaledGradient.apply(label, gain), options.topology)
    if loss == math.inf:
        return _constant(logits, math.inf, 0.0, exists)
    label_grad, blank_grad, grad = (
        torch.zeros_like(wanted) if part is None else part
        for wanted, part in zip(
            (label, blank, x),
            torch.autograd.grad(loss, (label, blank, x), allow_unused=True),
            strict=True,
        )
    )
    if topology.label_takes_blank:  # without the blanks of label arcs
        blank_grad = blank_grad.clone()
        blank_grad[:, 1:] -= label_grad
    if options.clamp > 0:
        grad = grad.clamp(-options.clamp, options.clamp)
    loss = loss.detach() + options.delay_penalty * len(targets) * begin / 2
    return Solution(_GivenGradient.apply(logits, loss, grad), -label_grad / gain, -blank_grad)


def _have_normalizers(rows: Tensor, options: Options, topology: Topology) -> bool:
    """Whether each softmax of the rows (N, V + K) has a sum that is a number."""
    softmaxes = list(rows.tensor_split([rows.size(-1) - topology.num_durations], -1))
    if not topology.num_durations:
        softmaxes.pop()
    if options.normalization == "hat":
        is_label = torch.arange(softmaxes[0].size(-1)) != options.blank
        softmaxes[0] = softmaxes[0][:, is_label]
    return not bool(
        rows.isnan().any()
        or (rows == math.inf).any()
        or any((part == -math.inf).all(-1).any() for part in softmaxes)
    )


def _log_probs(x: Tensor, options: Options, topology: Topology) -> Tensor:
    symbols, durations = x.tensor_split([x.size(-1) - topology.num_durations], -1)
    if options.normalization == "hat":
        symbols = hat_log_probs(symbols, options.blank)
    else:
        symbols = symbols.log_softmax(-1)
    return torch.cat([symbols - options.sigma, durations.log_softmax(-1)], -1)


def _solve_durations(
    logits: Tensor, x: Tensor, log_probs: Tensor, targets: Tensor, options: Options
) -> Solution:
    """As :func:`solve`, of arcs that advance several frames; it knows no posteriors."""
    topology = get_topology(options.topology)
    num_frames, num_symbols = len(log_probs), log_probs.size(-1) - topology.num_durations
    of_duration = log_probs[..., num_symbols:]
    index = torch.cat([targets.long(), targets.new_zeros(1).long()]).expand(num_frames, -1)
    label = log_probs.gather(2, index[..., None])
    frames = torch.arange(num_frames, dtype=torch.float64)
    label = label + options.delay_penalty * ((num_frames - 1) / 2 - frames)[:, None, None]
    if topology.num_durations:
        num_zero = len(topology.label_durations) - len(topology.blank_durations)
        blank = log_probs[..., options.blank, None] + of_duration[..., num_zero:]
        label = label + of_duration
    else:
        big_blanks = [options.blank - 1 - i for i in range(topology.num_big_blanks)]
        blank = log_probs[..., [options.blank, *big_blanks]]
    label = _ScaledGradient.apply(label, 1 + options.fastemit_lambda)
    loss = duration_loss(blank, label, topology, enumerate_paths=False)
    everywhere = torch.ones(x.shape[:2], dtype=torch.bool)
    if not bool(loss.isfinite()):
        grad = 0.0 if loss == math.inf else math.nan
        return _constant(logits, float(loss.detach()), grad, everywhere)
    (grad,) = torch.autograd.grad(loss, x)
    if options.clamp > 0:
        grad = grad.clamp(-options.clamp, options.clamp)
    none = torch.full((num_frames, len(targets) + 1), math.nan, dtype=torch.float64)
    return Solution(_GivenGradient.apply(logits, loss.detach(), grad), none[:, 1:], none)


def nothing(like: Tensor) -> Tensor:
    """The NaN loss of an utterance that makes no sense; its gradient is not compared."""
    return like.sum() * math.nan


# --- numbers to compare -------------------------------------------------------------------------


def largest(*tensors: Tensor) -> float:
    """The largest finite magnitude, at least 1."""
    finite = [x.detach().double().abs()[x.isfinite()] for x in tensors]
    return max([1.0, *(float(x.max()) for x in finite if x.numel())])


def eps_of(dtype: torch.dtype) -> float:
    """Of the arithmetic: 16-bit logits are computed in float32."""
    return torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps


def reduced(losses: Sequence[Tensor], reduction: str) -> Tensor:
    values = torch.stack(list(losses))
    return {"none": lambda: values, "mean": values.mean, "sum": values.sum}[reduction]()


def loss_results(
    losses: Sequence[Tensor],
    reduction: str,
    weights: Tensor,
    inputs: dict[str, tuple[Tensor, Tensor]],
    *,
    cells: float,
    eps: float,
    with_grad: bool = True,
) -> Results:
    """The reduced loss and its gradients.

    Args:
        losses: of each utterance.
        reduction: as everywhere.
        weights: (B,), of the losses; the first one if there is one loss.
        inputs: by name, the argument and its float64 twin that the losses come from.
        cells: T + U at most, how many terms a path sums up.
        eps: of the arithmetic.
        with_grad: gradients too.
    """
    loss = reduced(losses, reduction)
    size = largest(*(x for x, _ in inputs.values()))
    finite = [abs(float(x)) for x in losses if math.isfinite(x)]
    results = {"loss": Expected(loss.detach(), 16 * eps * (cells * size + sum(finite)))}
    if not with_grad or size > LARGE:
        return results
    weighted = (loss * (weights[: len(losses)] if reduction == "none" else weights[0])).sum()
    twins = [twin for _, twin in inputs.values()]
    grads = torch.autograd.grad(weighted, twins, allow_unused=True, retain_graph=True)
    is_finite = all(bool(x.isfinite().all()) for x, _ in inputs.values())
    for (name, (x, twin)), grad in zip(inputs.items(), grads, strict=True):
        grad = torch.zeros_like(twin) if grad is None else grad
        fine = torch.finfo(x.dtype).eps if x.element_size() == 2 else 0.0
        scale = float(weights.abs().max()) * largest(grad) * size
        error = 256 * eps * scale + (1e-7 if fine else 0.0)
        counts = None if is_finite else grad.isfinite()
        results[f"gradient of {name}"] = Expected(grad, error, fine, counts)
    return results


def twin(x: Tensor) -> Tensor:
    """The same numbers in float64, to differentiate by."""
    return x.detach().double().clone().requires_grad_()
