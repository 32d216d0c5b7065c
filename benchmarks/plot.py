# SPDX-License-Identifier: Apache-2.0
"""One picture of a suite: time against memory, or both against size; all axes logarithmic."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.session import Row

MIB = 2**20
SMALLEST_MIB = 0.1  # nothing measurable, drawn at the edge: a logarithm has no zero
OURS, PEER, FLOOR = "tab:blue", "tab:orange", "black"
MARKERS = "osD^vP*X<>hp"


def draw(path: Path, suite: str, rows: list[Row], machine: str) -> None:
    """Writes the picture of a suite's rows; those without numbers are left out."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter

    measured = [row for row in rows if row["status"] == "ok"]
    drawing = {"scaling": _scaling, "accuracy": _accuracy}.get(suite, _time_against_memory)
    figure = Figure(layout="constrained")
    drawing(figure, measured)
    for axes in figure.axes:  # labels between the decades overlap
        low, high = axes.get_xlim()
        if high > 20 * low:
            axes.xaxis.set_minor_formatter(NullFormatter())
    figure.suptitle(f"{suite}: {machine}", fontsize=6)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def _mib(row: Row) -> float:
    return max(row["peak_bytes"] / MIB, SMALLEST_MIB)


def _style(names: list[str]) -> dict[str, dict[str, Any]]:
    return {
        name: {
            "color": OURS if name.startswith("ours") else PEER,
            "marker": MARKERS[index % len(MARKERS)],
        }
        for index, name in enumerate(names)
    }


def _time_against_memory(figure: Any, rows: list[Row]) -> None:
    axes = figure.subplots()
    style = _style([row["name"] for row in rows])
    for row in rows:
        if row["project"] == "floor":
            axes.axvline(row["seconds"], color=FLOOR, linestyle="--", label=row["name"])
        else:
            axes.plot(row["seconds"], _mib(row), linestyle="", label=row["name"],
                      **style[row["name"]])  # fmt: skip
    axes.set(xscale="log", yscale="log", xlabel="s, forward and backward", ylabel="peak MiB")
    axes.grid(True, which="both", alpha=0.2)
    axes.legend(fontsize=7)


def _scaling(figure: Any, rows: list[Row]) -> None:
    variables = list(dict.fromkeys(row["variable"] for row in rows))
    names = list(dict.fromkeys(row["name"] for row in rows))
    style = _style(names)
    figure.set_size_inches(3.2 * len(variables), 7)
    panels = figure.subplots(2, len(variables), squeeze=False)
    for column, variable in enumerate(variables):
        for name in names:
            series = [row for row in rows if (row["variable"], row["name"]) == (variable, name)]
            sizes = [row["value"] for row in series]
            is_floor = bool(series) and series[0]["project"] == "floor"
            look = {"color": FLOOR, "linestyle": "--"} if is_floor else style[name]
            panels[0][column].plot(sizes, [row["seconds"] for row in series], label=name, **look)
            if not is_floor:
                panels[1][column].plot(sizes, [_mib(row) for row in series], **look)
        for axes, label in zip(panels[:, column], ("s", "peak MiB"), strict=True):
            axes.set(xscale="log", yscale="log", xlabel=variable, ylabel=label)
            axes.grid(True, which="both", alpha=0.2)
    panels[0][0].legend(fontsize=6)


def _accuracy(figure: Any, rows: list[Row]) -> None:
    scales = list(dict.fromkeys(row["scale"] for row in rows))
    names = list(dict.fromkeys(row["name"] for row in rows))
    style = _style(names)
    figure.set_size_inches(4 * len(scales), 4)
    panels = figure.subplots(1, len(scales), squeeze=False)[0]
    for axes, scale in zip(panels, scales, strict=True):
        for name in names:
            of_name = [row for row in rows if (row["scale"], row["name"]) == (scale, name)]
            series = sorted(of_name, key=lambda row: row["T"] * (row["U"] + 1))
            sizes = [row["T"] * (row["U"] + 1) for row in series]
            axes.plot(sizes, [row["error"] for row in series], label=name, **style[name])
        axes.set(xscale="log", yscale="log", xlabel="cells", ylabel="largest gradient error",
                 title=f"logits x {scale:g}")  # fmt: skip
        axes.grid(True, which="both", alpha=0.2)
    panels[0].legend(fontsize=6)
