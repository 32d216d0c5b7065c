# SPDX-License-Identifier: Apache-2.0
"""Peak memory of this process on a device, where the system tells."""

from __future__ import annotations

import contextlib
import ctypes
from pathlib import Path

import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def reset_peak(device: torch.device) -> int:
    """Forget the peak so far; returns the bytes in use now, 0 if unknown."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    with contextlib.suppress(OSError, AttributeError):
        # What an earlier training of this process freed must not hide what this one takes.
        ctypes.CDLL(None).malloc_trim(0)
    with contextlib.suppress(OSError):
        _CLEAR.write_text("5")  # sets the high-water mark of resident memory to the present
    return _status_bytes("VmRSS")


def peak(device: torch.device) -> int:
    """Highest bytes in use since reset_peak; 0 if unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return _status_bytes("VmHWM")


def _status_bytes(name: str) -> int:
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(name)), 0)
