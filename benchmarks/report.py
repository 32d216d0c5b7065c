# SPDX-License-Identifier: Apache-2.0
"""Measurements as Markdown tables and as JSON with what is needed to repeat them."""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import subprocess
from pathlib import Path

import torch

import transducer_toolkit
from benchmarks.session import FLOORS, PROJECT_ROOT, Row
from benchmarks.workloads import Workload

MIB = 2**20


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
    """The commit measured, marked if the working tree differs from it."""

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
    return f"{revision}, changed" if git("status", "--porcelain", "-uno") else revision


def versions(rows: list[Row]) -> dict[str, str]:
    """Of Python, torch, ours, and every project that was measured."""
    found = {row["project"]: row["version"] for row in rows if row.get("version")}
    return {
        **found,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "ours": transducer_toolkit.__version__,
    }


def write_json(path: Path, options: argparse.Namespace, machine: str, rows: list[Row]) -> None:
    """Everything that was measured, and how."""
    path.parent.mkdir(parents=True, exist_ok=True)
    document = {
        "machine": machine,
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "versions": versions(rows),
        "options": {
            key: str(value) if isinstance(value, Path) else value
            for key, value in vars(options).items()
        },
        "rows": rows,
    }
    path.write_text(json.dumps(document, indent=1) + "\n")


def said(row: Row) -> str:
    """Why a row has no numbers."""
    # A reason of many lines or with a bar would break the table.
    detail = " ".join(str(row.get("detail", "")).split()).replace("|", "/")
    return f"{row['status']}: {detail}"


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.3g}" if seconds < 0.1 else f"{seconds * 1e3:.0f}"


def _ratio(row: Row, other: Row | None) -> str:
    if other is None or other["status"] != "ok":
        return ""
    return f"{row['seconds'] / other['seconds']:.3g}"


def _by_name(rows: list[Row], name: str) -> Row | None:
    return next((row for row in rows if row["name"] == name), None)


def describe(workload: Workload) -> str:
    """The batch in one line."""
    logits_mib = workload.shape.num_cells * workload.vocab_size * 4 / MIB
    return (
        f"{len(workload.frames)} utterances, T {min(workload.frames)}-{max(workload.frames)}, "
        f"U {min(workload.symbols)}-{max(workload.symbols)}, "
        f"{workload.shape.num_cells} cells, V {workload.vocab_size}, D {workload.joiner_dim}, "
        f"{workload.lattice} lattice; packed float32 logits are {logits_mib:.1f} MiB"
    )


def suite_table(rows: list[Row], workload: Workload, suite: str) -> str:
    """One row for each implementation; ratios of time to the floor and to a well-known peer."""
    logits_bytes = workload.shape.num_cells * workload.vocab_size * 4
    floor = _by_name(rows, FLOORS[suite])
    peer_name = "fast_rnnt" if suite == "pruned" else "torchaudio"
    peer = _by_name(rows, peer_name)
    lines = [
        describe(workload),
        f"errors are relative, to {rows[-1]['reference']}",
        "",
        f"| {suite} | ms (range) | of {FLOORS[suite]} | of {peer_name} | peak MiB "
        "| of packed logits | loss error | gradient error |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if row["status"] != "ok":
            lines.append(f"| {row['name']} | {said(row)} | | | | | | |")
            continue
        errors = (
            " | "
            if row["project"] == "floor"
            else f"{row['loss_error']:.0e} | {row['gradient_error']:.0e}"
        )
        spread = f"{milliseconds(row['fastest'])}-{milliseconds(row['slowest'])}"
        lines.append(
            f"| {row['name']} | {milliseconds(row['seconds'])} ({spread}) | {_ratio(row, floor)} "
            f"| {_ratio(row, peer)} | {row['peak_bytes'] / MIB:.1f} "
            f"| {row['peak_bytes'] / logits_bytes:.2f} | {errors} |"
        )
    if suite == "loss" and floor is not None and floor["status"] == "ok":
        gigabytes = 2 * logits_bytes / floor["seconds"] / 1e9
        lines += ["", f"copy bandwidth {gigabytes:.1f} GB/s, reading and writing"]
    elif floor is not None and floor["status"] == "ok":
        cells = workload.band_cells if suite == "pruned" else workload.shape.num_cells
        flops = 2 * cells * workload.joiner_dim * workload.vocab_size
        lines += ["", f"GEMM unit: {flops / floor['seconds'] / 1e9:.1f} GFLOP/s"]
    return "\n".join(lines)


def scaling_table(rows: list[Row], workload: Workload) -> str:
    """One row for each size, one column for each implementation: ms and MiB."""
    names = list(dict.fromkeys(row["name"] for row in rows))
    lines = [
        f"suite step, {workload.lattice} lattice; ms / peak MiB",
        "",
        f"| grows | to | {' | '.join(names)} |",
        "|---|---|" + "---|" * len(names),
    ]
    for variable, value in dict.fromkeys((row["variable"], row["value"]) for row in rows):
        cells = []
        for name in names:
            row = next(
                row
                for row in rows
                if (row["variable"], row["value"], row["name"]) == (variable, value, name)
            )
            ok = row["status"] == "ok"
            cells.append(
                f"{milliseconds(row['seconds'])} / {row['peak_bytes'] / MIB:.1f}"
                if ok
                else row["status"]
            )
        lines.append(f"| {variable} | {value} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", *reasons(rows)])


def accuracy_table(rows: list[Row], workload: Workload) -> str:
    """Largest error of a gradient entry, one column for each implementation."""
    names = list(dict.fromkeys(row["name"] for row in rows))
    lines = [
        f"largest error of a float32 gradient entry against float64, V {workload.vocab_size}",
        "",
        f"| T | U | logits scale | {' | '.join(names)} |",
        "|---|---|---|" + "---|" * len(names),
    ]
    for size in dict.fromkeys((row["T"], row["U"], row["scale"]) for row in rows):
        of_size = {row["name"]: row for row in rows if (row["T"], row["U"], row["scale"]) == size}
        cells = [
            f"{row['error']:.1e}" if row["status"] == "ok" else row["status"]
            for row in of_size.values()
        ]
        lines.append(f"| {size[0]} | {size[1]} | {size[2]:g} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", *reasons(rows)])


def reasons(rows: list[Row]) -> list[str]:
    """A line for each distinct way in which an implementation gave no number."""
    return list(
        dict.fromkeys(f"- {row['name']}: {said(row)}" for row in rows if row["status"] != "ok")
    )
