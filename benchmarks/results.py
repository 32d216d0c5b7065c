# SPDX-License-Identifier: Apache-2.0
"""Where and how something was measured, and the JSON files that hold it.

A document has the runs of one suite: each with its rows and all that is needed to repeat it. The
tables (report.py) and the picture (plot.py) are made from documents alone.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import platform
import subprocess
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import transducer_toolkit
from benchmarks.session import PROJECT_ROOT, Row
from benchmarks.workloads import Workload

Run = dict[str, Any]
PLACES = ("peers_dir", "json", "plot", "markdown", "append")  # options that say where, not what


def machine_line(threads: int, device: str) -> str:
    """Processor, threads and versions in one line."""
    cpu = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        models = [line for line in cpuinfo.read_text().splitlines() if "model name" in line]
        cpu = models[0].split(":")[1].strip() if models else cpu
    info = transducer_toolkit.build_info()
    gpu = f"{torch.cuda.get_device_name()}; " if device == "cuda" else ""
    return (
        f"{gpu}{cpu}, {threads} thread(s), {info['cpu_path']}; torch {torch.__version__}, "
        f"transducer_toolkit {info['version']} at {commit()}"
    )


def commit() -> str:
    """The commit measured, marked if the working tree differs from it in more than results."""

    def git(*arguments: str) -> str:
        try:
            return subprocess.run(
                ["git", *arguments], cwd=PROJECT_ROOT, capture_output=True, text=True, check=True
            ).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            return ""

    revision = git("rev-parse", "--short=12", "HEAD")
    if not revision:
        return "an unknown commit"
    changed = git("status", "--porcelain", "-uno", "--", ".", ":!benchmarks/results")
    return f"{revision}, changed" if changed else revision


def versions(rows: list[Row]) -> dict[str, str]:
    """Of Python, torch, ours, and every project that was measured."""
    found = {row["project"]: row["version"] for row in rows if row.get("version")}
    return {
        **found,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "ours": transducer_toolkit.__version__,
    }


def make_run(
    options: argparse.Namespace, machine: str, commit: str, workload: Workload, rows: list[Row]
) -> Run:
    """Everything that was measured, and how."""
    kept = {key: value for key, value in vars(options).items() if key not in PLACES}
    return {
        "suite": options.suite,
        "machine": machine,
        "commit": commit,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "versions": versions(rows),
        "options": {
            key: value.name if isinstance(value, Path) else value for key, value in kept.items()
        },
        "workload": asdict(workload),
        "rows": rows,
    }


def write(path: Path, run: Run, *, append: bool) -> None:
    """Writes a document of this run, or adds the run to the one that is there."""
    runs = read(path) if append and path.exists() else []
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"runs": [*runs, run]}, indent=1) + "\n")


def read(path: Path) -> list[Run]:
    """The runs of a document."""
    return json.loads(path.read_text())["runs"]


def fingerprint(run: Run) -> str:
    """SHA-256 of a run's rows: a picture names the numbers that it was drawn from."""
    return hashlib.sha256(json.dumps(run["rows"], sort_keys=True).encode()).hexdigest()


def merged(runs: list[Run]) -> list[Run]:
    """Runs whose rows belong in one table, such as two series of sizes, as one."""
    if "variable" not in runs[0]["rows"][0]:
        return runs
    return [{**runs[0], "rows": [row for run in runs for row in run["rows"]]}]


def workload_of(run: Run) -> Workload:
    fields = run["workload"]
    lengths = {key: tuple(fields[key]) for key in ("frames", "symbols")}
    return Workload(**{**fields, **lengths})


def labels(runs: list[Run]) -> list[str]:
    """Returns one label a run, made of the options in which the runs differ."""
    phrases: tuple[Callable[[Run], str], ...] = (
        lambda run: run["options"]["batch"],
        lambda run: f"{sum(run['workload']['frames'])} frames",
        lambda run: f"V {run['options']['vocab_size']}",
        lambda run: f"D {run['options']['joiner_dim']}",
        lambda run: run["options"]["lattice"],
        lambda run: "denormals flushed" if run["options"]["flush_denormal"] else "denormals",
        lambda run: f"{run['options']['threads']} thread(s)",
    )
    telling = [say for say in phrases if len({say(run) for run in runs}) > 1]
    made = [", ".join(say(run) for say in telling) for run in runs]
    repeated = len(set(made)) < len(made)
    return [f"{label} #{index + 1}" if repeated else label for index, label in enumerate(made)]
