# SPDX-License-Identifier: Apache-2.0
"""Tensors that are copied to a device when they are first needed there."""

from __future__ import annotations

from typing import Any, Generic, TypeVar

import torch

Tables = TypeVar("Tables", bound=Any)  # a NamedTuple of tensors

__all__ = ["DeviceCopies"]


class DeviceCopies(Generic[Tables]):
    """A named tuple of tensors, with a copy on each device that uses it.

    Args:
        tables: a NamedTuple of tensors on the CPU.
    """

    def __init__(self, tables: Tables) -> None:
        self._copies: dict[torch.device, Tables] = {torch.device("cpu"): tables}

    def on(self, device: torch.device) -> Tables:
        """Returns the tensors on a device."""
        if device not in self._copies:
            tables = self._copies[torch.device("cpu")]
            self._copies[device] = type(tables)(*(table.to(device) for table in tables))
        return self._copies[device]
