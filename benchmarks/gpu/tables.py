# SPDX-License-Identifier: Apache-2.0
"""Prints the JSON files of the GPU benchmarks, and the output of ncu, as tables.

python3 -m benchmarks.gpu.tables gpu_benchmark.json gpu_peers.json gpu_profile.json
python3 -m benchmarks.gpu.tables --ncu ncu.txt
"""

from __future__ import annotations

import argparse
import csv
import json
import re
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def heading(document: dict[str, Any]) -> str:
    return (
        f"{document['device']}, driver {document['driver']}, torch {document['torch']}, "
        f"{document['date']}, commit {document['commit']}\n{document['command']}"
    )


def benchmark_table(document: dict[str, Any]) -> str:
    rates = ", ".join(f"{mode} {rate:.0f}" for mode, rate in document["product_tflops"].items())
    lines = [
        heading(document),
        f"copy {document['copy_gb_per_s']:.0f} GB/s; products in TFLOP/s: {rates}",
    ]
    for name, batch in document["batches"].items():
        lines.append(f"{name}: {batch['utterances']} utterances, {batch['cells']} cells")
    columns = f"{'ms':>9} {'device':>9} {'peak MiB':>10} {'faster':>8} {'/ roof':>7} {'error':>8}"
    lines.append(f"{'':<66}{columns} {'sum of losses':>14}")
    rows: list[Row] = document["rows"]
    torchaudio = {
        (row["batch"], row["suite"], row["mode"]): row["ms"]
        for row in rows
        if row["name"] == "torchaudio" and "ms" in row
    }
    for row in rows:
        mode = "tf32" if row["mode"] == "bfloat16" else row["mode"]
        suite = "step" if row["suite"] == "pruned" else row["suite"]
        known = torchaudio.get((row["batch"], suite, mode))
        label = f"{row['batch']:<12}{row['suite']:<13}{row['mode']:<9}{row['name']:<32}"
        if "problem" in row:
            lines.append(f"{label}{row['problem']}")
            continue
        faster = f"{known / row['ms']:.1f}x" if known else ""
        roof = f"{row['ms'] / row['roofline_ms']:.2f}" if "roofline_ms" in row else ""
        peak = f"{row['peak_mib']:.1f}" if "peak_mib" in row else ""
        error = f"{row['gradient_error']:.1e}" if "gradient_error" in row else ""
        losses = f"{row['loss_sum']:.3f}" if "loss_sum" in row else ""
        lines.append(
            f"{label}{row['ms']:>9.3f} {row['device_ms']:>9.3f} {peak:>10} {faster:>8} {roof:>7} "
            f"{error:>8} {losses:>14}"
        )
    return "\n".join(lines)


def benchmark_figures(rows: list[Row]) -> str:
    """Returns the line for the summary: the first batch's most important times."""
    ms = {
        (row["suite"], row["mode"], row["name"]): row["ms"]
        for row in rows
        if "ms" in row and row["batch"] == rows[0]["batch"]
    }
    wanted = {
        "fused float32": ("step", "float32", "ours: fused"),
        "full": ("step", "float32", "ours: fused, full precision"),
        "TF32": ("step", "tf32", "ours: fused"),
        "full TF32": ("step", "tf32", "ours: fused, full precision"),
        "bfloat16": ("step", "bfloat16", "ours: fused"),
        "packed loss": ("loss", "float32", "ours: packed"),
        "pruned TF32": ("pruned", "tf32", "ours: fused, pruned"),
        "torchaudio loss": ("loss", "float32", "torchaudio"),
        "torchaudio step TF32": ("step", "tf32", "torchaudio"),
        "TDT TF32": ("tdt", "tf32", "ours: TDT, fused"),
        "transformers' TDT TF32": ("tdt", "tf32", "transformers: tdt_loss"),
        "Parakeet TDT bfloat16": ("parakeet_tdt", "bfloat16", "ours: Parakeet, fused loss"),
        "transformers' bfloat16": ("parakeet_tdt", "bfloat16", "transformers: Parakeet"),
    }
    found = [f"{label} {ms[key]:.2f}" for label, key in wanted.items() if key in ms]
    measured = sum("ms" in row for row in rows)
    return f"figures: ms: {', '.join(found)}; {measured} of {len(rows)} rows"


def profile_table(document: dict[str, Any], most: int = 12) -> str:
    lines = [heading(document)]
    for row in document["rows"]:
        lines.append(
            f"{row['batch']}, {row['name']}, {row['mode']}: {row['device_ms']:.3f} ms of kernels, "
            f"{row['launches']:.0f} launches, {row['ms']:.3f} ms by events"
        )
        for kernel in row["kernels"][:most]:
            name = short_name(kernel["name"])
            lines.append(f"    {kernel['ms']:>9.3f} ms {kernel['calls']:>7.1f} x  {name}")
        lines.append("  on the host, by the profiler:")
        for call in row.get("host", [])[:most]:
            lines.append(f"    {call['ms']:>9.3f} ms {call['calls']:>7.1f} x  {call['name'][:60]}")
    return "\n".join(lines)


def profile_figures(rows: list[Row]) -> str:
    """Returns the line for the summary: device time of each row, and its longest kernel."""
    found = []
    for row in rows:
        top = row["kernels"][0] if row["kernels"] else {"name": "none", "ms": 0.0}
        name = row["name"].removeprefix("ours: ")
        if row["batch"] != "sorted":
            name = f"{name} {row['batch']}"
        found.append(
            f"{name} {row['mode']} {row['device_ms']:.2f} "
            f"({short_name(top['name'])[:32]} {top['ms']:.2f})"
        )
    return f"figures: device ms: {', '.join(found)}"


def short_name(name: str) -> str:
    """Returns a kernel's name without return type, namespaces and arguments."""
    name = re.sub(r"\(anonymous namespace\)|<unnamed>", "", name)
    name = re.sub(r"[<(].*", "", name)
    return name.split("::")[-1].removeprefix("void ").strip()[:60] or "unnamed"


NCU_COLUMNS = {
    "Duration": "duration",
    "DRAM Throughput": "DRAM",
    "Memory Throughput": "memory",
    "Compute (SM) Throughput": "SM",
    "Achieved Occupancy": "occupancy",
    "Registers Per Thread": "registers",
}


def ncu_rows(text: str) -> list[tuple[str, dict[str, str]]]:
    """Returns for each launch in ``ncu --csv --page details`` its kernel and values with units."""
    lines = text.splitlines()
    begin = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    launches: dict[str, tuple[str, dict[str, str]]] = {}
    for row in csv.DictReader(lines[begin:]):
        if not row.get("Kernel Name") or row.get("Metric Name") not in NCU_COLUMNS:
            continue
        _, values = launches.setdefault(row["ID"], (short_name(row["Kernel Name"]), {}))
        # Memory Throughput stands in two sections: in % and in bytes a second.
        if row["Metric Unit"].endswith("/s") and row["Metric Name"] == "Memory Throughput":
            continue
        unit = "" if row["Metric Unit"] == "register/thread" else f" {row['Metric Unit']}"
        values.setdefault(NCU_COLUMNS[row["Metric Name"]], f"{row['Metric Value']}{unit}")
    return list(launches.values())


def ncu_table(rows: list[tuple[str, dict[str, str]]]) -> str:
    columns = list(NCU_COLUMNS.values())
    lines = [f"{'':<24}" + "".join(f"{column:>14}" for column in columns)]
    for name, values in rows:
        cells = "".join(f"{values.get(column, ''):>14}" for column in columns)
        lines.append(f"{name:<24}{cells}")
    return "\n".join(lines)


def ncu_figures(rows: list[tuple[str, dict[str, str]]]) -> str:
    found = [
        f"{name} {values.get('duration', '?')} (DRAM {values.get('DRAM', '?')})"
        for name, values in rows
    ]
    return f"figures: {len(rows)} launches: {', '.join(found)}"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--ncu", type=Path, help="output of ncu.sh")
    options = parser.parse_args(arguments)
    for path in options.files:
        document = json.loads(path.read_text())
        table = {"benchmark": benchmark_table, "profile": profile_table}[document["kind"]]
        print(table(document))
    if options.ncu is not None:
        rows = ncu_rows(options.ncu.read_text())
        print(ncu_table(rows))
        print(ncu_figures(rows))


if __name__ == "__main__":
    main()
