# SPDX-License-Identifier: Apache-2.0
"""One picture of a document: time against memory, or both against size; all axes logarithmic."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.results import Run, fingerprint, labels
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


def draw_step(path: Path, run: Run) -> None:
    """Writes the picture at the top of the project's README: one training step of each loss.

    Time to the right, memory upwards, a name at each point. The PNG carries the fingerprint of the
    run (:func:`~benchmarks.results.fingerprint`), so that a test notices a picture of old numbers.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, FormatStrFormatter, NullFormatter

    rows = [row for row in run["rows"] if row["status"] == "ok" and row["project"] != "floor"]
    figure = Figure(figsize=(8, 3.8))
    figure.subplots_adjust(left=0.09, right=0.98, bottom=0.14, top=0.97)
    axes = figure.subplots()
    for label, color in (("this project", OURS), ("other projects", PEER)):
        shown = [row for row in rows if row["name"].startswith("ours") == (color == OURS)]
        seconds, mib = [row["seconds"] for row in shown], [_mib(row) for row in shown]
        axes.plot(seconds, mib, "o", color=color, markersize=9, label=label)
    axes.set(
        yscale="log",
        xlim=(0, 1.2 * max(row["seconds"] for row in rows)),
        ylim=(0.5 * min(map(_mib, rows)), 2.5 * max(map(_mib, rows))),
        xlabel="seconds for one step: joiner and loss, forward and backward",
        ylabel="peak memory, MiB",
    )
    axes.yaxis.set_major_locator(FixedLocator([10, 30, 100, 300, 1000, 3000]))
    axes.yaxis.set_major_formatter(FormatStrFormatter("%g"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(True, which="major", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower right", frameon=False)
    _name_points(axes, rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, metadata={"Source": fingerprint(run)})


# Where a name may stand, in points from its point: offset, horizontal and vertical alignment.
NAME_PLACES = (
    ((9, 0), "left", "center"),
    ((-9, 0), "right", "center"),
    ((9, 4), "left", "bottom"),
    ((9, -4), "left", "top"),
    ((-9, 4), "right", "bottom"),
    ((-9, -4), "right", "top"),
)


def _name_points(axes: Any, rows: list[Row]) -> None:
    """Writes each row's name beside its point, in the first place that is still free."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.transforms import Bbox

    canvas = FigureCanvasAgg(axes.figure)
    canvas.draw()
    points = [axes.transData.transform((row["seconds"], _mib(row))) for row in rows]
    taken = [Bbox.from_bounds(x - 7, y - 7, 14, 14) for x, y in points]
    for row in rows:
        is_fused = row["name"] == "ours: fused"
        name = axes.annotate(
            row["name"].replace("ours: ", "").replace(", inplace", ", in place"),
            (row["seconds"], _mib(row)),
            xytext=(0, 0),
            textcoords="offset points",
            color=OURS if row["name"].startswith("ours") else "black",
            weight="bold" if is_fused else "normal",
            fontsize=10,
        )
        for offset, horizontal, vertical in NAME_PLACES:
            name.set(position=offset, ha=horizontal, va=vertical)
            box = name.get_window_extent(canvas.get_renderer())
            if not any(box.overlaps(other) for other in taken):
                break
        taken.append(box)


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
