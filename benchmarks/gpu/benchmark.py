# SPDX-License-Identifier: Apache-2.0
"""One call on a GPU, at most 8 minutes: losses, steps and single stages; the table comes last.

    bash benchmarks/gpu/bench.sh    # builds, builds the peers, and calls this
    python3 -m benchmarks.gpu.benchmark --device cpu --frames 500    # dry: its times mean nothing

LibriSpeech's shapes, V = 500, D = 512: 30 utterances unsorted; 10,000 frames of a sorted corpus.
Ratios are to torchaudio (with TF32 for bfloat16, which it does not know), and to the roofline: for
`loss` the time to read the logits twice and to write as much once, at the copy bandwidth; for
`step` and `pruned` three products of (cells, D) and (D, V), at the rate of a large one; both
measured here, in the same mode. For orientation, published times of one loss with its joiner,
forward and backward, on a V100 (sorted; ms / MB):
    torchaudio 601 / 12959, fast_rnnt unpruned 274 / 15107, pruned 38 / 2648,
    optimized_transducer 568 / 10903, warprnnt_numba 229 / 13062, warp-transducer 211 / 13062
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from benchmarks.jobs import Implementation, Job
from benchmarks.peers import Absent, implementations, require_present
from benchmarks.workloads import Workload, choose_batch, utterance_shapes
from transducer_toolkit.ops import stages
from transducer_toolkit.ops.lattice import CellScores, LatticeBatch

EXTRA = ("benchmarks.gpu.extra",)
MODES = ("float32", "tf32", "bfloat16")
VOCAB_SIZE, JOINER_DIM, MAX_FRAMES = 500, 512, 10_000
MIB = 2**20


def timed(
    run: Callable[..., object],
    prepare: Callable[[], tuple[object, ...]] = tuple,
    repetitions: int = 7,
    budget_s: float = 4.0,
) -> float:
    """Median seconds of run(*prepare()), without prepare, after a warm-up: by events on a GPU."""
    run(*prepare())
    seconds = []
    begun_s = time.perf_counter()
    while len(seconds) < repetitions and (not seconds or time.perf_counter() - begun_s < budget_s):
        prepared = prepare()
        seconds.append(elapsed_s(lambda: run(*prepared)))  # noqa: B023
    return statistics.median(seconds)


def elapsed_s(run: Callable[[], object]) -> float:
    if not torch.cuda.is_available():
        begun_s = time.perf_counter()
        run()
        return time.perf_counter() - begun_s
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    events[0].record()
    run()
    events[1].record()
    torch.cuda.synchronize()
    return events[0].elapsed_time(events[1]) / 1e3


@contextmanager
def arithmetic(mode: str, device: str) -> Iterator[None]:
    """float32 products exactly, or with TF32; or bfloat16 autocast."""
    torch.backends.cuda.matmul.allow_tf32 = mode == "tf32"
    with torch.autocast(device, torch.bfloat16, enabled=mode == "bfloat16"):
        yield
    torch.backends.cuda.matmul.allow_tf32 = False


def copy_bytes_per_s(device: str) -> float:
    """Bytes read and written each second by a large copy."""
    source = torch.ones(2**28 if device == "cuda" else 2**22, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / timed(lambda: target.copy_(source))


def flops_per_s(device: str) -> float:
    """Of a product as the joiner's, but large; in the mode that holds."""
    hidden = torch.randn(2**17 if device == "cuda" else 2**10, JOINER_DIM, device=device)
    weight = torch.randn(VOCAB_SIZE + 12, JOINER_DIM, device=device)
    if torch.is_autocast_enabled(device):
        hidden, weight = hidden.bfloat16(), weight.bfloat16()
    seconds = timed(lambda: hidden @ weight.T)
    return 2 * hidden.numel() * weight.size(0) / seconds


def roofline_s(suite: str, workload: Workload, bandwidth: float, flops: float) -> float:
    if suite == "loss":
        return 3 * 4 * workload.shape.num_cells * workload.vocab_size / bandwidth
    cells = workload.band_cells if suite == "pruned" else workload.shape.num_cells
    return 3 * 2 * cells * workload.joiner_dim * workload.vocab_size / flops


def measure(job: Job) -> tuple[float, float, float]:
    """Seconds, peak MiB above what there was before, and the sum of the losses."""
    losses = float(job.run(job.prepare())[0].double().sum())
    gc.collect()
    peak = 0.0
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        prepared = [job.prepare()]  # taken out by run: the job may free it
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        job.run(prepared.pop())
        torch.cuda.synchronize()
        peak = (torch.cuda.max_memory_allocated() - before) / MIB
    return timed(job.run, lambda: (job.prepare(),)), peak, losses


def batches(device: str, max_frames: int) -> dict[str, Workload]:
    shapes = utterance_shapes(None)
    unsorted = choose_batch(shapes, max_frames=10**9, batch="unsorted")[:30]
    chosen = {
        "unsorted 30": unsorted[: max(2, 30 * max_frames // MAX_FRAMES)],
        "sorted 10k": choose_batch(shapes, max_frames=max_frames, batch="sorted"),
    }
    return {
        name: Workload(
            tuple(lengths[:, 0].tolist()),
            tuple(lengths[:, 1].tolist()),
            VOCAB_SIZE,
            JOINER_DIM,
            device=device,
        )
        for name, lengths in chosen.items()
    }


def rows_of(
    batch: str,
    suite: str,
    mode: str,
    workload: Workload,
    roofline: float,
    deadline_s: float,
    torchaudio_s: dict[str, float],
) -> Iterator[str]:
    """One line of the table for each implementation that has the suite.

    `torchaudio_s` keeps torchaudio's seconds by suite; a pruned step is compared with its step.
    """
    for name, entry in implementations(EXTRA).items():
        if suite not in entry.jobs or (mode == "bfloat16" and entry.project != "ours"):
            continue  # peers do not know it
        label = f"{batch:<12} {suite:<7} {mode:<9} {name:<28}"
        if time.perf_counter() > deadline_s:
            yield f"{label} not measured: out of time"
            continue
        try:
            with arithmetic(mode, workload.device):
                seconds, peak, losses = one(entry, suite, workload)
        except Absent as reason:
            yield f"{label} absent: {reason}"
            continue
        except Exception as error:
            yield f"{label} {type(error).__name__}: {str(error).splitlines()[0][:80]}"
            continue
        if name == "torchaudio":
            torchaudio_s[suite] = seconds
        known = torchaudio_s.get(suite if suite == "loss" else "step")
        speedup = f"{known / seconds:>7.1f}x" if known else f"{'':>8}"
        yield (
            f"{label} {1e3 * seconds:>9.2f} {peak:>10.1f} {speedup} {seconds / roofline:>8.2f} "
            f"{losses:>14.3f}"
        )


def one(entry: Implementation, suite: str, workload: Workload) -> tuple[float, float, float]:
    require_present(entry)
    return measure(entry.jobs[suite](workload))


def stage_rows(
    batch: str, workload: Workload, bandwidth: float, dtype: torch.dtype
) -> Iterator[str]:
    """Milliseconds of each stage on packed logits; ratio to the time of moving what it must."""
    shape, device = workload.shape, torch.device(workload.device)
    targets, logits = workload.targets(), workload.logits().to(dtype)
    lattices = LatticeBatch(
        shape.logit_lengths,
        shape.target_lengths,
        targets,
        max_frames=shape.max_frames,
        padded=False,
        device=device,
    )
    tile, scores = lattices.all_rows(), CellScores(lattices, device)
    options = {"topology": "regular", "delay_penalty": 0.0, "fastemit_lambda": 0.0}
    loss_grad = torch.ones(shape.num_utterances, dtype=torch.float64, device=device)
    grad = torch.empty_like(logits)

    def stage_1() -> None:
        stages.cell_scores(logits, lattices, tile, scores, blank=0)

    def stage_2(exact: bool = False) -> tuple[torch.Tensor, ...]:
        return stages.lattice(
            scores.blank, scores.label, lattices, with_uses=True, exact=exact, **options
        )

    stage_1()
    _, *uses = stage_2()

    def stage_3() -> None:
        stages.logits_grad(
            logits, lattices, tile, scores.normaliser, *uses, loss_grad, blank=0, out=grad
        )

    def filter_rows() -> None:
        stages.kept_rows(*uses, lattices, dropped_mass=1e-6)

    logits_s = logits.nbytes / bandwidth
    for name, run, floor_s in (
        ("1 cell_scores", stage_1, logits_s),
        ("2 lattice", stage_2, 0.0),
        ("2 lattice, exact", lambda: stage_2(True), 0.0),
        ("3 logits_grad", stage_3, 2 * logits_s),
        ("kept_rows", filter_rows, 0.0),
    ):
        seconds = timed(run)
        ratio = f"{seconds / floor_s:>8.2f}" if floor_s else ""
        kind = str(dtype).removeprefix("torch.")
        label = f"{batch:<12} {'stage':<7} {kind:<9} {name:<28}"
        yield f"{label} {1e3 * seconds:>9.3f} {'':>19} {ratio}"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=400.0, help="stop measuring after so long")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--frames", type=int, default=MAX_FRAMES, help="of the sorted batch")
    parser.add_argument("--peers-dir", default="", help="where peers.py has built the others")
    options = parser.parse_args(arguments)
    if options.peers_dir:
        sys.path.append(options.peers_dir)
    device = options.device
    deadline_s = time.perf_counter() + options.seconds
    bandwidth = copy_bytes_per_s(device)
    rates = {}
    for mode in MODES:
        with arithmetic(mode, device):
            rates[mode] = flops_per_s(device)
    lines = []
    workloads = batches(device, options.frames)
    for batch, workload in reversed(workloads.items()):  # the sorted one first: it is the measure
        torchaudio_s: dict[str, float] = {}
        for dtype in (torch.float32, torch.bfloat16):
            lines += list(stage_rows(batch, workload, bandwidth, dtype))
        for suite in ("step", "loss", "pruned"):
            for mode in MODES if suite != "loss" else MODES[:1]:  # it multiplies no matrices
                roofline = roofline_s(suite, workload, bandwidth, rates[mode])
                rows = rows_of(batch, suite, mode, workload, roofline, deadline_s, torchaudio_s)
                for line in rows:
                    print(line, flush=True)
                    lines.append(line)
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU, a dry run"
    print(f"\n{name}, torch {torch.__version__}")
    print(f"copy {bandwidth / 1e9:.0f} GB/s; products in TFLOP/s:", end=" ")
    print(", ".join(f"{mode} {rate / 1e12:.0f}" for mode, rate in rates.items()))
    for batch, workload in workloads.items():
        print(f"{batch}: {len(workload.frames)} utterances, {workload.shape.num_cells} cells")
    print(f"{'':<59} {'ms':>9} {'peak MiB':>10} {'faster':>8} {'/ roof':>8} {'sum of losses':>14}")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
