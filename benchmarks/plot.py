# SPDX-License-Identifier: Apache-2.0
"""One picture of a document: time against memory, or both against size; all axes logarithmic."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.report import labels
from benchmarks.results import Run
from benchmarks.session import Row

MIB = 2**20
SMALLEST_MIB = 0.1  # nothing measurable, drawn at the edge: a logarithm has no zero
OURS, PEER, FLOOR = "tab:blue", "tab:orange", "black"
MARKERS = "osD^vP*X<>hp"


def draw(path: Path, runs: list[Run]) -> None:
    """Writes the picture of a document's runs; rows without numbers are left out."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter

    suite = runs[0]["suite"]
    measured = [[row for row in run["rows"] if row["status"] == "ok"] for run in runs]
    figure = Figure(layout="constrained")
    if suite in ("scaling", "memory"):
        _scaling(figure, measured[0])
    elif suite == "accuracy":
        _accuracy(figure, measured[0])
    else:
        _time_against_memory(figure, measured, labels(runs))
    for axes in figure.axes:
        low, high = axes.get_xlim()
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 200 * low else (1,)))
        axes.xaxis.set_major_formatter(FormatStrFormatter("%g"))
        axes.xaxis.set_minor_formatter(NullFormatter())
    handles, names = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, names, fontsize=7, ncols=4, loc="outside lower center")
    figure.suptitle(f"{suite}: {runs[0]['machine']}", fontsize=6)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


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


def _time_against_memory(figure: Any, runs: list[list[Row]], titles: list[str]) -> None:
    """A panel for each run: time to the right, memory upwards; the floor is a line in each."""
    names = list(dict.fromkeys(row["name"] for rows in runs for row in rows))
    style = _style(names)
    columns = min(3, len(runs))
    lines = -(-len(runs) // columns)
    figure.set_size_inches(max(6.4, 3.6 * columns), max(4.8, 3.2 * lines))
    panels = figure.subplots(lines, columns, squeeze=False).flatten()
    for axes, rows, title in zip(panels, runs, titles, strict=False):
        for row in rows:
            if row["project"] == "floor":
                axes.axvline(row["seconds"], color=FLOOR, linestyle="--", label=row["name"])
                if row["peak_bytes"]:
                    axes.axhline(_mib(row), color=FLOOR, linestyle=":", label="gradients")
            else:
                axes.plot(row["seconds"], _mib(row), linestyle="", label=row["name"],
                          **style[row["name"]])  # fmt: skip
        axes.set(xscale="log", yscale="log", xlabel="s", ylabel="peak MiB")
        axes.set_title(title, fontsize=8)
        axes.grid(True, which="both", alpha=0.2)
    for axes in panels[len(runs) :]:
        axes.remove()


def _scaling(figure: Any, rows: list[Row]) -> None:
    variables = list(dict.fromkeys(row["variable"] for row in rows))
    names = list(dict.fromkeys(row["name"] for row in rows))
    style = _style(names)
    figure.set_size_inches(max(6.4, 3.2 * len(variables)), 7)
    panels = figure.subplots(2, len(variables), squeeze=False)
    for column, variable in enumerate(variables):
        for name in names:
            series = [row for row in rows if (row["variable"], row["name"]) == (variable, name)]
            sizes = [row["value"] for row in series]
            is_floor = bool(series) and series[0]["project"] == "floor"
            look = {"color": FLOOR, "linestyle": "--"} if is_floor else style[name]
            panels[0][column].plot(sizes, [row["seconds"] for row in series], label=name, **look)
            if any(row["peak_bytes"] for row in series):
                panels[1][column].plot(sizes, [_mib(row) for row in series], **look)
        for axes, label in zip(panels[:, column], ("s", "peak MiB"), strict=True):
            axes.set(xscale="log", yscale="log", xlabel=variable, ylabel=label)
            axes.grid(True, which="both", alpha=0.2)


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
