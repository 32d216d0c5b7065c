# SPDX-License-Identifier: Apache-2.0
"""Prints registers, spills and shared memory of every CUDA kernel.

    python csrc/kernel_report.py 75 90      (default: every architecture of nvcc from 7.5 on)

Compiles with warnings as errors; the exit status says whether a kernel spills.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
_KERNEL = re.compile(r"Compiling entry function '(\S+)' for '(\w+)'")
_STACK = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers")
_SHARED = re.compile(r"(\d+) bytes smem")


def every_architecture() -> list[str]:
    """Of the nvcc at hand, from 7.5 on."""
    listing = subprocess.check_output(["nvcc", "--list-gpu-code"], text=True)
    return [code for code in re.findall(r"sm_(\d+)", listing) if int(code) >= 75]


def compile_one(source: Path, architecture: str, folder: str) -> str:
    """What ptxas says of one file."""
    command = ["nvcc", "-std=c++17", "-O3", f"-arch=sm_{architecture}", "-Werror", "all-warnings"]
    command += ["-Xptxas", "-v", "-Xcompiler", "-Wall,-Wextra", "-c", str(source)]
    command += ["-o", f"{folder}/{source.stem}.o"]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise SystemExit(result.stderr)
    return result.stderr


def readable(names: list[str]) -> dict[str, str]:
    """Kernel names without arguments and namespaces."""
    output = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True)
    short = []
    for line in output.stdout.splitlines():
        line = re.sub(r"transducer::|\(anonymous namespace\)::|^void ", "", line)
        line = line.replace("(Topology)", "topology ")
        short.append(re.sub(r"\(.*\)$", "", line))
    return dict(zip(names, short, strict=True))


def kernels(log: str) -> list[dict[str, object]]:
    """One dict a kernel from ptxas's output."""
    rows: list[dict[str, object]] = []
    for line in log.splitlines():
        if match := _KERNEL.search(line):
            rows.append({"name": match[1], "registers": 0, "stack": 0, "spill": 0, "shared": 0})
        elif rows and (match := _STACK.search(line)):
            rows[-1]["stack"], rows[-1]["spill"] = int(match[1]), int(match[2]) + int(match[3])
        elif rows and (match := _USED.search(line)):
            rows[-1]["registers"] = int(match[1])
            shared = _SHARED.search(line)
            rows[-1]["shared"] = int(shared[1]) if shared else 0
    return rows


def main() -> int:
    architectures = sys.argv[1:] or every_architecture()
    columns = ("registers", "stack", "spill", "shared")
    spilling = 0
    with tempfile.TemporaryDirectory() as folder:
        for architecture in architectures:
            print(f"{f'sm_{architecture}':<52}" + "".join(f"{name:>10}" for name in columns))
            for source in sorted(FOLDER.glob("*_cuda.cu")):
                rows = kernels(compile_one(source, architecture, folder))
                names = readable([str(row["name"]) for row in rows]) if rows else {}
                for row in sorted(rows, key=lambda row: names[str(row["name"])]):
                    spilling += bool(row["spill"])
                    print(
                        f"{names[str(row['name'])]:<52}"
                        + "".join(f"{row[name]:>10}" for name in columns)
                    )
    print(f"{spilling} kernels spill")
    return 1 if spilling else 0


if __name__ == "__main__":
    sys.exit(main())
