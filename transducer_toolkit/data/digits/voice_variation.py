# SPDX-License-Identifier: Apache-2.0
"""Random voices: definitions of espeak-ng variants with other formants, pitch and roughness."""

from __future__ import annotations

import numpy as np

__all__ = ["vary_voice"]

NUM_FORMANTS = 9  # 0 to 8
# Greatest relative changes. Each formant moves by itself; max_freq_warp of SpecAugment moves all.
FREQUENCY = 0.12
STRENGTH = 0.25
WIDTH = 0.35
PITCH = 0.15
ROUGHNESS_PROBABILITY = 0.3
CONSONANTS = (50, 160)  # loudness in percent, of unvoiced and of voiced ones


def vary_voice(definition: str, rng: np.random.Generator) -> str:
    """Return a variant's definition with frequency, strength and width of its formants changed.

    Args:
        definition: text of an espeak-ng variant file.
        rng: source of all randomness.

    Returns:
        The text with its ``formant`` lines replaced, and lines for pitch, roughness and the
        loudness of consonants.

    Example:
        >>> print(vary_voice("formant 1 100 90", np.random.default_rng(0)))  # doctest: +SKIP
        formant 1 103 78 121 0
    """
    formants = {number: [100.0, 100.0, 100.0, 0.0] for number in range(NUM_FORMANTS)}
    pitch = [82.0, 118.0]  # of a voice that names none
    kept = []
    for line in definition.splitlines():
        key, *values = line.partition("//")[0].split() or [""]
        if key == "formant":
            formants[int(values[0])][: len(values) - 1] = map(float, values[1:5])
        elif key == "pitch":
            pitch = [float(value) for value in values[:2]]
        else:
            kept.append(line)
    for number, (frequency, strength, width, shift_hz) in formants.items():
        frequency *= 1 + rng.uniform(-FREQUENCY, FREQUENCY)
        strength *= 1 + rng.uniform(-STRENGTH, STRENGTH)
        width *= 1 + rng.uniform(-WIDTH, WIDTH)
        varied = (frequency, strength, width, shift_hz)
        kept.append(" ".join(["formant", str(number), *(str(round(value)) for value in varied)]))
    scale = 1 + rng.uniform(-PITCH, PITCH)
    kept.append("pitch " + " ".join(str(round(value * scale)) for value in pitch))
    if rng.random() < ROUGHNESS_PROBABILITY:
        kept.append(f"roughness {rng.integers(1, 5)}")
    unvoiced, voiced = rng.integers(CONSONANTS[0], CONSONANTS[1] + 1, 2)
    kept.append(f"consonants {unvoiced} {voiced}")
    return "\n".join(kept) + "\n"
