# SPDX-License-Identifier: Apache-2.0
"""Device time of each kernel, and the host's calls, of a step, by torch's profiler.

python3 -m benchmarks.gpu.kernel_times --json gpu_profile.json
ncu --profile-from-start off ... python3 -m benchmarks.gpu.kernel_times --each-stage-once
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, replace
from pathlib import Path

import torch

from benchmarks.gpu.benchmark import DeviceWorkload, batches
from benchmarks.gpu.records import Record
from benchmarks.gpu.single_stages import SingleStages
from benchmarks.gpu.tables import profile_figures, profile_table
from benchmarks.gpu.timing import arithmetic, host_calls_of, kernels_of, timed
from benchmarks.peers import implementations

STEPS = (
    ("sorted", "step", "ours: fused", "bfloat16"),
    ("sorted", "step", "ours: fused", "tf32"),
    ("sorted", "step", "ours: fused", "float32"),
    ("peaky", "step", "ours: fused", "tf32"),
    ("peaky", "step", "ours: fused", "float32"),
    ("sorted", "step", "ours: fused, full precision", "tf32"),
    ("sorted", "step", "ours: fused, full precision", "float32"),
    ("peaky", "step", "ours: fused, full precision", "tf32"),
    ("peaky", "step", "ours: fused, full precision", "float32"),
    ("sorted", "step", "ours: packed", "tf32"),
    ("sorted", "step", "ours: packed", "bfloat16"),
    ("sorted", "pruned", "ours: fused, pruned", "tf32"),
    ("parakeet_8k", "tdt", "ours: TDT, fused", "tf32"),
)
RUNS = 3
HOST_CALLS, KERNELS, NAME = 25, 40, 160  # kept of each step, and of a name


def profile_steps(record: Record, workloads: dict[str, DeviceWorkload]) -> None:
    """Adds a row for each of STEPS."""
    entries = implementations()
    for batch, suite, name, mode in STEPS:
        workload = workloads[batch]
        with arithmetic(mode, workload.device):
            job = entries[name].jobs[suite](workload)
            ms = 1e3 * timed(job.run, lambda job=job: (job.prepare(),))  # type: ignore[misc]
            kernels = kernels_of(lambda job=job: job.run(job.prepare()), RUNS)  # type: ignore[misc]
            host = host_calls_of(lambda job=job: job.run(job.prepare()))  # type: ignore[misc]
        record.add(
            {
                "batch": batch,
                "mode": mode,
                "name": name,
                "ms": ms,
                "device_ms": sum(kernel.ms for kernel in kernels),
                "launches": sum(kernel.calls for kernel in kernels),
                "kernels": [asdict(replace(it, name=it.name[:NAME])) for it in kernels[:KERNELS]],
                "host": [asdict(call) for call in host[:HOST_CALLS]],
            }
        )


def each_stage_once(workload: DeviceWorkload, dtype: torch.dtype) -> None:
    """Calls each stage on realistic sizes; only these calls are seen by a profiler of CUDA."""
    single = SingleStages(workload, dtype)
    device = torch.device(workload.device)

    def run() -> None:
        single.join_forward()
        single.cell_scores()
        single.lattice()
        single.kept_rows()
        single.logits_grad()
        single.join_backward()

    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="file of the rows")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--frames", type=int, default=10_000)
    parser.add_argument("--vocab-size", type=int, default=500)
    parser.add_argument("--joiner-dim", type=int, default=512)
    parser.add_argument("--shorten", type=int, default=1, help="divides all lengths: a dry run")
    parser.add_argument("--each-stage-once", action="store_true", help="for ncu: no times")
    options = parser.parse_args(arguments)
    sizes = options.frames, options.vocab_size, options.joiner_dim, options.shorten
    workloads = batches(options.device, *sizes)
    if options.each_stage_once:
        each_stage_once(workloads["sorted"], torch.float32)
        return
    record = Record(options.json, options.device, kind="profile")
    profile_steps(record, workloads)
    print(profile_table(record.document))
    print(profile_figures(record.rows))


if __name__ == "__main__":
    main()
