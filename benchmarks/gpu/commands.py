# SPDX-License-Identifier: Apache-2.0
"""Output of other programs; imports nothing that has to be compiled first."""

from __future__ import annotations

import subprocess


def output_of(*command: str) -> str | None:
    """Returns the standard output of a command, or None if it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def driver_version() -> str | None:
    """Returns the version of NVIDIA's driver, e.g. "580.159.04"."""
    return output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
