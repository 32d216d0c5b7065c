# SPDX-License-Identifier: Apache-2.0
"""Checks of the type of one argument, for all that users call: a TypeError names the argument."""

from __future__ import annotations

import torch
from torch import Tensor


def check_tensor(value: object, name: str) -> None:
    """Raises a TypeError unless `value` is a dense tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")
    if value.is_nested or value.layout != torch.strided:
        kind = "a nested tensor" if value.is_nested else f"layout {value.layout}"
        raise TypeError(f"{name}: expected a dense torch.Tensor (torch.strided), got {kind}")


def check_int(value: object, name: str) -> None:
    """Raises a TypeError unless `value` is an int, which a bool is not."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}")


def check_at_least(minimum: int, **values: object) -> None:
    """Raises a TypeError or ValueError unless each of `values` is an int of at least `minimum`."""
    for name, value in values.items():
        check_int(value, name)
        if value < minimum:  # type: ignore[operator]
            raise ValueError(f"{name} must be at least {minimum}, got {value}")


def check_probability(value: object, name: str) -> None:
    """Raises a TypeError or ValueError unless `value` is a number in [0, 1]."""
    check_number(value, name)
    if not 0 <= value <= 1:  # type: ignore[operator]
        raise ValueError(f"{name} must be in [0, 1], got {value}")


def check_number(value: object, name: str) -> None:
    """Raises a TypeError unless `value` is a real number, a 0-dimensional tensor included."""
    if not (isinstance(value, (int, float)) or hasattr(value, "__float__")):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")


def check_flag(value: object, name: str) -> None:
    """Raises a TypeError unless `value` is a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected a bool, got {type(value).__name__}")
