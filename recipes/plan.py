# SPDX-License-Identifier: Apache-2.0
"""A training planned on paper: batches, reading, computing and talking, from stated assumptions.

    python recipes/plan.py --hours 100000 --gpus 64

The batches are simulated: utterances are drawn from a distribution of lengths and shared out by the
sampler that trains. All else is arithmetic on the options below; nothing is measured here.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from dataclasses import dataclass

import numpy as np

from transducer_toolkit.data.batching import LatticeBatchSampler

FRAMES_PER_S = 100  # features, before subsampling
SUBSAMPLING = 4
BYTES_A_CELL = 48  # of the fused loss, see the README


@dataclass(frozen=True)
class Assumptions:
    """What the plan rests on; every field is an option of the command line."""

    hours: float = 100_000
    gpus: int = 64
    gpus_per_node: int = 8
    mean_utterance_s: float = 12.0  # log-normal, cut at 1 s and 30 s
    tokens_per_s: float = 4.4  # 500 word pieces, read English
    max_cells: int = 800_000
    max_utterances: int = 200
    parameters_m: float = 118.0  # Conformer-L
    joiner_dim: int = 512
    vocab_size: int = 500
    kept_cells: float = 0.1  # of the fused loss, in mid-training
    gpu_tflops: float = 989.0  # H100, dense bfloat16
    utilisation: float = 0.2  # of that, in encoder and joiner
    audio_kbit_s: float = 140.0  # FLAC, 16 kHz, mono; 32 for Opus
    cpu_ms_per_audio_s: float = 0.4  # to decode and make features
    cores_per_gpu: int = 12
    link_gbyte_s: float = 50.0  # of each GPU between nodes, 400 Gbit/s
    latency_us: float = 30.0  # of a small all-reduce
    disk_gbyte_s: float = 2.0  # checkpoints, from one process
    epochs: int = 10
    sample: int = 200_000  # utterances that are simulated
    seed: int = 0


def simulate_batches(a: Assumptions) -> dict[str, float]:
    """Draw utterances, batch them for all GPUs, and measure the batches of one epoch.

    Returns:
        Means over the steps: utterances, seconds and cells a GPU; part of the frames that is not
        padding; and how long the mean GPU works while it waits for the slowest.
    """
    rng = np.random.default_rng(a.seed)
    sigma = 0.6
    mu = math.log(a.mean_utterance_s) - sigma**2 / 2
    seconds = rng.lognormal(mu, sigma, a.sample).clip(1.0, 30.0)
    frames = np.maximum(1, np.round(seconds * FRAMES_PER_S)).astype(np.int64)
    targets = rng.poisson(seconds * a.tokens_per_s)
    sampler = LatticeBatchSampler(
        frames.tolist(),
        targets.tolist(),
        max_cells=a.max_cells,
        max_utterances=a.max_utterances,
        num_output_frames=lambda length: -(-length // SUBSAMPLING),
        seed=a.seed,
        world_size=a.gpus,
    )
    batches = sampler.batches_of_all_ranks(0)
    cells = -(-frames // SUBSAMPLING) * (targets + 1)
    sums = {
        "utterances": np.array([len(batch) for batch in batches]),
        "seconds": np.array([seconds[batch].sum() for batch in batches]),
        "cells": np.array([cells[batch].sum() for batch in batches]),
        "padded": np.array([len(batch) * frames[batch].max() for batch in batches]),
    }
    found = {name: float(values.mean()) for name, values in sums.items()}
    found["filled"] = found["seconds"] * FRAMES_PER_S / found["padded"]
    for name in ("cells", "padded"):
        of_steps = sums[name].reshape(-1, a.gpus)
        found[f"balance_{name}"] = float(of_steps.mean() / of_steps.max(axis=1).mean())
    found["mean_s"] = float(seconds.mean())
    return found


def plan(a: Assumptions) -> list[tuple[str, str, str]]:
    """Rows of the plan: what, how much, from what."""
    b = simulate_batches(a)
    audio_s = a.hours * 3600
    steps = audio_s / (b["seconds"] * a.gpus)
    padded_encoder_frames = b["padded"] / SUBSAMPLING
    encoder_flop = 6e6 * a.parameters_m * padded_encoder_frames
    joiner_unit = 2.0 * b["cells"] * a.joiner_dim * a.vocab_size
    joiner_flop = joiner_unit * (1 + 3 * a.kept_cells)
    rate = a.gpu_tflops * 1e12 * a.utilisation
    # The encoder waits for the rank with most padded frames, the joiner for most cells.
    encoder_s = encoder_flop / rate / b["balance_padded"]
    joiner_s = joiner_flop / rate / b["balance_cells"]
    compute_s = encoder_s + joiner_s
    gradient_bytes = 4e6 * a.parameters_m
    ring_s = 2 * (a.gpus - 1) / a.gpus * gradient_bytes / (a.link_gbyte_s * 1e9)
    small_s = 4 * a.latency_us * 1e-6  # frames, non-finite, checkpoint, Lightning's own
    exposed_s = max(0.0, ring_s - 2 / 3 * compute_s) + small_s  # backward is two thirds
    step_s = compute_s + exposed_s
    bytes_s = b["seconds"] * a.gpus * a.audio_kbit_s * 125 / step_s
    cores = b["seconds"] * a.cpu_ms_per_audio_s * 1e-3 / step_s
    reading_s = step_s * max(1.0, cores / a.cores_per_gpu)
    epoch_h = steps * reading_s / 3600
    checkpoint_gb = 12e-3 * a.parameters_m
    nodes = math.ceil(a.gpus / a.gpus_per_node)
    utterances = audio_s / b["mean_s"]
    return [
        ("utterances", f"{utterances / 1e6:.1f} M", f"of {b['mean_s']:.1f} s"),
        ("stored audio", f"{audio_s * a.audio_kbit_s * 125 / 1e12:.1f} TB",
         f"{a.audio_kbit_s:.0f} kbit/s"),
        ("batch of a GPU", f"{b['utterances']:.0f} utterances, {b['seconds']:.0f} s",
         f"{b['cells'] / 1e3:.0f} k cells, max_cells {a.max_cells}"),
        ("fused loss, memory", f"{b['cells'] * BYTES_A_CELL / 2**20:.0f} MiB",
         f"{BYTES_A_CELL} bytes a cell; logits would be "
         f"{b['cells'] * a.vocab_size * 2 / 2**30:.1f} GiB in bfloat16"),
        ("frames that are not padding", f"{100 * b['filled']:.1f} %", "simulated"),
        ("balance over GPUs", f"{100 * b['balance_padded']:.1f} % frames, "
         f"{100 * b['balance_cells']:.1f} % cells", "mean over slowest, simulated"),
        ("steps of an epoch", f"{steps:,.0f}", f"{b['seconds'] * a.gpus / 3600:.1f} h a step"),
        ("computing", f"{1e3 * compute_s:.0f} ms a step", f"joiner and loss "
         f"{100 * joiner_s / compute_s:.0f} %, at {100 * a.utilisation:.0f} % of the peak"),
        ("all-reduce of gradients", f"{1e3 * ring_s:.1f} ms", f"{gradient_bytes / 1e6:.0f} MB "
         f"float32, ring, behind backward: {1e3 * exposed_s:.2f} ms of it and of 4 flags show"),
        ("reading", f"{bytes_s / 1e9:.2f} GB/s", f"{bytes_s / nodes / 1e6:.0f} MB/s a node"),
        ("decoding and features", f"{cores:.1f} cores a GPU",
         f"of {a.cores_per_gpu}; {a.cpu_ms_per_audio_s} ms for 1 s of audio"),
        ("epoch", f"{epoch_h:.2f} h", "bound by " + ("reading" if reading_s > step_s else
                                                      "computing")),
        (f"{a.epochs} epochs", f"{a.epochs * epoch_h:.1f} h",
         f"{a.epochs * epoch_h * a.gpus:,.0f} GPU hours"),
        ("checkpoint", f"{checkpoint_gb:.1f} GB", f"{checkpoint_gb / a.disk_gbyte_s:.1f} s; every "
         f"10 minutes {100 * checkpoint_gb / a.disk_gbyte_s / 600:.1f} % of the time"),
    ]  # fmt: skip


def main() -> None:
    """Print the plan as a Markdown table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    for field in dataclasses.fields(Assumptions):
        kind = type(field.default)
        option = "--" + field.name.replace("_", "-")
        parser.add_argument(option, type=kind, default=field.default, help=kind.__name__)
    rows = plan(Assumptions(**vars(parser.parse_args())))
    print("| what | how much | from |\n|---|---|---|")
    for row in rows:
        print(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    main()
