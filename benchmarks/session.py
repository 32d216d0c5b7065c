# SPDX-License-Identifier: Apache-2.0
"""Measurements in processes of their own, implementations interleaved over rounds."""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.agreement import disagreement
from benchmarks.jobs import Implementation
from benchmarks.precision import SCALES, precision_workloads
from benchmarks.workloads import Workload

PROJECT_ROOT = Path(__file__).resolve().parents[1]
FLOORS = {
    "loss": "copy of the logits",
    "step": "GEMM unit",
    "pruned": "GEMM unit of the band",
    "parakeet": "GEMM unit of the joiner",
    "parakeet_tdt": "GEMM unit of the joiner",
    "tdt": "GEMM unit",
    "decode": "GEMM of every frame once",
}

SLOW_S = 20.0  # of one run
OUTCOME = ("signatures", "losses", "tokens")  # compared, and not kept

Row = dict[str, Any]


@dataclass(frozen=True)
class Session:
    """How everything is measured.

    Attributes:
        implementations: by name, in the order of the tables.
        threads: of torch, OpenMP, MKL and numba.
        clock: "wall" or "cpu", of times on the CPU.
        timeout_s: of one process.
        memory_limit_bytes: of one process; 0 is none. On the CPU only.
        peers_dir: where benchmarks/install_peers.py put them.
        extra: modules with implementations of their own.
    """

    implementations: dict[str, Implementation]
    threads: int = 1
    clock: str = "wall"
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
            "clock": self.clock,
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
        if process.returncode == 0:
            result = json.loads(process.stdout.splitlines()[-1])
        else:
            result = ended_process(process.returncode, process.stderr)
        if result["status"] == "out of memory" and request["memory_limit_bytes"]:
            limit_gib = request["memory_limit_bytes"] / 2**30
            result["detail"] = f"limit {limit_gib:.3g} GiB; {result['detail']}"
        return result

    def rows(self, suite: str, workload: Workload, skip: dict[str, Row] | None = None) -> list[Row]:
        """The floor and every implementation of a suite on one workload.

        The reference is float64, of "decode" the transcripts. In the suites "pruned",
        "parakeet" and "parakeet_tdt", and where memory is too small for float64, it is the first
        implementation that works. A result that disagrees gives no time. What took longer than
        SLOW_S is measured in the first round only.
        """
        reference = None
        if suite not in ("pruned", "parakeet", "parakeet_tdt"):
            progress("truth")
            truth = self.measure(suite, "truth", workload)
            if truth["status"] == "ok":
                reference = {**truth, "name": "the transcripts" if suite == "decode" else "float64"}
            else:
                progress(f"no truth: {truth['status']}: {truth['detail']}")
        names = [name for name, entry in self.implementations.items() if suite in entry.jobs]
        results: dict[str, list[Row]] = {name: [] for name in ["floor", *names]}
        ended = dict(skip or {})
        for round_index in range(self.rounds):
            for name, measured in results.items():
                if name in ended or (measured and measured[0]["seconds"] > SLOW_S):
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

    def series(self, workloads: Iterable[tuple[str, int, Workload]]) -> Iterator[Row]:
        """The suite "step" on workloads of which one variable grows: (variable, value, workload).

        What is absent, or fails at one size, is not tried at larger ones of the series. A workload
        that is in several series is measured once.
        """
        ended: dict[str, Row] = {}
        done: dict[Workload, list[Row]] = {}
        series = ""
        for variable, value, workload in workloads:
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
            sizes = {"T": workload.frames[0], "U": workload.symbols[0]}
            rows = []
            for name, entry in self.implementations.items():
                if "loss" not in entry.jobs:
                    continue
                progress(f"T {sizes['T']}, U {sizes['U']}: {name}")
                result = ended.get(name) or self.measure("accuracy", name, workload)
                if result["status"] in ("absent", "timed out"):
                    ended[name] = result
                errors = result.pop("errors", [None] * len(SCALES))
                for scale, error in zip(SCALES, errors, strict=True):
                    row = {**result, "name": name, "project": entry.project, **sizes}
                    rows.append({**row, "scale": scale, "error": error})
            # By scale first, as a table is read.
            yield from sorted(rows, key=lambda row: row["scale"])


def ended_process(status: int, stderr: str) -> Row:
    """The result of a process that gave none."""
    last = (stderr.strip().splitlines() or ["nothing on stderr"])[-1]
    if status == -signal.SIGKILL:
        return {"status": "out of memory", "detail": "killed by SIGKILL"}
    if "bad_alloc" in stderr:  # not caught by a peer's binding
        return {"status": "out of memory", "detail": last}
    if status < 0:
        return {"status": "crashed", "detail": signal.Signals(-status).name}
    return {"status": "crashed", "detail": f"exit status {status}: {last}"}


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
        **{
            key: max(result[key] for result in measured)
            for key in ("loss_error", "gradient_error", "token_error")
            if key in measured[0]
        },
        "rounds": [without_outcome(result) for result in measured],
    }


def without_outcome(row: Row) -> Row:
    return {key: value for key, value in row.items() if key not in OUTCOME}


def progress(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
