# SPDX-License-Identifier: Apache-2.0
"""Removes each barrier of the CUDA kernels in turn and says whether emulation notices.

    python -m tests.mutate_barriers [FILE ...]     e.g. lattice_cuda.cu; default: all

A barrier is noticed if, without it, results change with the order of threads, or differ from those
of the unchanged kernels, or the emulation stops. One that is not noticed is not needed, or not
tested, or its comment says that it orders memory after shuffles: emulated shuffles order memory,
and those of a device do not.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from tests import stage_calls as stages
from tests.backends import ORDERS, ROOT, build_emulated, load_emulated
from tests.stage_cases import kept_rows, make_case, random_scores, random_uses, score
from transducer_toolkit.ops import native
from transducer_toolkit.ops.additive_stages import (
    AdditiveInputs,
    AdditiveOptions,
    AdditiveStages,
    ScoreGrads,
)
from transducer_toolkit.ops.lattice import CellScores
from transducer_toolkit.ops.options import LossOptions
from transducer_toolkit.ops.prune_windows import greedy_ranges
from transducer_toolkit.ops.stages import RowWeights
from transducer_toolkit.ops.topology import TOPOLOGIES

_ORDERS_MEMORY = "shuffles do not order memory"  # in the comment of a barrier
# __syncthreads_or(x) is x without its barrier, which is a vote too.
_BARRIER = re.compile(r"__sync(?:threads|warp)\(\);|__syncthreads_or(?=\()")


def barriers(source: Path) -> list[tuple[int, int]]:
    """Where each barrier of a file is: begin and end in its text."""
    return [match.span() for match in _BARRIER.finditer(source.read_text())]


def run_everything() -> list[torch.Tensor]:
    """Output of every kernel that has a barrier, in shapes that need each of them."""
    torch.manual_seed(5)
    results: list[torch.Tensor] = []
    case = make_case("packed", (2, 1), (1, 2), 4500)  # a block a row
    batch = case.batch()
    results += score(torch.randn(batch.num_rows, 4500), batch, batch.all_rows())
    for topology in TOPOLOGIES:
        for frames, symbols in (((9, 40), (45, 33)), ((40, 5), (9, 4)), ((700,), (690,))):
            if not TOPOLOGIES[topology].labels_share_frames:
                symbols = tuple(min(pair) for pair in zip(frames, symbols, strict=True))
            batch = make_case("packed", frames, symbols).batch()
            blank, label = random_scores(batch)
            label.clamp_(min=-60)
            if len(frames) == 2:  # of no path (but in `regular`): seen by one lane only
                blank[frames[0] * (symbols[0] + 1) + 3] = torch.nan
            results += stages.lattice(
                blank,
                label,
                batch,
                topology=topology,
                delay_penalty=0.0,
                fastemit_lambda=0.0,
                with_uses=True,
            )
    for frames, symbols in (((9, 40), (45, 33)), ((30,), (690,))):
        batch = make_case("packed", frames, symbols).batch()
        blank, label = (torch.randn(batch.num_rows, 3).double() - 2 for _ in range(2))
        if len(frames) == 2:
            blank[frames[0] * (symbols[0] + 1) + 3, 1] = torch.nan
        results += stages.duration_lattice(blank, label, batch, durations=(1, 2, 4))
    case = make_case("packed", (90, 5, 60), (20, 3, 30))
    batch = case.batch()
    for dtype in (torch.float32, torch.bfloat16):
        logits = torch.randn(batch.num_rows, 7).to(dtype)
        arguments = logits.double().logsumexp(-1), *random_uses(batch), torch.ones(3).double()
        stages.logits_grad(logits, batch, batch.all_rows(), *arguments, blank=6, out=logits)
        results.append(logits.float())
    several_runs = make_case("packed", (150, 4), (59, 3)).batch()
    for lattices in (batch, several_runs):
        for dropped_mass in (1e-6, 1e-2):
            results += kept_rows(random_uses(lattices), lattices, dropped_mass)
        blank, label = random_scores(lattices)
        uses = *random_uses(lattices), blank.new_empty(lattices.num_rows, 0)
        results.append(
            stages.row_weights(
                CellScores(blank, label, blank),
                uses,
                lattices,
                LossOptions(0),
                RowWeights(False, 1.0, 0.0, 0.0, 10.0, 1e-2),
                loss=None,
                error=torch.full((lattices.num_utterances,), 0.1, dtype=torch.float64),
                places=torch.full((lattices.num_rows,), -1),
            )
        )
    symbols = torch.randint(0, 40, (2, 70))  # many several times
    inputs = AdditiveInputs(
        60 * torch.randn(2, 72, 40),  # products underflow
        60 * torch.randn(2, 5, 40),
        symbols,
        torch.tensor([[0, 0, 70, 5], [1, 0, 60, 4]]),
    )
    additive = AdditiveStages(inputs, AdditiveOptions(0, 0.5, 0.3, 0.2), with_scores=True)
    blank, label, normalizer, product = additive.scores()
    grads = ScoreGrads(*torch.rand(2, 2, 5, 71).double(), torch.ones(2).double())
    results += [blank, label, *additive.gradients(product, normalizer, grads)]
    posteriors = torch.rand(2, 70, 601), torch.rand(2, 71, 600)
    results.append(greedy_ranges(*posteriors, torch.tensor([[0, 0, 70, 600]] * 2), 4, 3))
    return results


def main() -> None:
    """Prints the results of run_everything in every order, or that orders disagree."""
    module = load_emulated(Path(sys.argv[2]))
    digests = set()
    with native.emulated(module):
        for order, seed in ORDERS:
            module.set_order(getattr(module.Order, order), seed)
            results = run_everything()
            digests.add(tuple(tensor.nan_to_num(nan=7e5).numpy().tobytes() for tensor in results))
    if len(digests) > 1:
        sys.exit("results depend on the order of threads")
    Path(sys.argv[3]).write_bytes(b"".join(digests.pop()))


@contextmanager
def build_tree() -> Iterator[tuple[Path, Path]]:
    """A copy of the sources to change, and a build folder beside it."""
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "source"
        for name in ("csrc", "transducer_toolkit/_version.py", "CMakeLists.txt"):
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
            copy(ROOT / name, tree / name)
        yield tree, Path(folder) / "build"


def outcome(tree: Path, build: Path) -> str | bytes:
    """What becomes of the sources as they are: why they are wrong, or their results."""
    module = build_emulated(tree, build, "-DCMAKE_CXX_FLAGS_RELEASE=-O1")
    results = build / "results"
    # A process of its own: a module cannot be loaded twice, and may crash.
    command = [sys.executable, "-m", "tests.mutate_barriers", "--run", str(module), str(results)]
    try:
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    except subprocess.TimeoutExpired:
        return "does not end"
    if run.returncode:
        return run.stderr.strip().splitlines()[-1] if run.stderr.strip() else "crashes"
    return results.read_bytes()


def survivors(files: list[str], only: int | None = None) -> list[str]:
    """Barriers whose removal nobody notices; prints one line a barrier."""
    unnoticed = []
    with build_tree() as (tree, build):
        expected = outcome(tree, build)
        if isinstance(expected, str):
            raise RuntimeError(f"the unchanged kernels: {expected}")
        for name in files:
            source = tree / "csrc" / name
            text = source.read_text()
            spans = barriers(source)
            for begin, end in spans if only is None else spans[only : only + 1]:
                source.write_text(text[:begin] + text[end:])
                found = outcome(tree, build)
                where = f"{name}:{text[:begin].count(chr(10)) + 1} {text[begin:end]}"
                if found == expected and _ORDERS_MEMORY in text[begin:].partition("\n")[0]:
                    found = "not noticed: emulated shuffles order memory"
                elif found == expected:
                    unnoticed.append(where)
                    found = "NOT NOTICED"
                elif isinstance(found, bytes):
                    found = "results differ from those with it, alike in every order"
                print(f"{where:<45} {found}", flush=True)
                source.write_text(text)
    return unnoticed


def all_files() -> list[str]:
    return sorted(path.name for path in (ROOT / "csrc").glob("*_cuda.cu") if barriers(path))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--run"]:
        main()
    else:
        parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
        parser.add_argument("files", nargs="*", metavar="FILE")
        left = survivors(parser.parse_args().files or all_files())
        print(f"{len(left)} barriers not noticed")
        sys.exit(bool(left))
