# SPDX-License-Identifier: Apache-2.0
"""Learning-rate schedules, called as ``schedule(optimizer, total_steps=...)``."""

from __future__ import annotations

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from transducer_toolkit.ops.checks import check_number


def warmup_cosine(
    optimizer: Optimizer,
    *,
    total_steps: int,
    warmup_fraction: float = 0.1,
    final_fraction: float = 0.0,
) -> LambdaLR:
    """Rise linearly to the optimizer's learning rate, then fall along half a cosine.

    At step k of K, with W = warmup_fraction * K, the factor is ``(k + 1) / W`` up to W and then
    ``f + (1 - f) * (1 + cos(pi * (k - W) / (K - W))) / 2``. After K it stays at f: batches made
    to a lattice budget may be a few more in one epoch than in another.

    Args:
        optimizer: its learning rate is the peak.
        total_steps: optimizer steps in the whole training, K, at least 1.
        warmup_fraction: part of the steps spent rising, in [0, 1).
        final_fraction: factor reached at the end, f, in [0, 1].

    Returns:
        The scheduler, to be stepped once an optimizer step.

    Raises:
        ValueError: if an argument is out of range.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2.0)
        >>> schedule = warmup_cosine(optimizer, total_steps=100)
        >>> schedule.get_last_lr()
        [0.2]
    """
    _check_ranges(total_steps, warmup_fraction, final_fraction)
    warmup_steps = warmup_fraction * total_steps

    def factor(step: int) -> float:
        if step < warmup_steps:
            return min(1.0, (step + 1) / warmup_steps)
        progress = min(1.0, (step - warmup_steps) / (total_steps - warmup_steps))
        return _between(1.0, final_fraction, progress)

    return LambdaLR(optimizer, factor)


def one_cycle(
    optimizer: Optimizer,
    *,
    total_steps: int,
    warmup_fraction: float = 0.3,
    initial_fraction: float = 0.04,
    final_fraction: float = 4e-6,
) -> LambdaLR:
    """Rise along half a cosine to the optimizer's learning rate, then fall along another.

    The 1cycle policy (Smith and Topin, 2017) in the form of ``torch.optim.lr_scheduler.OneCycleLR``
    and with its defaults, without its cycle of momenta. With ``c(x) = (1 - cos(pi * x)) / 2`` and
    ``W = warmup_fraction * K - 1`` the factor is ``i + (1 - i) * c(k / W)`` up to W and then
    ``1 + (f - 1) * c((k - W) / (K - 1 - W))``. After K - 1 it stays at f, where torch's raises.

    Args:
        optimizer: its learning rate is the peak.
        total_steps: optimizer steps in the whole training, K, at least 1.
        warmup_fraction: part of the steps spent rising, in [0, 1).
        initial_fraction: factor at the start, i, in [0, 1].
        final_fraction: factor reached at the end, f, in [0, 1].

    Returns:
        The scheduler, to be stepped once an optimizer step.

    Raises:
        ValueError: if an argument is out of range.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2.0)
        >>> one_cycle(optimizer, total_steps=100).get_last_lr()
        [0.08]
    """
    _check_ranges(total_steps, warmup_fraction, final_fraction, initial_fraction)
    peak_step = max(0.0, warmup_fraction * total_steps - 1)
    fall_steps = max(1.0, total_steps - 1 - peak_step)

    def factor(step: int) -> float:
        if step < peak_step:
            return _between(initial_fraction, 1.0, step / peak_step)
        return _between(1.0, final_fraction, min(1.0, (step - peak_step) / fall_steps))

    return LambdaLR(optimizer, factor)


def noam(optimizer: Optimizer, *, total_steps: int, warmup_steps: int = 10_000) -> LambdaLR:
    """Rise linearly to the optimizer's learning rate, then fall as one over the square root.

    The factor of step k is ``min((k + 1) / W, sqrt(W / (k + 1)))``: the schedule of "Attention Is
    All You Need" (Vaswani et al., 2017, equation 3) with the peak named. Theirs is
    ``lr = (W * width) ** -0.5``; that of "Conformer" (Gulati et al., 2020) has W = 10,000 and
    ``lr = 0.05 * width ** -0.5``.

    Args:
        optimizer: its learning rate is the peak.
        total_steps: unused; every schedule is called with it.
        warmup_steps: optimizer steps spent rising, W, at least 1.

    Returns:
        The scheduler, to be stepped once an optimizer step.

    Raises:
        ValueError: if ``warmup_steps`` is below 1.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2.0)
        >>> noam(optimizer, total_steps=100, warmup_steps=4).get_last_lr()
        [0.5]
    """
    del total_steps
    check_number(warmup_steps, "warmup_steps")
    if not warmup_steps >= 1:
        raise ValueError(f"warmup_steps must be at least 1, got {warmup_steps}")

    def factor(step: int) -> float:
        return min((step + 1) / warmup_steps, math.sqrt(warmup_steps / (step + 1)))

    return LambdaLR(optimizer, factor)


def constant(optimizer: Optimizer, *, total_steps: int, warmup_steps: int = 0) -> LambdaLR:
    """Rise linearly to the optimizer's learning rate over ``warmup_steps`` and stay there.

    Args:
        optimizer: its learning rate is the plateau.
        total_steps: unused; every schedule is called with it.
        warmup_steps: optimizer steps spent rising.

    Returns:
        The scheduler, to be stepped once an optimizer step.

    Raises:
        ValueError: if ``warmup_steps`` is negative.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2.0)
        >>> constant(optimizer, total_steps=100, warmup_steps=4).get_last_lr()
        [0.5]
    """
    del total_steps
    check_number(warmup_steps, "warmup_steps")
    if not warmup_steps >= 0:
        raise ValueError(f"warmup_steps must not be negative, got {warmup_steps}")
    return LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / max(1, warmup_steps)))


def _between(start: float, end: float, progress: float) -> float:
    """From ``start`` to ``end`` along half a cosine, ``progress`` in [0, 1]."""
    part = (1 + math.cos(math.pi * progress)) / 2
    return part * start + (1 - part) * end  # exact at both ends


def _check_ranges(
    total_steps: int,
    warmup_fraction: float,
    final_fraction: float,
    initial_fraction: float = 0.0,
) -> None:
    if total_steps < 1:
        raise ValueError(f"total_steps must be at least 1, got {total_steps}")
    if not 0 <= warmup_fraction < 1:
        raise ValueError(f"warmup_fraction must be in [0, 1), got {warmup_fraction}")
    for name, value in (("final", final_fraction), ("initial", initial_fraction)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name}_fraction must be in [0, 1], got {value}")
