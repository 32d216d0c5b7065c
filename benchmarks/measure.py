# SPDX-License-Identifier: Apache-2.0
"""One measurement in a process of its own: JSON on stdin, JSON on the last line of stdout."""

from __future__ import annotations

import gc
import json
import resource
import statistics
import sys
import time
from pathlib import Path

import torch

from benchmarks.implementations import SUITES, Job
from benchmarks.workloads import Workload


def resident_bytes() -> int:
    """Resident memory of this process now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def reset_peak() -> None:
    """Sets the kernel's high-water mark of resident memory back to the present."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_bytes() -> int:
    """The high-water mark since reset_peak."""
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def measure(job: Job, repetitions: int) -> dict[str, float | list[float]]:
    """Median and spread of seconds, and peak memory above what was there before the run."""
    job.run(job.prepare())  # warm-up: threads, allocator, caches of the libraries
    seconds, peaks = [], []
    for _ in range(repetitions):
        prepared = job.prepare()
        gc.collect()
        reset_peak()
        before = resident_bytes()
        start = time.perf_counter()
        result = job.run(prepared)
        seconds.append(time.perf_counter() - start)
        peaks.append(peak_bytes() - before)
    losses, grad = result
    return {
        "seconds": statistics.median(seconds),
        "seconds_range": [min(seconds), max(seconds)],
        "peak_bytes": statistics.median(peaks),
        "losses": losses.tolist(),
        # The same number for packed and padded gradients: padding is zero.
        "grad_norm": grad.double().norm().item(),
    }


def main() -> None:
    request = json.load(sys.stdin)
    torch.set_num_threads(request["threads"])
    torch.set_flush_denormal(request["flush_denormal"])
    workload = Workload(**request["workload"])
    job = SUITES[request["suite"]][request["implementation"]](workload)
    print(json.dumps(measure(job, request["repetitions"])))


if __name__ == "__main__":
    main()
