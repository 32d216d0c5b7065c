# SPDX-License-Identifier: Apache-2.0
"""Runs a suite, every measurement in a fresh process, and prints one Markdown table.

    python -m benchmarks.run --suite loss                 # logits given
    python -m benchmarks.run --suite step                 # joiner and loss
    python -m benchmarks.run --suite accuracy             # gradient error against float64

Rounds go through all implementations before the next round starts, so that a busy neighbour hits
everyone; the table has the median over rounds. A loss or gradient that disagrees with the first
implementation's is an error, not a row.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import torch

import transducer_toolkit
from benchmarks.implementations import SUITES
from benchmarks.precision import precision_rows
from benchmarks.workloads import Workload, sorted_batch, utterance_shapes

MIB = 2**20


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.run",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--suite", choices=[*SUITES, "accuracy"], required=True)
    add("--threads", type=int, default=1)
    add("--frames", type=int, default=1400, help="of all utterances of the batch")
    add("--vocab-size", type=int, default=500)
    add("--joiner-dim", type=int, default=512)
    add("--shapes", type=Path, help=".npy of (N, 2) frames and tokens; default: built-in quantiles")
    add("--rounds", type=int, default=3, help="processes for each implementation")
    add("--repetitions", type=int, default=3, help="timed runs in a process")
    add("--flush-denormal", action="store_true", help="torch.set_flush_denormal(True) first")
    add("--json", type=Path, help="write all measurements here")
    return parser.parse_args()


def measure(request: dict[str, object]) -> dict:
    """One measurement in a process of its own."""
    process = subprocess.run(
        [sys.executable, "-m", "benchmarks.measure"],
        input=json.dumps(request),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(process.stdout.splitlines()[-1])


def check_agreement(name: str, result: dict, reference: dict) -> None:
    for ours, theirs in zip(result["losses"], reference["losses"], strict=True):
        if abs(ours - theirs) > 1e-3 * abs(theirs):
            raise SystemExit(f"{name}: loss {ours}, expected {theirs}")
    if abs(result["grad_norm"] - reference["grad_norm"]) > 1e-2 * reference["grad_norm"]:
        raise SystemExit(
            f"{name}: gradient norm {result['grad_norm']}, expected {reference['grad_norm']}"
        )


def run_suite(arguments: argparse.Namespace, workload: Workload) -> list[dict]:
    names = list(SUITES[arguments.suite])
    results: dict[str, list[dict]] = {name: [] for name in names}
    for round_index in range(arguments.rounds):
        for name in names:
            print(f"round {round_index + 1}: {name}", file=sys.stderr, flush=True)
            request = {
                "suite": arguments.suite,
                "implementation": name,
                "workload": asdict(workload),
                "threads": arguments.threads,
                "flush_denormal": arguments.flush_denormal,
                "repetitions": arguments.repetitions,
            }
            results[name].append(measure(request))
            check_agreement(name, results[name][-1], results[names[0]][0])
    rows = []
    for name in names:
        seconds = [result["seconds"] for result in results[name]]
        peaks = [result["peak_bytes"] for result in results[name]]
        rows.append(
            {
                "implementation": name,
                "seconds": statistics.median(seconds),
                "fastest": min(seconds),
                "slowest": max(seconds),
                "peak_mib": statistics.median(peaks) / MIB,
            }
        )
    return rows


def machine_line(threads: int) -> str:
    cpu = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        models = [line for line in cpuinfo.read_text().splitlines() if "model name" in line]
        cpu = models[0].split(":")[1].strip() if models else cpu
    info = transducer_toolkit.build_info()
    return (
        f"{cpu}, {threads} thread(s), {info['cpu_path']}; torch {torch.__version__}, "
        f"transducer_toolkit {info['version']}"
    )


def print_suite(rows: list[dict], workload: Workload) -> None:
    logits_mib = workload.shape.num_cells * workload.vocab_size * 4 / MIB
    print(
        f"{len(workload.frames)} utterances, T {min(workload.frames)}-{max(workload.frames)}, "
        f"U {min(workload.symbols)}-{max(workload.symbols)}, "
        f"{workload.shape.num_cells} cells, V {workload.vocab_size}, D {workload.joiner_dim}; "
        f"packed float32 logits are {logits_mib:.0f} MiB\n"
    )
    print("| implementation | ms (range) | of torchaudio | peak MiB | of packed logits |")
    print("|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['implementation']} | {row['seconds'] * 1e3:.0f} "
            f"({row['fastest'] * 1e3:.0f}-{row['slowest'] * 1e3:.0f}) "
            f"| {row['seconds'] / rows[0]['seconds']:.3f} | {row['peak_mib']:.0f} "
            f"| {row['peak_mib'] / logits_mib:.2f} |"
        )


def print_precision(rows: list[dict]) -> None:
    print("| T | U | logits scale | ours | torchaudio |")
    print("|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['T']} | {row['U']} | {row['scale']:g} "
            f"| {row['packed']:.1e} | {row['torchaudio']:.1e} |"
        )


def main() -> None:
    arguments = parse_arguments()
    print(machine_line(arguments.threads))
    if arguments.suite == "accuracy":
        torch.set_num_threads(arguments.threads)
        rows = list(precision_rows())
        print("largest error of a float32 gradient entry against float64\n")
        print_precision(rows)
    else:
        workload = sorted_batch(
            utterance_shapes(arguments.shapes),
            max_frames=arguments.frames,
            vocab_size=arguments.vocab_size,
            joiner_dim=arguments.joiner_dim,
        )
        rows = run_suite(arguments, workload)
        print_suite(rows, workload)
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": machine_line(arguments.threads),
                                              "rows": rows}, indent=1))  # fmt: skip


if __name__ == "__main__":
    main()
