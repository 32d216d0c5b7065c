# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest

from transducer_toolkit.data.digits.espeak import Speech
from transducer_toolkit.data.digits.recipe import perturbation, plan_set
from transducer_toolkit.data.digits.synthesis import _finish

ENGINE_RATE = 22050
STARTS_S = [0.25, 0.6, 1.1]


@pytest.mark.parametrize("speed", [0.87, 1.0, 1.13])
def test_word_starts_follow_speed_silence_and_distortion(speed):
    """A click where each word starts is still there after everything that is done to speech."""
    samples = np.zeros(2 * ENGINE_RATE, dtype=np.float32)
    for start in STARTS_S:
        samples[round(start * ENGINE_RATE)] = 0.9
    plan = plan_set("train", 1, seed=0)[0]
    assert plan.silence_s[0] > 0.01
    waveform, starts_s = _finish(Speech(samples, ENGINE_RATE, STARTS_S), plan, speed)
    first_s = plan.silence_s[0] + STARTS_S[0] / speed
    assert starts_s[0] == pytest.approx(first_s, rel=0.01)  # speeds are multiples of 1/88
    perturb = perturbation()
    for seed in range(5):
        colored = perturb.color(waveform, np.random.default_rng(seed))
        for start in starts_s:
            center = round(16000 * start)
            window = colored[center - 800 : center + 800].abs()
            assert abs(int(window.argmax()) - 800) <= 2
