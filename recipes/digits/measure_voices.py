# SPDX-License-Identifier: Apache-2.0
"""Measure espeak-ng's voice variants: the numbers behind ``voices.yaml`` (about a minute).

    python recipes/digits/measure_voices.py

Prints, for every variant, the share of its digits that other voices' digits agree with, what its
definition says of echo and of the third formant, the rule that excludes it, its set, and the
nearest variant. Exits with 1 when that is not what ``voices.yaml`` says. No recogniser is involved.
"""

from __future__ import annotations

import itertools
import re
import sys
from pathlib import Path

import espeakng_loader
import numpy as np
import torch

from transducer_toolkit.data.audio import resample
from transducer_toolkit.data.digits.espeak import EspeakSynthesizer, Speech
from transducer_toolkit.data.digits.recipe import DIGIT_WORDS, load_voices
from transducer_toolkit.data.features import Fbank

ACCENTS = ("en-us", "en", "en-gb-x-rp", "en-029")
RATES_WPM = (90, 150, 220)
FRAMES_PER_DIGIT = 20  # every digit is stretched to as many
DYNAMIC_RANGE = 12.0  # of the features, below the loudest bin; natural logarithm of power
NEIGHBOURS = 15
MIN_VOTE = 0.95
MIN_ECHO_MS, MIN_ECHO_PERCENT = 100, 100
MIN_THIRD_FORMANT_PERCENT = 50
NEAR_COPY = 1 / 3  # of the median distance between two variants


def digits_of(speech: Speech, fbank: Fbank) -> torch.Tensor:
    """Cut a string into its digits: ``(num_digits, FRAMES_PER_DIGIT * F)``."""
    features = fbank(resample(torch.from_numpy(speech.samples), speech.sample_rate, 16000))
    features = features.clamp_min(float(features.max()) - DYNAMIC_RANGE)
    features = features - features.mean(dim=0)
    starts = [round(100 * start) for start in speech.word_starts_s] + [len(features)]
    digits = [
        torch.nn.functional.interpolate(
            features[start : max(end, start + 2)].T[None],
            size=FRAMES_PER_DIGIT,
            mode="linear",
            align_corners=True,
        ).flatten()
        for start, end in itertools.pairwise(starts)
    ]
    return torch.stack(digits)


def measure(variants: list[str]) -> torch.Tensor:
    """Digits of all variants, sorted by digit: ``(variants, conditions, 10, features)``."""
    engine, fbank = EspeakSynthesizer(), Fbank(num_mel_bins=40)
    result = []
    for variant in variants:
        conditions = []
        for number, (accent, rate_wpm) in enumerate((a, r) for a in ACCENTS for r in RATES_WPM):
            order = np.random.default_rng(number).permutation(10)
            speech = engine.synthesize(
                " ".join(DIGIT_WORDS[digit] for digit in order),
                voice=f"{accent}+{variant}",
                rate_wpm=rate_wpm,
                pitch=50,
                pitch_range=50,
                word_gap_10ms=0,
            )
            conditions.append(digits_of(speech, fbank)[np.argsort(order)])
        result.append(torch.stack(conditions))
    return torch.stack(result)


def family_of(variant: str) -> str:
    """Return the name without its number, except for f1 to f5 and m1 to m8, which are no family."""
    stem = re.sub(r"\d+$", "", variant)
    return stem if len(stem) > 1 else variant


def votes(variants: list[str], digits: torch.Tensor) -> list[float]:
    """Mean share of the nearest neighbours, outside the family, that are the same digit."""
    families = np.array([family_of(variant) for variant in variants])
    flat = digits.flatten(0, 2)
    labels = torch.arange(10).repeat(len(flat) // 10)
    result = []
    for number, own in enumerate(digits):
        distances = torch.cdist(own.flatten(0, 1), flat)
        relatives = torch.from_numpy(families == families[number])
        distances[:, relatives.repeat_interleave(len(flat) // len(variants))] = torch.inf
        nearest = distances.topk(NEIGHBOURS, largest=False).indices
        same = labels[nearest] == torch.arange(10).repeat(len(own))[:, None]
        result.append(float(same.float().mean()))
    return result


def numbers_after(keyword: str, definition: str) -> list[float]:
    """Return the numbers of the line of a definition that begins with ``keyword``, if any."""
    match = re.search(rf"^\s*{keyword}((?:\s+\d+)+)", definition, re.MULTILINE)
    return [float(number) for number in match.group(1).split()] if match else []


def reason(vote: float, definition: str) -> str:
    """Return the rule that excludes a voice, or an empty string."""
    echo, third = numbers_after("echo", definition), numbers_after("formant 3", definition)
    if vote < MIN_VOTE:
        return "vote"
    if len(echo) == 2 and echo[0] >= MIN_ECHO_MS and echo[1] > MIN_ECHO_PERCENT:
        return "echo"
    if third and third[0] < MIN_THIRD_FORMANT_PERCENT:
        return "third"
    return ""


def main() -> None:
    folder = Path(espeakng_loader.get_data_path(), "voices", "!v")
    variants = sorted(path.name for path in folder.iterdir())
    digits = measure(variants)
    flat = digits.flatten(1, 2)
    distances = torch.stack([(flat - own).norm(dim=2).mean(dim=1) for own in flat])
    near_copy = NEAR_COPY * float(distances[distances > 0].median())
    distances.fill_diagonal_(torch.inf)

    voices = load_voices()
    sets = {v: s for s in ("train", "val", "test", "excluded") for v in voices.of_set(s)[0]}
    disagreements = []
    print(f"{'variant':14}vote   rule   set       nearest (distance; copies: < {near_copy:.0f})")
    for number, (variant, vote) in enumerate(zip(variants, votes(variants, digits), strict=True)):
        rule = reason(vote, (folder / variant).read_text(encoding="utf-8", errors="replace"))
        nearest = int(distances[number].argmin())
        print(
            f"{variant:14}{100 * vote:3.0f} %  {rule:7}{sets.get(variant, '-'):10}"
            f"{variants[nearest]} ({distances[number, nearest]:.0f})"
        )
        if rule != voices.excluded.get(variant, "").split(" ")[0].rstrip(":"):
            disagreements.append(f"{variant} is excluded by {rule or 'nothing'}")
        for other in np.flatnonzero(distances[number].numpy() < near_copy):
            pair = {sets.get(variant), sets.get(variants[other])} - {"excluded"}
            if len(pair) > 1:
                disagreements.append(f"{variant} and {variants[other]} are near copies")
    if disagreements:
        sys.exit("voices.yaml disagrees: " + "; ".join(disagreements))


if __name__ == "__main__":
    main()
