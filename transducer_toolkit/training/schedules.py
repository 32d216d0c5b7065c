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
    """Returns a schedule that rises linearly to the peak, then falls along half a cosine.

    At step k of K, with W = warmup_fraction * K, the factor is ``(k + 1) / W`` up to W and then
    ``f + (1 - f) * (1 + cos(pi * (k - W) / (K - W))) / 2``. After step K, the factor stays at f.
    (A training may take a few more steps than K, because the number of batches differs between
    epochs.)

    Args:
        optimizer: the optimizer; its learning rate is the peak.
        total_steps: optimizer steps in the whole training, K, at least 1.
        warmup_fraction: fraction of the steps in which the rate rises, in [0, 1).
        final_fraction: final factor f, in [0, 1].

    Returns:
        The scheduler. Call its ``step`` once per optimizer step.

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
    """Returns a schedule that rises to the peak along half a cosine, then falls along another.

    This is the 1cycle policy (Smith and Topin, 2017) with the formula and the defaults of
    ``torch.optim.lr_scheduler.OneCycleLR``, but without its cycle of momenta. With
    ``c(x) = (1 - cos(pi * x)) / 2`` and ``W = warmup_fraction * K - 1``, the factor is
    ``i + (1 - i) * c(k / W)`` up to W and then ``1 + (f - 1) * c((k - W) / (K - 1 - W))``. After
    step K - 1 it stays at f; torch's scheduler raises an error there.

    Args:
        optimizer: the optimizer; its learning rate is the peak.
        total_steps: optimizer steps in the whole training, K, at least 1.
        warmup_fraction: fraction of the steps in which the rate rises, in [0, 1).
        initial_fraction: initial factor i, in [0, 1].
        final_fraction: final factor f, in [0, 1].

    Returns:
        The scheduler. Call its ``step`` once per optimizer step.

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
    """Returns a schedule that rises linearly to the peak, then falls as ``1 / sqrt(step)``.

    The factor of step k is ``min((k + 1) / W, sqrt(W / (k + 1)))``. This is the schedule of
    "Attention Is All You Need" (Vaswani et al., 2017, equation 3), except that the optimizer gives
    the peak. The peak of that paper is ``lr = (W * width) ** -0.5``. "Conformer" (Gulati et al.,
    2020) uses W = 10,000 and ``lr = 0.05 * width ** -0.5``.

    Args:
        optimizer: the optimizer; its learning rate is the peak.
        total_steps: unused. Every schedule takes it.
        warmup_steps: optimizer steps in which the rate rises, W, at least 1.

    Returns:
        The scheduler. Call its ``step`` once per optimizer step.

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
        raise ValueError(f"warmup_steps: expected at least 1, got {warmup_steps}")

    def factor(step: int) -> float:
        return min((step + 1) / warmup_steps, math.sqrt(warmup_steps / (step + 1)))

    return LambdaLR(optimizer, factor)


def constant(optimizer: Optimizer, *, total_steps: int, warmup_steps: int = 0) -> LambdaLR:
    """Returns a schedule that rises linearly for ``warmup_steps`` and is constant afterwards.

    Args:
        optimizer: the optimizer; its learning rate is the constant.
        total_steps: unused. Every schedule takes it.
        warmup_steps: optimizer steps in which the rate rises, at least 0.

    Returns:
        The scheduler. Call its ``step`` once per optimizer step.

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
        raise ValueError(f"warmup_steps: expected at least 0, got {warmup_steps}")
    return LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / max(1, warmup_steps)))


def _between(start: float, end: float, progress: float) -> float:
    """Interpolates from ``start`` to ``end`` along half a cosine, ``progress`` in [0, 1]."""
    part = (1 + math.cos(math.pi * progress)) / 2
    return part * start + (1 - part) * end  # exact at both ends


def _check_ranges(
    total_steps: int,
    warmup_fraction: float,
    final_fraction: float,
    initial_fraction: float = 0.0,
) -> None:
    if total_steps < 1:
        raise ValueError(f"total_steps: expected at least 1, got {total_steps}")
    if not 0 <= warmup_fraction < 1:
        raise ValueError(f"warmup_fraction: expected a number in [0, 1), got {warmup_fraction}")
    for name, value in (("final", final_fraction), ("initial", initial_fraction)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name}_fraction: expected a number in [0, 1], got {value}")
