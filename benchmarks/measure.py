# SPDX-License-Identifier: Apache-2.0
"""One measurement in a process of its own: JSON on stdin, JSON on the last line of stdout."""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import resource
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import decode, tdt, truth
from benchmarks.agreement import Signature, signature
from benchmarks.jobs import Implementation, Job
from benchmarks.peers import Absent, implementations, require_present
from benchmarks.precision import largest_error, scaled
from benchmarks.workloads import Workload

BUDGET_S = 30.0  # a process that has measured for so long stops repeating
GEMM_TILE_CELLS = 4096


class HostMemory:
    """Time and resident memory of this process.

    Args:
        clock: "wall", or "cpu": processor time of all threads, which busy neighbors do not change.
    """

    def __init__(self, clock: str) -> None:
        self.now_s = time.process_time if clock == "cpu" else time.perf_counter

    def empty(self) -> None:
        """Give back what malloc keeps for later: it would hide as much of what comes."""
        ctypes.CDLL(None).malloc_trim(0)

    def start(self) -> None:
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark is now the present
        self.before = self._status("VmRSS")
        self.start_s = self.now_s()

    def stop(self) -> tuple[float, int]:
        """Seconds since start, and peak bytes above what there was at start."""
        elapsed_s = self.now_s() - self.start_s
        return elapsed_s, self._status("VmHWM") - self.before

    @staticmethod
    def _status(field: str) -> int:
        status = Path("/proc/self/status").read_text().splitlines()
        line = next(line for line in status if line.startswith(field))
        return int(line.split()[1]) * 1024


class DeviceMemory:
    """Time by events, and memory by torch's allocator."""

    def empty(self) -> None:
        """Nothing to do: the allocator counts what is in use, not what it keeps."""

    def start(self) -> None:
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        self.before = torch.cuda.memory_allocated()
        self.events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        self.events[0].record()

    def stop(self) -> tuple[float, int]:
        self.events[1].record()
        torch.cuda.synchronize()
        elapsed_s = self.events[0].elapsed_time(self.events[1]) / 1e3
        return elapsed_s, torch.cuda.max_memory_allocated() - self.before


def measure(
    job: Job, repetitions: int, device: str, clock: str = "wall"
) -> tuple[dict[str, Any], Any]:
    """Seconds and peak bytes of a job, and what its last run returned.

    The first run warms up threads, caches and compilers of the libraries. The second is measured
    for memory, with an empty heap; it must ask the system for every page again, so its time does
    not count. The others are timed in the state that a training is in.
    """
    meter = DeviceMemory() if device == "cuda" else HostMemory(clock)
    seconds: list[float] = []
    gc.freeze()  # what is imported is no garbage: a collection takes 0.4 s with it
    begun_s = time.perf_counter()

    def run() -> tuple[float, int, Any]:
        prepared = job.prepare()
        meter.start()
        result = job.run(prepared)
        return *meter.stop(), result

    warm_up = run()[:2]
    meter.empty()
    _, peak_bytes, result = run()
    while len(seconds) < repetitions:
        del result
        elapsed_s, _, result = run()
        seconds.append(elapsed_s)
        if time.perf_counter() - begun_s > BUDGET_S:
            break
    measured = {
        "seconds": statistics.median(seconds),
        "peak_bytes": peak_bytes,
        "all_seconds": seconds,
        "warm_up": {"seconds": warm_up[0], "peak_bytes": warm_up[1]},
    }
    return measured, result


def gemm_unit(workload: Workload, num_cells: int) -> Callable[[Any], None]:
    """One (cells, D) x (D, V) product in tiles: the step's unit of arithmetic."""
    _, _, weight, _ = workload.joiner_inputs()
    tile_cells = min(GEMM_TILE_CELLS, num_cells)
    hidden = torch.rand(tile_cells, workload.joiner_dim).to(workload.device)
    logits = torch.empty(tile_cells, workload.vocab_size, device=workload.device)

    def run(_: None) -> None:
        for start in range(0, num_cells, tile_cells):
            rows = min(tile_cells, num_cells - start)
            torch.mm(hidden[:rows], weight.T, out=logits[:rows])

    return run


def copy_of_logits(workload: Workload) -> Callable[[Any], None]:
    """Logits read and as much written: the least that a loss and its gradient move."""
    logits = workload.logits()
    copy = torch.zeros_like(logits)
    return lambda _: copy.copy_(logits)


def floor(suite: str, workload: Workload, repetitions: int, clock: str) -> dict[str, Any]:
    """What a suite's times are compared with, and the bytes of the gradients it must return."""
    if suite == "loss":
        run, gradients = copy_of_logits(workload), [workload.logits()]
    elif suite == "decode":
        run, gradients = gemm_unit(workload, sum(workload.frames)), []
    else:
        num_cells = workload.band_cells if suite == "pruned" else workload.shape.num_cells
        run, gradients = gemm_unit(workload, num_cells), [*workload.joiner_inputs()]
        if suite == "pruned":
            gradients += workload.simple_projections()
    measured, _ = measure(Job(run), repetitions, workload.device, clock)
    return {**measured, "peak_bytes": sum(gradient.nbytes for gradient in gradients)}


def true_outcome(suite: str, workload: Workload) -> dict[str, Any]:
    """Losses and signatures of the gradients in float64; the transcripts that are to be found."""
    if suite == "decode":
        return {"tokens": decode.transcripts(workload)}
    if suite == "loss":
        reference = truth.loss_truth(workload)
        made = Signature(workload.vocab_size)
        for rows, gradient in reference.gradient_tiles():
            made.add(rows.start, gradient)
        return {"losses": reference.losses.tolist(), "signatures": [made.values()]}
    losses, gradients = tdt.truth(workload) if suite == "tdt" else truth.step_truth(workload)
    return {"losses": losses.tolist(), "signatures": [signature(grad) for grad in gradients]}


def packed_gradients(workload: Workload, suite: str, gradients: tuple[Tensor, ...]) -> list[Tensor]:
    """Gradients in the layout of the truth."""
    if suite == "loss" and gradients[0].dim() == 4:
        return [workload.shape.pack(gradients[0])]
    return list(gradients)


def gradient_error_of(implementation: Implementation, workload: Workload) -> float:
    """The largest error of an entry of the logits' gradient."""
    job = implementation.jobs["loss"](workload)
    _, gradients = job.run(job.prepare())
    (gradient,) = packed_gradients(workload, "loss", gradients)
    return largest_error(gradient, truth.loss_truth(workload))


def version_of(implementation: Implementation) -> str:
    """Of what was measured, as it is found in this process."""
    if implementation.distribution:  # Python 3.10 would find any for the empty name
        with suppress(metadata.PackageNotFoundError):
            return metadata.version(implementation.distribution)
    module = importlib.import_module(implementation.module)
    return str(getattr(module, "__version__", "unknown"))


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Does what the request asks for."""
    workload = Workload(**request["workload"])
    suite, name = request["suite"], request["implementation"]
    clock = request.get("clock", "wall")
    if name == "truth":
        return true_outcome(suite, workload)
    if name == "floor":
        return floor(suite, workload, request["repetitions"], clock)
    implementation = implementations(tuple(request["extra"]))[name]
    require_present(implementation)
    if suite == "accuracy":
        errors = [gradient_error_of(implementation, each) for each in scaled(workload)]
        return {"errors": errors, "version": version_of(implementation)}
    job = implementation.jobs[suite](workload)
    measured, outcome = measure(job, request["repetitions"], workload.device, clock)
    measured["version"] = version_of(implementation)
    if suite == "decode":
        measured["tokens"] = outcome
        return measured
    losses, gradients = outcome
    packed = packed_gradients(workload, suite, gradients)
    measured["losses"] = losses.reshape(-1).tolist()
    measured["signatures"] = [signature(gradient) for gradient in packed]
    return measured


def main() -> None:
    request = json.load(sys.stdin)
    torch.set_flush_denormal(request["flush_denormal"])  # before threads start, or not for them
    torch.set_num_threads(request["threads"])
    limit = request["memory_limit_bytes"]
    if limit:  # an allocation that fails is reported; the kernel's killer might choose others
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    try:
        result = {"status": "ok", **answer(request)}
    except Absent as reason:
        result = {"status": "absent", "detail": str(reason)}
    except Exception as error:
        message = str(error).strip().splitlines()
        out_of_memory = isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(
            "can't allocate memory" in line or "out of memory" in line for line in message
        )
        status = "out of memory" if out_of_memory else "failed"
        detail = message[0].split("DefaultCPUAllocator: ")[-1] if message else ""
        result = {"status": status, "detail": f"{type(error).__name__}: {detail}"}
    print()
    print(json.dumps(result))


if __name__ == "__main__":
    main()
