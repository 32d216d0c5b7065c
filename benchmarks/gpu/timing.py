# SPDX-License-Identifier: Apache-2.0
"""Seconds of a step: by CUDA events, and by the profiler, kernel by kernel."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

# About 2 ms: the CPU enqueues a step's kernels behind it, so that its own work is not counted.
LEAD_CYCLES = 4_000_000


def timed(
    run: Callable[..., object],
    prepare: Callable[[], tuple[object, ...]] = tuple,
    repetitions: int = 7,
    budget_s: float = 4.0,
) -> float:
    """Returns the median seconds of run(*prepare()), without prepare, after a warm-up.

    Without a GPU it runs once: a dry run measures nothing.
    """
    run(*prepare())
    if not torch.cuda.is_available():
        repetitions = 1
    seconds = []
    begun_s = time.perf_counter()
    while len(seconds) < repetitions and (not seconds or time.perf_counter() - begun_s < budget_s):
        prepared = prepare()
        seconds.append(elapsed_s(lambda: run(*prepared)))  # noqa: B023
    return statistics.median(seconds)


def elapsed_s(run: Callable[[], object]) -> float:
    """Returns the seconds that the device, or without one the CPU, spends on one call."""
    if not torch.cuda.is_available():
        begun_s = time.perf_counter()
        run()
        return time.perf_counter() - begun_s
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    torch.cuda.synchronize()
    torch.cuda._sleep(LEAD_CYCLES)
    events[0].record()
    run()
    events[1].record()
    torch.cuda.synchronize()
    return events[0].elapsed_time(events[1]) / 1e3


@contextmanager
def arithmetic(mode: str, device: str) -> Iterator[None]:
    """Computes products in "float32" or "tf32", or everything under "bfloat16" autocast."""
    torch.backends.cuda.matmul.allow_tf32 = mode == "tf32"
    with torch.autocast(device, torch.bfloat16, enabled=mode == "bfloat16"):
        yield
    torch.backends.cuda.matmul.allow_tf32 = False


@dataclass(frozen=True)
class Kernel:
    """The device time of one kernel in a run; without a GPU, of one torch operator."""

    name: str
    ms: float
    calls: float


def kernels_of(run: Callable[[], object], runs: int = 1) -> list[Kernel]:
    """Returns the device time of each kernel, memory copies included, a run; longest first."""
    on_gpu = torch.cuda.is_available()
    activity = ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU
    recorded = recorded_events(run, runs, [activity])
    kind = DeviceType.CUDA if on_gpu else DeviceType.CPU
    found = [
        Kernel(
            event.key,
            (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1e3 / runs,
            event.count / runs,
        )
        for event in recorded.key_averages()
        if event.device_type == kind
    ]
    return sorted((kernel for kernel in found if kernel.ms > 0), key=lambda kernel: -kernel.ms)


def host_calls_of(run: Callable[[], object]) -> list[Kernel]:
    """Returns the host's time in each operator and CUDA call of one run; longest first.

    A call that waits for the device, such as cudaStreamSynchronize, counts as long as it waits. The
    profiler slows all of them down.
    """
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    events = recorded_events(run, 1, activities).key_averages()
    calls = [
        Kernel(event.key, event.self_cpu_time_total / 1e3, event.count)
        for event in events
        if event.device_type == DeviceType.CPU
    ]
    return sorted(calls, key=lambda call: -call.ms)


def recorded_events(
    run: Callable[[], object], runs: int, activities: list[ProfilerActivity]
) -> profile:
    with profile(activities=activities) as recorded:
        for _ in range(runs):
            run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    return recorded
