# SPDX-License-Identifier: Apache-2.0
"""Prints what this machine has of what the other stages of all.sh need.

python3 -m benchmarks.gpu.environment
"""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shutil
import sysconfig

import torch

from benchmarks.gpu.commands import driver_version, output_of

TOOLS = ("nvidia-smi", "nvcc", "cmake", "ninja", "make", "c++", "ncu", "compute-sanitizer")
PACKAGES = ("numpy", "pytest", "xdist", "hypothesis", "filelock", "pybind11", "torchaudio", "numba")


def main() -> None:
    print(output_of("nvidia-smi") or "nvidia-smi: no output")
    tools = {name: shutil.which(name) for name in TOOLS}
    packages = {name: importlib.util.find_spec(name) is not None for name in PACKAGES}
    headers = os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h"))
    for name, path in tools.items():
        print(f"{name:<20}{path or 'not on PATH'}")
    nvcc = re.search(r"release ([\d.]+)", output_of("nvcc", "--version") or "")
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    missing = [name for name, path in tools.items() if path is None]
    missing += [name for name, is_there in packages.items() if not is_there]
    missing += [] if headers else ["Python.h"]
    print(
        f"figures: {gpu}, driver {driver_version() or 'unknown'}, torch {torch.__version__}, "
        f"nvcc {nvcc[1] if nvcc else 'none'}, Python {platform.python_version()}, "
        f"{os.cpu_count()} cores; missing: {', '.join(missing) or 'nothing'}"
    )


if __name__ == "__main__":
    main()
