# SPDX-License-Identifier: Apache-2.0
"""The parameters of every utterance: text, voice, style and distortions."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources

import numpy as np
import yaml

from transducer_toolkit.data.augment import WaveformPerturbation
from transducer_toolkit.data.keyed_random import keyed_generator

__all__ = [
    "DIGIT_WORDS",
    "UtterancePlan",
    "Voices",
    "draw_words",
    "load_voices",
    "perturbation",
    "plan_set",
]

DIGIT_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
MAX_DIGITS = 8

# A model generalizes to other engines and to humans only if the styles vary widely: slow and fast,
# monotone and lively, with and without pauses.
RATE_WPM = (80, 230)  # drawn uniformly in the logarithm
PAUSE_PROBABILITIES = (0.0, 0.0, 0.2, 0.7)  # behind a digit; one is drawn per utterance
PITCH = (25, 75)
PITCH_RANGE = (10, 90)
MAX_WORD_GAP_10MS = 12
MAX_EDGE_SILENCE_S = 0.2
# Some speakers begin the vowel of "two" in front of the mouth, as in "tyoo", and the accents of the
# engine do not. Found in the errors on the test set `asterisk`. In phonemes of espeak-ng.
FRONTED = {"two": "[[tj'u:]]"}
FRONTED_PROBABILITY = 0.4  # of an utterance of the training set
VARIED_PROBABILITY = 0.8  # of a voice that no other utterance has, in the training set


def perturbation() -> WaveformPerturbation:
    """Return the distortions that are part of the corpus."""
    return WaveformPerturbation(
        speed=0.13,
        eq_db=6.0,
        noise_snr_db=(10.0, 40.0),
        noise_probability=0.7,
        telephone_probability=0.1,  # recordings of humans are often made at 8 kHz
        gain_db=(-12.0, 6.0),
    )


@dataclass(frozen=True)
class Voices:
    """Contents of ``voices.yaml``: accents and espeak-ng variants by set."""

    accents: Mapping[str, list[str]]
    train: list[str]
    val: list[str]
    test: list[str]
    excluded: Mapping[str, str]

    def of_set(self, name: str) -> tuple[list[str], list[str]]:
        """Variants and accents of a set: "train", "val", "test" or "excluded"."""
        accents = self.accents["train" if name in ("train", "val") else "test"]
        return list(getattr(self, name)), list(accents)


@cache
def load_voices() -> Voices:
    """Read the voice list that ships with the package."""
    text = resources.files(__package__).joinpath("voices.yaml").read_text(encoding="utf-8")
    return Voices(**yaml.safe_load(text))


@dataclass(frozen=True)
class UtterancePlan:
    """One utterance to synthesize.

    Attributes:
        id: unique over the corpus.
        digits: the words, such as "three seven".
        separators: after each word but the last, " " or ", " (a pause).
        accent: of espeak-ng, e.g. "en-us".
        variant: of espeak-ng, e.g. "f1".
        rate_wpm: words per minute.
        pitch: 0 to 99.
        pitch_range: 0 to 100.
        word_gap_10ms: extra pause between words, 10 ms each.
        silence_s: silence before and after the speech, seconds.
        varied: whether the variant is changed at random, see ``vary_voice``.
        fronted: whether "two" is spoken with a fronted vowel.
        seed: seed of the distortions and of the changes of the voice.
    """

    id: str
    digits: str
    separators: list[str]
    accent: str
    variant: str
    rate_wpm: int
    pitch: int
    pitch_range: int
    word_gap_10ms: int
    silence_s: tuple[float, float]
    varied: bool
    fronted: bool
    seed: int

    @property
    def spoken_text(self) -> str:
        """The text given to the engine."""
        words = self.digits.split()
        if self.fronted:
            words = [FRONTED.get(word, word) for word in words]
        gaps = [*self.separators, ""]
        return "".join(word + gap for word, gap in zip(words, gaps, strict=True))


def plan_set(name: str, num_utterances: int, *, seed: int) -> list[UtterancePlan]:
    """Plan a set: voices in turn, everything else drawn at random.

    Args:
        name: "train", "val", "test" or "excluded"; decides on voices and accents.
        num_utterances: how many.
        seed: of all draws; each utterance's depend on seed, set and position alone, so that a
            larger set begins with the smaller one.

    Returns:
        The plans; consecutive ones have different voices.
    """
    variants, accents = load_voices().of_set(name)
    return [
        _plan_utterance(f"{name}-{index:05d}", variants[index % len(variants)], accents, seed)
        for index in range(num_utterances)
    ]


def draw_words(rng: np.random.Generator) -> list[str]:
    """Draw a string of one to eight digits, as words."""
    return [DIGIT_WORDS[digit] for digit in rng.integers(0, 10, rng.integers(1, MAX_DIGITS + 1))]


def _plan_utterance(id_: str, variant: str, accents: list[str], seed: int) -> UtterancePlan:
    rng = keyed_generator(seed, id_, "plan")
    is_training = id_.startswith("train-")  # all else is as the engine has it
    words = draw_words(rng)
    pause_probability = PAUSE_PROBABILITIES[rng.integers(len(PAUSE_PROBABILITIES))]
    separators = [", " if rng.random() < pause_probability else " " for _ in words[1:]]
    return UtterancePlan(
        id=id_,
        digits=" ".join(words),
        separators=separators,
        accent=accents[rng.integers(len(accents))],
        variant=variant,
        rate_wpm=round(math.exp(rng.uniform(math.log(RATE_WPM[0]), math.log(RATE_WPM[1])))),
        pitch=int(rng.integers(PITCH[0], PITCH[1] + 1)),
        pitch_range=int(rng.integers(PITCH_RANGE[0], PITCH_RANGE[1] + 1)),
        word_gap_10ms=int(rng.integers(1, MAX_WORD_GAP_10MS + 1)) if rng.random() < 0.5 else 0,
        silence_s=(
            float(rng.uniform(0, MAX_EDGE_SILENCE_S)),
            float(rng.uniform(0, MAX_EDGE_SILENCE_S)),
        ),
        varied=is_training and rng.random() < VARIED_PROBABILITY,
        fronted=is_training and rng.random() < FRONTED_PROBABILITY,
        seed=seed,
    )
