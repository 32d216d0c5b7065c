# SPDX-License-Identifier: Apache-2.0
"""Learning-rate schedules, called as ``schedule(optimizer, total_steps=...)``."""

from __future__ import annotations

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


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
    if total_steps < 1:
        raise ValueError(f"total_steps must be at least 1, got {total_steps}")
    if not 0 <= warmup_fraction < 1:
        raise ValueError(f"warmup_fraction must be in [0, 1), got {warmup_fraction}")
    if not 0 <= final_fraction <= 1:
        raise ValueError(f"final_fraction must be in [0, 1], got {final_fraction}")
    warmup_steps = warmup_fraction * total_steps

    def factor(step: int) -> float:
        if step < warmup_steps:
            return min(1.0, (step + 1) / warmup_steps)
        progress = min(1.0, (step - warmup_steps) / (total_steps - warmup_steps))
        return final_fraction + (1 - final_fraction) * (1 + math.cos(math.pi * progress)) / 2

    return LambdaLR(optimizer, factor)


def constant(optimizer: Optimizer, *, total_steps: int, warmup_steps: int = 0) -> LambdaLR:
    """Rise linearly to the optimizer's learning rate over ``warmup_steps`` and stay there.

    Args:
        optimizer: its learning rate is the plateau.
        total_steps: unused; every schedule is called with it.
        warmup_steps: optimizer steps spent rising.

    Returns:
        The scheduler, to be stepped once an optimizer step.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2.0)
        >>> constant(optimizer, total_steps=100, warmup_steps=4).get_last_lr()
        [0.5]
    """
    del total_steps
    return LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / max(1, warmup_steps)))
