# SPDX-License-Identifier: Apache-2.0
"""Peak memory of this process on the CPU (Linux only) or on a CUDA device."""

from __future__ import annotations

import contextlib
import ctypes
from pathlib import Path

import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def reset_peak(device: torch.device) -> int:
    """Resets the peak and returns the bytes in use now, or 0 if the system does not report them."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    with contextlib.suppress(OSError, AttributeError):
        # Return freed heap memory to the system: resident pages that an earlier training freed
        # would hide the memory that this one allocates.
        ctypes.CDLL(None).malloc_trim(0)
    with contextlib.suppress(OSError):
        _CLEAR.write_text("5")  # resets VmHWM to the present resident memory, see proc(5)
    return _status_bytes("VmRSS")


def peak(device: torch.device) -> int:
    """Returns the peak bytes in use since :func:`reset_peak`, or 0 if unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return _status_bytes("VmHWM")


def _status_bytes(name: str) -> int:
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(name)), 0)
