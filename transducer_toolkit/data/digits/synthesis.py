# SPDX-License-Identifier: Apache-2.0
"""Synthesizes plans to audio files, in shards, each in a new process."""

from __future__ import annotations

import logging
import multiprocessing
import os
import time
from collections.abc import Sequence
from multiprocessing.connection import wait
from multiprocessing.context import SpawnProcess
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path

import numpy as np
import soundfile
import torch
from tqdm import tqdm

from transducer_toolkit.data.audio import SAMPLE_RATE, resample
from transducer_toolkit.data.digits.espeak import EspeakSynthesizer, Speech
from transducer_toolkit.data.digits.recipe import UtterancePlan, perturbation
from transducer_toolkit.data.digits.voice_variation import vary_voice
from transducer_toolkit.data.keyed_random import keyed_generator
from transducer_toolkit.data.manifest import Utterance, read_manifest, write_manifest

__all__ = ["SHARD_UTTERANCES", "synthesize_plans", "write_utterance"]

logger = logging.getLogger(__name__)

# A result of espeak-ng depends on all earlier calls of its process. Each shard gets a new process,
# so results do not depend on the number of workers. Starting one costs as much as 200 utterances.
SHARD_UTTERANCES = 800
# Resampling by num/64 takes a small filter bank; 22,050 Hz to 16 kHz at speed s is 88.2 * s / 64.
_RATE_DENOMINATOR = 64
_LOG_EVERY_S = 10.0
_POLL_S = 0.2


def synthesize_plans(
    groups: Sequence[Sequence[UtterancePlan]], folder: Path, *, num_workers: int | None = None
) -> list[Utterance]:
    """Speak and distort all plans, writing one WAV file each.

    Args:
        groups: groups of plans; the audio of one group does not depend on the others.
        folder: existing folder for the files, which are named after the utterances' ids.
        num_workers: number of concurrent processes; None is one per available CPU. The result does
            not depend on it.

    Returns:
        Manifest rows in the order of the plans, with word start times.

    Raises:
        RuntimeError: a worker process failed; its traceback is on stderr.
    """
    num_workers = num_workers or _available_cpus()
    shards = [
        list(plans[start : start + SHARD_UTTERANCES])
        for plans in groups
        for start in range(0, len(plans), SHARD_UTTERANCES)
    ]
    num_plans = sum(map(len, groups))
    manifests = [folder / f"shard-{number:04d}.jsonl" for number in range(len(shards))]
    context = multiprocessing.get_context("spawn")
    waiting = list(range(len(shards)))
    running: dict[int, SpawnProcess] = {}  # by shard
    num_done = context.Value("q", 0)
    logged_at = time.monotonic()
    try:
        # disable=None: the bar shows on a terminal only; elsewhere a line now and then does.
        with tqdm(total=num_plans, unit="utt", desc="digits", disable=None) as bar:
            while waiting or running:
                while waiting and len(running) < num_workers:
                    number = waiting.pop(0)
                    arguments = (shards[number], manifests[number], num_done)
                    running[number] = context.Process(
                        target=_synthesize_shard, args=arguments, daemon=True
                    )
                    running[number].start()
                wait([process.sentinel for process in running.values()], timeout=_POLL_S)
                for number in [n for n, process in running.items() if not process.is_alive()]:
                    process = running.pop(number)
                    if process.exitcode != 0:
                        first, last = shards[number][0].id, shards[number][-1].id
                        raise RuntimeError(
                            f"the worker for utterances {first} to {last} ended with exit code "
                            f"{process.exitcode}; what it wrote to stderr says why"
                        )
                bar.update(num_done.value - bar.n)
                if bar.disable and time.monotonic() - logged_at > _LOG_EVERY_S:
                    logged_at = time.monotonic()
                    logger.info("digits: %d of %d utterances", num_done.value, num_plans)
    finally:
        for process in running.values():
            process.terminate()
            process.join()
    utterances = [utterance for path in manifests for utterance in read_manifest(path)]
    for path in manifests:
        path.unlink()
    return utterances


def write_utterance(
    path: Path,
    waveform: torch.Tensor,
    *,
    id_: str,
    text: str,
    speaker: str,
    extra: dict,
    word_starts_s: list[float] | None = None,
) -> Utterance:
    """Write a 16 kHz waveform ``(num_samples,)`` as 16-bit WAV and return its manifest row."""
    samples = waveform.numpy()
    soundfile.write(path, np.clip(samples, -1.0, 1.0), SAMPLE_RATE, subtype="PCM_16")
    return Utterance(
        id=id_,
        audio=str(path),
        duration_s=len(samples) / SAMPLE_RATE,
        text=text,
        speaker=speaker,
        word_starts_s=word_starts_s,
        extra=extra,
    )


def _synthesize_shard(
    plans: Sequence[UtterancePlan], manifest: Path, num_done: Synchronized[int]
) -> None:
    """Body of a worker process: synthesize ``plans`` in order into the manifest's folder."""
    torch.set_num_threads(1)  # the workers share the CPUs; one thread also fixes the sums' order
    engine = EspeakSynthesizer()
    perturb = perturbation()
    utterances = []
    parent = multiprocessing.parent_process()
    for plan in plans:
        if parent is not None and not parent.is_alive():
            return  # the parent was killed; the next process removes the incomplete folder
        variant = plan.variant
        if plan.varied:
            rng = keyed_generator(plan.seed, plan.id, "voice")
            variant = "varied"
            engine.define(variant, vary_voice(engine.definition(plan.variant), rng))
        speech = engine.synthesize(
            plan.spoken_text,
            voice=f"{plan.accent}+{variant}",
            rate_wpm=plan.rate_wpm,
            pitch=plan.pitch,
            pitch_range=plan.pitch_range,
            word_gap_10ms=plan.word_gap_10ms,
        )
        rng = keyed_generator(plan.seed, plan.id, "perturbation")
        waveform, word_starts_s = _finish(speech, plan, perturb.draw_speed(rng))
        utterances.append(
            write_utterance(
                manifest.parent / f"{plan.id}.wav",
                perturb.color(waveform, rng),
                id_=plan.id,
                text=plan.digits,
                speaker=plan.variant,
                word_starts_s=[round(start, 3) for start in word_starts_s],
                extra={"accent": plan.accent, "rate_wpm": plan.rate_wpm},
            )
        )
        with num_done.get_lock():
            num_done.value += 1
    write_manifest(manifest, utterances)


def _finish(speech: Speech, plan: UtterancePlan, speed: float) -> tuple[torch.Tensor, list[float]]:
    """Change speed and sample rate in one resampling; add the silence at both ends."""
    numerator = round(_RATE_DENOMINATOR * speech.sample_rate * speed / SAMPLE_RATE)
    speech_16k = resample(torch.from_numpy(speech.samples), numerator, _RATE_DENOMINATOR)
    before, behind = (torch.zeros(round(silence * SAMPLE_RATE)) for silence in plan.silence_s)
    exact_speed = numerator * SAMPLE_RATE / (_RATE_DENOMINATOR * speech.sample_rate)
    starts = [len(before) / SAMPLE_RATE + start / exact_speed for start in speech.word_starts_s]
    return torch.cat([before, speech_16k, behind]), starts


def _available_cpus() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
