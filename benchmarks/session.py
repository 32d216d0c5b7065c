# SPDX-License-Identifier: Apache-2.0
"""Measurements in processes of their own, implementations interleaved over rounds."""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.agreement import disagreement
from benchmarks.jobs import Implementation
from benchmarks.precision import precision_workloads
from benchmarks.workloads import Workload, scaling_workloads

PROJECT_ROOT = Path(__file__).resolve().parents[1]
FLOORS = {"loss": "copy of the logits", "step": "GEMM unit", "pruned": "GEMM unit of the band"}

Row = dict[str, Any]


@dataclass(frozen=True)
class Session:
    """How everything is measured.

    Attributes:
        implementations: by name, in the order of the tables.
        threads: of torch, OpenMP, MKL and numba.
        timeout_s: of one process.
        memory_limit_bytes: of one process; 0 is none. On the CPU only.
        peers_dir: where benchmarks/install_peers.py put them.
        extra: modules with implementations of their own.
    """

    implementations: dict[str, Implementation]
    threads: int = 1
    flush_denormal: bool = False
    rounds: int = 3
    repetitions: int = 3
    timeout_s: float = 600.0
    memory_limit_bytes: int = 0
    peers_dir: Path | None = None
    extra: tuple[str, ...] = ()

    def environment(self) -> dict[str, str]:
        paths = [str(PROJECT_ROOT), os.environ.get("PYTHONPATH", "")]
        if self.peers_dir is not None:
            paths.append(str(self.peers_dir.resolve()))
        threads = str(self.threads)
        return {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(path for path in paths if path),
            "OMP_NUM_THREADS": threads,
            "MKL_NUM_THREADS": threads,
            "NUMBA_NUM_THREADS": threads,
        }

    def measure(self, suite: str, name: str, workload: Workload) -> Row:
        """One process; whatever happens to it is a result with a status."""
        request = {
            "suite": suite,
            "implementation": name,
            "workload": asdict(workload),
            "threads": self.threads,
            "flush_denormal": self.flush_denormal,
            "repetitions": self.repetitions,
            "memory_limit_bytes": self.memory_limit_bytes if workload.device == "cpu" else 0,
            "extra": self.extra,
        }
        try:
            process = subprocess.run(
                [sys.executable, "-m", "benchmarks.measure"],
                input=json.dumps(request),
                capture_output=True,
                text=True,
                timeout=self.timeout_s,
                env=self.environment(),
            )
        except subprocess.TimeoutExpired:
            return {"status": "timed out", "detail": f"after {self.timeout_s:g} s"}
        if process.returncode == -signal.SIGKILL:
            return {"status": "out of memory", "detail": "killed by SIGKILL"}
        if process.returncode < 0:
            return {"status": "crashed", "detail": signal.Signals(-process.returncode).name}
        if process.returncode > 0:
            last = (process.stderr.strip().splitlines() or ["nothing on stderr"])[-1]
            return {"status": "crashed", "detail": f"exit status {process.returncode}: {last}"}
        return json.loads(process.stdout.splitlines()[-1])

    def rows(self, suite: str, workload: Workload, skip: dict[str, Row] | None = None) -> list[Row]:
        """The floor and every implementation of a suite on one workload.

        The reference is float64 (not in the suite "pruned", nor where memory is too
        small); else the first implementation that works. A result that disagrees gives no time.
        """
        reference = None
        if suite != "pruned":
            progress("truth in float64")
            truth = self.measure(suite, "truth", workload)
            if truth["status"] == "ok":
                reference = {**truth, "name": "float64"}
            else:
                progress(f"no truth: {truth['status']}: {truth['detail']}")
        names = [name for name, entry in self.implementations.items() if suite in entry.jobs]
        results: dict[str, list[Row]] = {name: [] for name in ["floor", *names]}
        ended = dict(skip or {})
        for round_index in range(self.rounds):
            for name, measured in results.items():
                if name in ended:
                    continue
                progress(f"round {round_index + 1}: {name}")
                result = self.measure(suite, name, workload)
                if result["status"] == "ok" and name != "floor":
                    reference = reference or {**result, "name": name}
                    if wrong := disagreement(result, reference):
                        result = {**result, "status": "disagrees", "detail": wrong}
                if result["status"] != "ok":
                    ended[name] = result
                measured.append(result)
        rows = []
        for name, measured in results.items():
            row = summary(measured) if name not in ended else dict(ended[name])
            row["name"] = FLOORS[suite] if name == "floor" else name
            row["project"] = "floor" if name == "floor" else self.implementations[name].project
            row["reference"] = reference["name"] if reference else "nothing"
            rows.append(without_outcome(row))
        return rows

    def scaling(self, base: Workload, max_frames: int, factors: tuple[float, ...]) -> Iterator[Row]:
        """The suite "step" as each of cells, V, D and T grows by `factors`.

        What is absent, or fails at one size, is not tried at larger ones of the series. The middle
        is the same in all four series and is measured once.
        """
        ended: dict[str, Row] = {}
        done: dict[Workload, list[Row]] = {}
        series = ""
        for variable, value, workload in scaling_workloads(base, max_frames, factors):
            if variable != series:
                series = variable
                ended = {name: row for name, row in ended.items() if row["status"] == "absent"}
            if workload not in done:
                done[workload] = self.rows("step", workload, skip=ended)
            for row in done[workload]:
                if row["status"] != "ok" and row["project"] != "floor":
                    ended[row["name"]] = row
                yield {**row, "variable": variable, "value": value}

    def accuracy(self, base: Workload, max_frames: int) -> Iterator[Row]:
        """The largest gradient error of every implementation that has a suite "loss"."""
        ended: dict[str, Row] = {}
        for workload in precision_workloads(base, max_frames):
            for name, entry in self.implementations.items():
                if "loss" not in entry.jobs:
                    continue
                size = workload.frames[0], workload.symbols[0], workload.logits_scale
                progress(f"T {size[0]}, U {size[1]}, scale {size[2]:g}: {name}")
                row = ended.get(name) or self.measure("accuracy", name, workload)
                if row["status"] in ("absent", "timed out"):
                    ended[name] = row
                row = {**row, "name": name, "project": entry.project}
                yield {**row, "T": size[0], "U": size[1], "scale": size[2]}


def summary(measured: list[Row]) -> Row:
    """One row of the processes of all rounds."""
    seconds = [result["seconds"] for result in measured]
    return {
        "status": "ok",
        "version": measured[0].get("version"),
        "seconds": statistics.median(seconds),
        "fastest": min(min(result["all_seconds"]) for result in measured),
        "slowest": max(max(result["all_seconds"]) for result in measured),
        "peak_bytes": statistics.median(result["peak_bytes"] for result in measured),
        "loss_error": max(result.get("loss_error", 0.0) for result in measured),
        "gradient_error": max(result.get("gradient_error", 0.0) for result in measured),
        "rounds": [without_outcome(result) for result in measured],
    }


def without_outcome(row: Row) -> Row:
    return {key: value for key, value in row.items() if key not in ("signatures", "losses")}


def progress(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
