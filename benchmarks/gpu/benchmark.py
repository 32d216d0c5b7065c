# SPDX-License-Identifier: Apache-2.0
"""Times losses, steps and single stages on a GPU.

    bash benchmarks/gpu/all.sh table build_peers peers    # within a time limit
    python3 -m benchmarks.gpu.benchmark --device cpu --frames 500    # dry: its times mean nothing

LibriSpeech's shapes, V = 500, D = 512: "sorted" is 10,000 frames of a corpus sorted by length,
"unsorted" 30 utterances at random, "peaky" the shapes of "sorted" with the weights times 12, where
few paths count: of that, only our fused steps are measured. "parakeet" and "parakeet_8k" are four
utterances of 376 frames (30 s) and 120 symbols with V = 1025 and 8193, D = 640: the joiner and TDT
loss, and a whole training step of a Parakeet (RNN-T and TDT) of the published size. Rows are
written to the file of --json one by one; the table is made from it (`python3 -m
benchmarks.gpu.tables FILE ...`):

- ms: by CUDA events, the CPU about 2 ms ahead at the start.
- device: milliseconds of all kernels and copies in the profiler. Where it is much less than ms,
  the device waits for the CPU.
- faster: torchaudio's ms over this row's; torchaudio runs bfloat16's rows with TF32.
- error: the largest relative error of the gradients of enc, pred, weight and bias, against our
  fused step in float64.
- / roof: ms over a lower bound. For `loss` the time to read the logits twice and to write as much
  once, at the bandwidth of a copy; for `step`, `tdt` and `pruned` three products of (cells, D) and
  (D, V), at the rate of a large one. Both rates are measured first, in the same mode.

For orientation, published times of one loss with its joiner, forward and backward, on a V100
(sorted; ms / MB): torchaudio 601 / 12959, fast_rnnt unpruned 274 / 15107, pruned 38 / 2648,
optimized_transducer 568 / 10903, warprnnt_numba 229 / 13062, warp-transducer 211 / 13062.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks import tdt
from benchmarks.gpu.records import Record, Row
from benchmarks.gpu.single_stages import SingleStages
from benchmarks.gpu.tables import benchmark_figures, benchmark_table
from benchmarks.gpu.timing import arithmetic, kernels_of, timed
from benchmarks.jobs import Implementation, Job
from benchmarks.peers import Absent, implementations, require_present
from benchmarks.workloads import LATTICE_SCALES, Workload, choose_batch, utterance_shapes
from transducer_toolkit import fused_joiner_loss

EXTRA = ("benchmarks.gpu.extra",)
MODES = ("float32", "tf32", "bfloat16")
SUITES = {
    "sorted": ("step", "loss", "pruned"),
    "unsorted": ("step", "loss", "pruned"),
    "peaky": ("step",),
    "parakeet": ("tdt", "parakeet", "parakeet_tdt"),
    "parakeet_8k": ("tdt", "parakeet", "parakeet_tdt"),
}
# A loss alone has no matrix products. Large models are trained with TF32 or in bfloat16.
MODES_OF = {"loss": MODES[:1], "parakeet": MODES[1:], "parakeet_tdt": MODES[1:]}
WITH_ERROR = ("step", "tdt")
# The projects whose losses take bfloat16.
WITH_BFLOAT16 = ("ours", "transformers")
MAX_FRAMES = 10_000
MIB = 2**20


@dataclass(frozen=True)
class DeviceWorkload(Workload):
    """A workload whose logits are drawn once, on its device: on the CPU that takes a minute."""

    @cached_property
    def _logits(self) -> Tensor:
        generator = torch.Generator(self.device).manual_seed(self.seed + 1)
        size = self.shape.num_cells, self.vocab_size
        logits = torch.randn(size, generator=generator, device=self.device)
        return logits.mul_(LATTICE_SCALES[self.lattice] * self.logits_scale)

    def logits(self) -> Tensor:
        return self._logits.detach()

    @cached_property
    def exact_gradients(self) -> dict[str, tuple[Tensor, ...]]:
        """For the suites `step` and `tdt`, gradients of enc, pred, weight and bias in float64."""
        return {}

    def gradient_error(self, suite: str, grads: Sequence[Tensor]) -> float:
        """The largest relative error of gradients of enc, pred, weight and bias."""
        if suite not in self.exact_gradients:
            inputs = self.joiner_inputs() if suite == "step" else tdt.joiner_inputs(self)
            leaves = [tensor.double().requires_grad_() for tensor in inputs]
            options = {} if suite == "step" else tdt.OPTIONS
            losses = fused_joiner_loss(
                *leaves, self.targets(), *self.shape.lengths, 0,
                reduction="sum", dropped_mass=0.0, **options,
            )  # fmt: skip
            self.exact_gradients[suite] = torch.autograd.grad(losses, leaves)
        return max(
            float((grad.double() - exact).norm() / exact.norm())
            for grad, exact in zip(grads, self.exact_gradients[suite], strict=True)
        )


def batches(
    device: str, max_frames: int, vocab_size: int, joiner_dim: int, shorten: int = 1
) -> dict[str, DeviceWorkload]:
    """Returns all batches; frames and symbols are divided by `shorten`."""
    shapes = np.maximum(1, utterance_shapes(None) // shorten)
    unsorted = choose_batch(shapes, max_frames=10**9, batch="unsorted")[:30]
    chosen = {
        "sorted": choose_batch(shapes, max_frames=max_frames, batch="sorted"),
        "unsorted": unsorted[: max(2, 30 * max_frames // MAX_FRAMES)],
    }
    workloads = {
        name: DeviceWorkload(
            tuple(lengths[:, 0].tolist()),
            tuple(lengths[:, 1].tolist()),
            vocab_size,
            joiner_dim,
            device=device,
        )
        for name, lengths in chosen.items()
    }
    workloads["peaky"] = replace(workloads["sorted"], lattice="peaky")
    is_dry = shorten > 1
    for name, size in (("parakeet", 1025), ("parakeet_8k", 8193)):
        frames, symbols = ((length // shorten,) * 4 for length in (376, 120))
        sizes = (vocab_size, joiner_dim) if is_dry else (size, 640)
        workloads[name] = DeviceWorkload(frames, symbols, *sizes, device=device)
    return workloads


def copy_bytes_per_s(device: str) -> float:
    """Returns the bytes that a large copy reads and writes each second."""
    source = torch.ones(2**28 if device == "cuda" else 2**22, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / timed(lambda: target.copy_(source))


def flops_per_s(device: str, joiner_dim: int, vocab_size: int) -> float:
    """Returns the rate of a large product like the joiner's, in the mode that is on."""
    hidden = torch.randn(2**17 if device == "cuda" else 2**10, joiner_dim, device=device)
    weight = torch.randn(vocab_size + 12, joiner_dim, device=device)
    if torch.is_autocast_enabled(device):
        hidden, weight = hidden.bfloat16(), weight.bfloat16()
    seconds = timed(lambda: hidden @ weight.T)
    return 2 * hidden.numel() * weight.size(0) / seconds


def roofline_s(suite: str, workload: Workload, bandwidth: float, flops: float) -> float:
    if suite == "loss":
        return 3 * 4 * workload.shape.num_cells * workload.vocab_size / bandwidth
    cells = workload.band_cells if suite == "pruned" else workload.shape.num_cells
    return 3 * 2 * cells * workload.joiner_dim * workload.vocab_size / flops


def measure(job: Job, workload: DeviceWorkload, suite: str) -> Row:
    """Returns times, peak memory above what was there before, the sum of the losses, the error."""
    losses, grads = job.run(job.prepare())
    row: Row = {"loss_sum": float(losses.double().sum())}
    if suite in WITH_ERROR:
        row["gradient_error"] = workload.gradient_error(suite, grads)
    del losses, grads
    gc.collect()
    peak = 0.0
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        prepared = [job.prepare()]  # taken out by run: the job may free it
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        job.run(prepared.pop())
        torch.cuda.synchronize()
        peak = (torch.cuda.max_memory_allocated() - before) / MIB
    seconds = timed(job.run, lambda: (job.prepare(),))
    prepared = [job.prepare()]
    kernels = kernels_of(lambda: job.run(prepared.pop()))
    return row | {
        "ms": 1e3 * seconds,
        "device_ms": sum(kernel.ms for kernel in kernels),
        "launches": round(sum(kernel.calls for kernel in kernels)),
        "peak_mib": peak,
    }


def order(entry: Implementation) -> int:
    """Sorts implementations: the fused step first, then ours, then torchaudio, then the others."""
    if entry.project == "ours":
        return 0 if "fused" in entry.name else 1
    return 2 if entry.project == "torchaudio" else 3


def is_wanted(project: str, projects: Sequence[str]) -> bool:
    return "all" in projects or project in projects


def suite_rows(
    suite: str, mode: str, workload: DeviceWorkload, projects: Sequence[str], deadline_s: float
) -> Iterator[Row]:
    """Yields a row for each implementation that has the suite."""
    for entry in sorted(implementations(EXTRA).values(), key=order):
        if suite not in entry.jobs or not is_wanted(entry.project, projects):
            continue
        if mode == "bfloat16" and entry.project not in WITH_BFLOAT16:
            continue
        if workload.lattice == "peaky" and "fused" not in entry.name:
            continue  # the work of the others does not depend on it
        row: Row = {"suite": suite, "mode": mode, "name": entry.name, "project": entry.project}
        if time.perf_counter() > deadline_s:
            yield {**row, "problem": "not measured: out of time"}
            continue
        try:
            require_present(entry)
            with arithmetic(mode, workload.device):
                job = entry.jobs[suite](workload)
                yield {**row, **measure(job, workload, suite)}
        except Absent as reason:
            yield {**row, "problem": f"absent: {reason}"}
        except Exception as error:
            message = (str(error).splitlines() or [""])[0]
            yield {**row, "problem": f"{type(error).__name__}: {message[:80]}"}


def stage_rows(workload: Workload, bandwidth: float, dtype: torch.dtype) -> Iterator[Row]:
    """Yields a row for each stage on packed logits; its roofline moves what the stage must."""
    single = SingleStages(workload, dtype)
    single.cell_scores()
    single.lattice()
    logits_s = single.logits.nbytes / bandwidth
    for name, run, floor_s in (
        ("1 cell_scores", single.cell_scores, logits_s),
        ("2 lattice", single.lattice, 0.0),
        ("2 lattice, exact", lambda: single.lattice(exact=True), 0.0),
        ("3 logits_grad", single.logits_grad, 2 * logits_s),
        ("kept_rows", single.kept_rows, 0.0),
    ):
        row: Row = {"suite": "stage", "mode": str(dtype).removeprefix("torch."), "name": name}
        row |= {"project": "ours", "ms": 1e3 * timed(run)}
        row["device_ms"] = sum(kernel.ms for kernel in kernels_of(run))
        if floor_s:
            row["roofline_ms"] = 1e3 * floor_s
        yield row


def batch_rows(
    batch: str,
    workload: DeviceWorkload,
    bandwidth: float,
    rates: dict[str, float],
    options: argparse.Namespace,
    deadline_s: float,
) -> Iterator[Row]:
    """Yields the rows of a batch that the options name, the most valuable first."""
    projects = options.projects
    for suite in SUITES[batch]:
        if suite not in options.suites:
            continue
        for mode in MODES_OF.get(suite, MODES):
            if mode not in options.modes:
                continue
            for row in suite_rows(suite, mode, workload, projects, deadline_s):
                if not suite.startswith("parakeet"):
                    roof_s = roofline_s(suite, workload, bandwidth, rates[mode])
                    row["roofline_ms"] = 1e3 * roof_s
                yield row
        if suite == "step" and is_wanted("ours", projects) and batch != "peaky":
            for dtype in (torch.float32, torch.bfloat16):
                if time.perf_counter() < deadline_s:
                    yield from stage_rows(workload, bandwidth, dtype)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    limit_s = float(os.environ.get("STAGE_SECONDS", 400)) - 10
    parser.add_argument("--seconds", type=float, default=limit_s, help="time for measurements")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--frames", type=int, default=MAX_FRAMES, help="of the sorted batch")
    parser.add_argument("--vocab-size", type=int, default=500)
    parser.add_argument("--joiner-dim", type=int, default=512)
    parser.add_argument("--shorten", type=int, default=1, help="divides all lengths: a dry run")
    parser.add_argument("--batches", nargs="+", choices=SUITES, default=list(SUITES))
    suites = sorted({suite for suites in SUITES.values() for suite in suites})
    parser.add_argument("--suites", nargs="+", choices=suites, default=suites)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--projects", nargs="+", default=["all"], help="all, ours, torchaudio, ...")
    parser.add_argument("--peers-dir", default="", help="where peers.py has built the others")
    parser.add_argument("--json", type=Path, help="file of the rows")
    options = parser.parse_args(arguments)
    if options.peers_dir:
        sys.path.append(options.peers_dir)
    device = options.device
    deadline_s = time.perf_counter() + options.seconds
    sizes = options.vocab_size, options.joiner_dim
    workloads = batches(device, options.frames, *sizes, options.shorten)
    gc.freeze()  # what is imported is no garbage: a collection takes 0.4 s with it
    bandwidth = copy_bytes_per_s(device)
    rates = {}
    for mode in MODES:
        with arithmetic(mode, device):
            rates[mode] = flops_per_s(device, sizes[1], sizes[0])
    record = Record(
        options.json,
        device,
        kind="benchmark",
        copy_gb_per_s=bandwidth / 1e9,
        product_tflops={mode: rate / 1e12 for mode, rate in rates.items()},
        batches={
            name: {
                "utterances": len(workloads[name].frames),
                "cells": workloads[name].shape.num_cells,
            }
            for name in options.batches
        },
    )
    for batch in options.batches:
        for row in batch_rows(batch, workloads[batch], bandwidth, rates, options, deadline_s):
            record.add({"batch": batch, **row})
            print(".", end="", flush=True)
    print()
    print(benchmark_table(record.document))
    print(benchmark_figures(record.rows))


if __name__ == "__main__":
    main()
