# SPDX-License-Identifier: Apache-2.0
"""Instructions of each native stage on fixed input, counted by valgrind: a guard against slowness.

    cmake -B build -DTRANSDUCER_TESTS=ON -DTRANSDUCER_CUDA=OFF && cmake --build build
    python -m benchmarks.instructions build/stage_driver            # compare with the recorded
    python -m benchmarks.instructions build/stage_driver --update   # record

Counts do not depend on what else the machine is doing, only on compiler, C library and instruction
set (valgrind shows AVX2 to the program, so that is the path counted). They are compared only on the
platform they were recorded on.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import subprocess
import tempfile
from pathlib import Path

RECORD = Path(__file__).with_name("instruction_counts.json")
TOLERANCE = 0.05
# A stage's name as callgrind demangles it, up to its arguments.
STAGES = {
    "JoinForwardCpu": "void transducer::JoinForwardCpu<float>",
    "JoinBackwardCpu": "void transducer::JoinBackwardCpu<float>",
    "JoinQuantizedCpu": "transducer::JoinQuantizedCpu",
    "CellScoresCpu": "void transducer::CellScoresCpu<float>",
    "QuantizedCellScoresCpu": "transducer::QuantizedCellScoresCpu",
    "LatticeCpu": "transducer::LatticeCpu",
    "LogitsGradCpu": "void transducer::LogitsGradCpu<float>",
    "AdditiveExponentialsCpu": "void transducer::AdditiveExponentialsCpu<float>",
    "AdditiveScoresCpu": "void transducer::AdditiveScoresCpu<float>",
    "AdditiveWeightsCpu": "void transducer::AdditiveWeightsCpu<float>",
    "AdditiveGradientsCpu": "void transducer::AdditiveGradientsCpu<float>",
}


def count(driver: Path) -> dict[str, int]:
    """Instructions of each stage, with all that it calls, in one run of `driver`."""

    def output_of(*command: str) -> str:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    with tempfile.TemporaryDirectory() as folder:
        out = f"{folder}/out"
        output_of("valgrind", "--tool=callgrind", f"--callgrind-out-file={out}", str(driver))
        options = ("--inclusive=yes", "--threshold=100", "--show-percs=no")
        table = output_of("callgrind_annotate", *options, out)
    counts = {}
    for stage, name in STAGES.items():
        # The table is sorted: a stage comes before the lambdas in it.
        line = re.search(rf"^ *([\d,]+)\s+\S*?:{re.escape(name)}\(", table, re.MULTILINE)
        if line is None:
            raise RuntimeError(f"{stage} is not in the table of callgrind_annotate:\n{table}")
        counts[stage] = int(line[1].replace(",", ""))
    return counts


def this_platform() -> str:
    """Compiler, C library and machine: counts of another platform say nothing."""
    compiler = subprocess.run(["c++", "-dumpfullversion"], capture_output=True, text=True)
    return f"c++ {compiler.stdout.strip()}, {'-'.join(platform.libc_ver())}, {platform.machine()}"


def compare(counts: dict[str, int], recorded: dict[str, int]) -> list[str]:
    """A line for each stage; those outside of the tolerance start with an exclamation mark."""
    lines = []
    for stage, number in counts.items():
        ratio = number / recorded[stage]
        mark = "!" if ratio > 1 + TOLERANCE else " "
        lines.append(f"{mark} {stage:<20} {number:>12,} {ratio:7.3f} of recorded")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.instructions",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("driver", type=Path, help="the built stage_driver")
    parser.add_argument("--update", action="store_true", help="record instead of comparing")
    arguments = parser.parse_args()
    counts = count(arguments.driver)
    recorded_on = json.loads(RECORD.read_text())["platform"] if RECORD.exists() else None
    if not arguments.update and recorded_on != this_platform():
        raise SystemExit(f"recorded on {recorded_on}, this is {this_platform()}: not comparable")
    if arguments.update:
        record = {"platform": this_platform(), "instructions": counts}
        RECORD.write_text(json.dumps(record, indent=2) + "\n")
    lines = compare(counts, json.loads(RECORD.read_text())["instructions"])
    print("\n".join(lines))
    if any(line.startswith("!") for line in lines):
        raise SystemExit(f"more than {TOLERANCE:.0%} above the recorded count")


if __name__ == "__main__":
    main()
