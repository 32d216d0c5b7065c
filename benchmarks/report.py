# SPDX-License-Identifier: Apache-2.0
"""Markdown tables and pictures of the JSON files that benchmarks.run has written.

    python -m benchmarks.report step.json                      # draws step.png
    python -m benchmarks.report step.json --markdown           # also writes every table: step.md
    python -m benchmarks.report --fill docs/benchmarks.md      # updates the tables of that page
    python -m benchmarks.report benchmarks/results/cpu_step.json --step docs/images/step.png

In a page to fill, a table stands between `<!-- PATH.json -->` and `<!-- end -->`; the path is
relative to the page. `--step` draws the picture at the top of the README from the first run.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from pathlib import Path

from benchmarks.results import Run, labels, merged, read, workload_of
from benchmarks.session import FLOORS, Row
from benchmarks.workloads import Workload

MIB = 2**20
FRAME_S = 0.04  # an encoder frame after 4x subsampling
MARKED = re.compile(r"<!-- (\S+\.json) -->\n.*?<!-- end -->", re.DOTALL)


def said(row: Row) -> str:
    """Why a row has no numbers."""
    # A reason of many lines or with a bar would break the table.
    detail = " ".join(str(row.get("detail", "")).split()).replace("|", "/")
    return f"{row['status']}: {detail}"


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.3g}" if seconds < 0.1 else f"{seconds * 1e3:.0f}"


def time_and_peak(row: Row) -> str:
    if row["status"] != "ok":
        return row["status"]
    return f"{milliseconds(row['seconds'])} / {row['peak_bytes'] / MIB:.1f}"


def _range(row: Row) -> str:
    spread = f"{milliseconds(row['fastest'])}-{milliseconds(row['slowest'])}"
    return f"{milliseconds(row['seconds'])} ({spread})"


def _ratio(row: Row, other: Row | None) -> str:
    if other is None or other["status"] != "ok":
        return ""
    return f"{row['seconds'] / other['seconds']:.3g}"


def _by_name(rows: list[Row], name: str) -> Row | None:
    return next((row for row in rows if row["name"] == name), None)


def _header(*columns: str) -> list[str]:
    return [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def describe(workload: Workload, suite: str) -> str:
    """The batch in one line."""
    if suite == "accuracy":
        return f"largest error of a float32 gradient entry against float64, V {workload.vocab_size}"
    if suite == "memory":
        return (
            f"suite step, one utterance of T {workload.frames[0]}, U {workload.symbols[0]}, "
            f"D {workload.joiner_dim}; peak MiB beyond inputs and their gradients"
        )
    if suite == "scaling":
        return f"suite step, {workload.lattice} lattice; ms / peak MiB; peaks include gradients"
    sizes = (
        f"{len(workload.frames)} utterances, T {min(workload.frames)}-{max(workload.frames)}, "
        f"U {min(workload.symbols)}-{max(workload.symbols)}, "
        f"V {workload.vocab_size}, D {workload.joiner_dim}"
    )
    if suite == "decode":
        return f"{sizes}; encoder output given, {FRAME_S * 1e3:.0f} ms a frame"
    cells = workload.shape.num_cells
    return (
        f"{sizes}, {cells} cells, {workload.lattice} lattice; packed float32 logits are "
        f"{cells * workload.vocab_size * 4 / MIB:.1f} MiB"
    )


def _suite_table(rows: list[Row], workload: Workload, suite: str) -> list[str]:
    """One row for each implementation; ratios of time to the floor and to a well-known peer."""
    logits_bytes = workload.shape.num_cells * workload.vocab_size * 4
    floor = _by_name(rows, FLOORS[suite])
    peers = {
        "pruned": "fast_rnnt",
        "parakeet": "transformers: Parakeet",
        "parakeet_tdt": "transformers: Parakeet",
        "tdt": "transformers: tdt_loss",
    }
    peer_name = peers.get(suite, "torchaudio")
    peer = _by_name(rows, peer_name)
    lines = [
        f"errors are relative, to {rows[-1]['reference']}",
        "",
        *_header(suite, "ms (range)", f"of {FLOORS[suite]}", f"of {peer_name}", "peak MiB",
                 "of packed logits", "loss error", "gradient error"),
    ]  # fmt: skip
    for row in rows:
        if row["status"] != "ok":
            lines.append(_line(row["name"], said(row), *[""] * 6))
            continue
        is_floor = row["project"] == "floor"
        errors = [f"{row[key]:.0e}" for key in ("loss_error", "gradient_error") if not is_floor]
        lines.append(
            _line(
                row["name"],
                _range(row),
                _ratio(row, floor),
                _ratio(row, peer),
                f"{row['peak_bytes'] / MIB:.1f}",
                f"{row['peak_bytes'] / logits_bytes:.2f}",
                *(errors or [""] * 2),
            )
        )
    if floor is None or floor["status"] != "ok":
        return lines
    if suite == "loss":
        gigabytes = 2 * logits_bytes / floor["seconds"] / 1e9
        return [*lines, "", f"copy bandwidth {gigabytes:.1f} GB/s, reading and writing"]
    cells = workload.band_cells if suite == "pruned" else workload.shape.num_cells
    flops = 2 * cells * workload.joiner_dim * workload.vocab_size
    return [*lines, "", f"GEMM unit: {flops / floor['seconds'] / 1e9:.1f} GFLOP/s"]


def _decode_table(rows: list[Row], workload: Workload, suite: str) -> list[str]:
    """One row for each search, compared with the plain greedy one."""
    plain = _by_name(rows, "one frame at a time")
    audio_s = sum(workload.frames) * FRAME_S
    lines = _header("decode", "ms (range)", "real-time factor", "times as fast", "peak MiB",
                    "token errors")  # fmt: skip
    for row in rows:
        if row["status"] != "ok":
            lines.append(_line(row["name"], said(row), *[""] * 4))
            continue
        lines.append(
            _line(
                row["name"],
                _range(row),
                f"{row['seconds'] / audio_s:.1e}",
                _ratio(plain, row) if plain and plain["status"] == "ok" else "",
                f"{row['peak_bytes'] / MIB:.1f}",
                f"{row['token_error']:.1%}" if "token_error" in row else "",
            )
        )
    return lines


def _series_table(
    rows: list[Row], keys: tuple[str, ...], heads: tuple[str, ...], cell: Callable[[Row], str]
) -> list[str]:
    """One row for each size, one column for each implementation."""
    names = list(dict.fromkeys(row["name"] for row in rows))
    lines = _header(*heads, *names)
    for size in dict.fromkeys(tuple(row[key] for key in keys) for row in rows):
        of_size = {
            row["name"]: cell(row) for row in rows if tuple(row[key] for key in keys) == size
        }
        sizes = [f"{part:g}" if isinstance(part, float) else str(part) for part in size]
        lines.append(_line(*sizes, *[of_size.get(name, "") for name in names]))
    return [*lines, *reasons(rows)]


def _scaling_table(rows: list[Row], workload: Workload, suite: str) -> list[str]:
    return _series_table(rows, ("variable", "value"), ("grows", "to"), time_and_peak)


def _memory_table(rows: list[Row], workload: Workload, suite: str) -> list[str]:
    floors = {row["value"]: row["peak_bytes"] for row in rows if row["project"] == "floor"}

    def beyond(row: Row) -> str:
        if row["status"] != "ok":
            return row["status"]
        if row["project"] == "floor":
            return f"{row['peak_bytes'] / MIB:.1f}"
        return f"{(row['peak_bytes'] - floors[row['value']]) / MIB:.1f}"

    renamed = [{**row, "name": "gradients"} if row["project"] == "floor" else row for row in rows]
    return _series_table(renamed, ("value",), ("V",), beyond)


def _accuracy_table(rows: list[Row], workload: Workload, suite: str) -> list[str]:
    def error(row: Row) -> str:
        return f"{row['error']:.1e}" if row["status"] == "ok" else row["status"]

    return _series_table(rows, ("T", "U", "scale"), ("T", "U", "logits scale"), error)


TABLES = {
    "decode": _decode_table,
    "accuracy": _accuracy_table,
    "scaling": _scaling_table,
    "memory": _memory_table,
}


def reasons(rows: list[Row]) -> list[str]:
    """A line for each distinct way in which an implementation gave no number."""
    lines = dict.fromkeys(f"- {row['name']}: {said(row)}" for row in rows if row["status"] != "ok")
    return ["", *lines] if lines else []


def table(run: Run) -> str:
    """Where it was measured, the batch, and the table of a run."""
    workload, suite = workload_of(run), run["suite"]
    lines = TABLES.get(suite, _suite_table)(run["rows"], workload, suite)
    clock = "; processor time" if run.get("options", {}).get("clock") == "cpu" else ""
    head = [run["machine"] + clock, describe(workload, suite)]
    return "\n\n".join(head) + "\n" + "\n".join(["", *lines])


def overview(runs: list[Run]) -> str:
    """All runs of a document side by side: ms / peak MiB of each implementation."""
    named = [{**row, "run": label} for run, label in zip(runs, labels(runs), strict=True)
             for row in run["rows"]]  # fmt: skip
    names = list(dict.fromkeys(row["name"] for row in named))
    lines = ["ms / peak MiB", "", *_header(runs[0]["suite"], *labels(runs))]
    for name in names:
        of_name = {row["run"]: time_and_peak(row) for row in named if row["name"] == name}
        lines.append(_line(name, *[of_name.get(label, "") for label in labels(runs)]))
    return "\n".join([*lines, *reasons(named)])


def document(runs: list[Run]) -> str:
    """Markdown of a document: the overview, if there is more than one run, and every table."""
    if len(runs) == 1:
        return table(runs[0])
    parts = [overview(runs)]
    for run, label in zip(runs, labels(runs), strict=True):
        parts.append(f"**{label}**\n\n{table(run)}")
    return "\n\n".join(parts)


def fill(text: str, folder: Path) -> str:
    """Puts tables anew between their marks: the first run's, and all runs side by side; pictures.

    A mark whose document is not in `folder` keeps what it has.
    """

    def made(match: re.Match[str]) -> str:
        if not (folder / match[1]).exists():
            return match[0]
        runs = merged(read(folder / match[1]))
        parts = [table(runs[0]), *([overview(runs)] if len(runs) > 1 else [])]
        picture = Path(match[1]).with_suffix(".png")
        if (folder / picture).exists():
            parts.append(f"![{runs[0]['suite']}]({picture.as_posix()})")
        return f"<!-- {match[1]} -->\n" + "\n\n".join(parts) + "\n<!-- end -->"

    return MARKED.sub(made, text)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("documents", nargs="*", type=Path, metavar="JSON")
    parser.add_argument("--markdown", action="store_true", help="also write every table: .md")
    parser.add_argument("--fill", type=Path, metavar="PAGE", help="update the tables of a page")
    parser.add_argument("--step", type=Path, metavar="PNG", help="draw the README's picture only")
    options = parser.parse_args()
    if options.step and len(options.documents) != 1:
        parser.error("--step: expected one JSON file")
    for path in options.documents:
        from benchmarks import plot

        runs = merged(read(path))
        if options.step:
            plot.draw_step(options.step, runs[0])
            continue
        if options.markdown:
            path.with_suffix(".md").write_text(document(runs) + "\n")
        plot.draw(path.with_suffix(".png"), runs)
    if options.fill:
        options.fill.write_text(fill(options.fill.read_text(), options.fill.parent))


if __name__ == "__main__":
    main()
