# SPDX-License-Identifier: Apache-2.0
"""Runs a suite, every measurement in a fresh process, and prints its Markdown table.

    python -m benchmarks.run --suite loss                 # logits given
    python -m benchmarks.run --suite step                 # joiner and loss
    python -m benchmarks.run --suite pruned               # smoothed loss, ranges, pruned loss
    python -m benchmarks.run --suite decode               # searches on given encoder output
    python -m benchmarks.run --suite parakeet             # a training step of transformers' model
    python -m benchmarks.run --suite tdt                  # joiner and loss with durations
    python -m benchmarks.run --suite accuracy             # gradient error against float64
    python -m benchmarks.run --suite scaling              # the step as cells, V, D and T grow
    python -m benchmarks.run --suite memory               # the step's peak as V grows

Rounds go through all implementations before the next round starts, so that a busy neighbour hits
everyone. A time is believed after the results agree with float64; what disagrees, crashes, is
absent, runs out of memory or of time is a row that says so. benchmarks/README.md has the rest;
benchmarks.report makes tables and pictures of the JSON files.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from benchmarks import report, results, tdt
from benchmarks.peers import implementations
from benchmarks.session import Session
from benchmarks.workloads import (
    LATTICES,
    MEMORY_FACTORS,
    SCALING_FACTORS,
    SERIES,
    TRAINED,
    Workload,
    choose_batch,
    memory_workloads,
    scaling_workloads,
    utterance_shapes,
)

SUITES = (
    *("loss", "step", "pruned", "parakeet", "parakeet_tdt", "tdt", "decode"),
    *("accuracy", "scaling", "memory"),
)
# Where a suite's own default differs from that of the others.
DEFAULTS = {
    "accuracy": {"frames": 3000, "vocab_size": 16},
    "decode": {"frames": 11_000},
    "parakeet": {"vocab_size": 1025},
    "parakeet_tdt": {"vocab_size": 1025},
    "tdt": {"frames": 376, "vocab_size": 1025, "joiner_dim": 640},
    "memory": {"frames": 343, "factors": MEMORY_FACTORS},
}
COMMON_DEFAULTS = {
    "frames": 1400,
    "vocab_size": 500,
    "joiner_dim": 512,
    "lattice": "initial",
    "factors": SCALING_FACTORS,
}
GIB = 2**30


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.run",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = made.add_argument
    add("--suite", choices=SUITES, required=True)
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--peers", nargs="+", default=["all"], metavar="NAME", help="all, none, or projects")
    add("--peers-dir", type=Path, help="where benchmarks/install_peers.py put them")
    add("--extra", nargs="+", default=[], metavar="MODULE",
        help="modules with IMPLEMENTATIONS of your own, as those in benchmarks/peers")  # fmt: skip
    add("--shapes", type=Path, help=".npy of (N, 2) frames and tokens; default: built-in quantiles")
    add("--frames", type=int,
        help="of all utterances of the batch (1400; decode: 11000; tdt: 376); accuracy: largest T "
        "(3000); memory: T of the one utterance (343)")  # fmt: skip
    add("--batch", choices=("sorted", "unsorted"), default="sorted", help="corpus order")
    add("--vocab-size", type=int, help="500; accuracy: 16; parakeet, parakeet_tdt, tdt: 1025")
    add("--joiner-dim", type=int, help="512; tdt: 640")
    add("--lattice", choices=LATTICES,
        help="weights or logits of an untrained model, times 3 or 12, so that few paths count, "
        "or a joiner that knows the alignment (not with logits given)")  # fmt: skip
    add("--factors", type=float, nargs="+", metavar="X",
        help="scaling: of frames, vocab-size, joiner-dim; memory: of vocab-size")  # fmt: skip
    add("--series", nargs="+", choices=SERIES, default=SERIES, help="scaling: what grows")
    add("--threads", type=int, default=1)
    add("--clock", choices=("wall", "cpu"), default="wall",
        help="of times on the CPU; cpu: processor time, for a machine with other work")  # fmt: skip
    add("--flush-denormal", action="store_true", help="torch.set_flush_denormal(True) first")
    add("--rounds", type=int, default=3, help="processes for each implementation")
    add("--repetitions", type=int, default=3, help="timed runs in a process, after a warm-up")
    add("--timeout", type=float, default=600.0, metavar="S", help="of one process")
    add("--memory-limit", type=float, metavar="GIB", help="of one process; default: 80 %% of free")
    add("--json", type=Path, help="write all measurements here")
    add("--append", action="store_true", help="add to the runs that the JSON file has")
    add("--markdown", type=Path, help="write the table here")
    add("--plot", type=Path, help="write the picture here (.png, .svg, .pdf)")
    return made


def choose_implementations(
    peers: list[str], extra: tuple[str, ...], error: argparse.ArgumentParser
) -> dict:
    """Ours and those of the named projects."""
    everything = implementations(extra)
    projects = {entry.project for entry in everything.values()} - {"ours"}
    if peers == ["all"]:
        return everything
    wanted = set() if peers == ["none"] else set(peers)
    if unknown := sorted(wanted - projects):
        error.error(
            f"--peers: expected all, none or some of {', '.join(sorted(projects))}, "
            f"got {', '.join(unknown)}"
        )
    return {name: entry for name, entry in everything.items() if entry.project in wanted | {"ours"}}


def free_memory_bytes() -> int:
    meminfo = Path("/proc/meminfo").read_text().splitlines()
    line = next(line for line in meminfo if line.startswith("MemAvailable"))
    return int(line.split()[1]) * 1024


def main(arguments: list[str] | None = None) -> None:
    options_parser = parser()
    options = options_parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        options_parser.error("--device cuda: torch sees no CUDA device here")
    if options.lattice == TRAINED and options.suite in ("loss", "accuracy", "decode", "tdt"):
        options_parser.error(
            f"--lattice trained: suite {options.suite} has no such joiner; choose another"
        )
    if options.append and options.json and options.json.exists():
        there = results.read(options.json)[0]["suite"]
        if there != options.suite:
            options_parser.error(f"--append: {options.json.name} has suite {there}")
    for name, value in {**COMMON_DEFAULTS, **DEFAULTS.get(options.suite, {})}.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    extra = tuple(options.extra)
    limit = options.memory_limit * GIB if options.memory_limit else 0.8 * free_memory_bytes()
    session = Session(
        choose_implementations(options.peers, extra, options_parser),
        threads=options.threads,
        clock=options.clock,
        flush_denormal=options.flush_denormal,
        rounds=options.rounds,
        repetitions=options.repetitions,
        timeout_s=options.timeout,
        memory_limit_bytes=int(limit),
        peers_dir=options.peers_dir,
        extra=extra,
    )
    if options.suite == "tdt":
        frames, symbols = tdt.lengths(options.frames)
    else:
        shapes = utterance_shapes(options.shapes)
        chosen = choose_batch(shapes, max_frames=options.frames, batch=options.batch)
        frames, symbols = (tuple(column.tolist()) for column in chosen.T)
    workload = Workload(
        frames,
        symbols,
        options.vocab_size,
        options.joiner_dim,
        lattice=options.lattice,
        device=options.device,
    )
    machine, commit = results.machine_line(options.threads, options.device), results.commit()
    factors = tuple(sorted(options.factors))
    if options.suite == "accuracy":
        rows = list(session.accuracy(workload, options.frames))
    elif options.suite == "scaling":
        sizes = scaling_workloads(workload, options.frames, factors, options.series)
        rows = list(session.series(sizes))
    elif options.suite == "memory":
        growing = list(memory_workloads(workload, options.frames, factors))
        workload = growing[0][2]
        rows = list(session.series(growing))
    else:
        rows = session.rows(options.suite, workload)
    run = results.make_run(options, machine, commit, workload, rows)
    print(report.table(run))
    if options.json:
        results.write(options.json, run, append=options.append)
    if options.markdown:
        options.markdown.write_text(report.table(run) + "\n")
    if options.plot:
        from benchmarks import plot

        plot.draw(options.plot, [run])


if __name__ == "__main__":
    main()
