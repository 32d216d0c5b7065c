# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest

from transducer_toolkit.data.digits.voice_variation import NUM_FORMANTS, vary_voice

DEFINITION = """language variant
name female3
pitch 140 240
formant 1 120 75 150 -50
//formant 2 1 1 1
formant 3 90
consonants 80
flutter 3
"""


def formants_of(definition: str) -> dict[int, list[float]]:
    rows = [line.split() for line in definition.splitlines() if line.startswith("formant")]
    assert len(rows) == NUM_FORMANTS
    return {int(row[1]): [float(value) for value in row[2:]] for row in rows}


def test_formants_vary_around_the_definition():
    frequencies = []
    for seed in range(200):
        formants = formants_of(vary_voice(DEFINITION, np.random.default_rng(seed)))
        frequency, strength, width, shift_hz = formants[1]
        assert 105 <= frequency <= 135 and 56 <= strength <= 94 and 97 <= width <= 203
        assert shift_hz == -50
        frequencies.append(frequency)
        assert 79 <= formants[3][0] <= 101 and 88 <= formants[5][0] <= 112
    assert min(frequencies) < 108 and max(frequencies) > 132


def test_other_lines_stay_and_pitch_is_scaled():
    seen = set()
    for seed in range(100):
        lines = vary_voice(DEFINITION, np.random.default_rng(seed)).splitlines()
        assert {"language variant", "name female3", "flutter 3"} < set(lines)
        (pitch,) = (line for line in lines if line.startswith("pitch"))
        low, high = map(int, pitch.split()[1:])
        assert 119 <= low <= 161 and high / low == pytest.approx(240 / 140, rel=0.02)
        assert lines[-1].startswith("consonants ")  # the engine takes the last
        seen.add(low)
    assert len(seen) > 30


def test_a_seed_repeats():
    same, again, other = (vary_voice(DEFINITION, np.random.default_rng(seed)) for seed in (5, 5, 6))
    assert same == again != other
