# SPDX-License-Identifier: Apache-2.0
from collections import Counter

import pytest

from transducer_toolkit.data.digits.recipe import (
    DIGIT_WORDS,
    MAX_DIGITS,
    RATE_WPM,
    load_voices,
    plan_set,
)

SETS = ("train", "val", "test", "excluded")


def test_no_voice_is_in_two_sets():
    voices = [variant for name in SETS for variant in load_voices().of_set(name)[0]]
    assert len(voices) == len(set(voices)) == 104


def test_families_stay_together():
    for families in (
        ("iven", "val"),
        ("steph", "train"),
        ("robosoft", "train"),
        ("klatt", "train"),
    ):
        stem, home = families
        members = {n for n in SETS for v in load_voices().of_set(n)[0] if v.startswith(stem)}
        assert members == {home}


def test_the_test_accent_is_unseen():
    seen = {accent for name in ("train", "val") for accent in load_voices().of_set(name)[1]}
    for name in ("test", "excluded"):
        assert not seen & set(load_voices().of_set(name)[1])


def test_every_excluded_voice_has_a_reason():
    assert all(
        reason.startswith(("vote", "echo", "third")) for reason in load_voices().excluded.values()
    )


def test_plans_repeat_and_extend():
    long, short = plan_set("train", 120, seed=0), plan_set("train", 70, seed=0)
    assert long[:70] == short
    assert plan_set("train", 70, seed=1) != short


def test_only_the_training_has_other_voices_and_vowels():
    plans = plan_set("train", 500, seed=0)
    assert 350 < sum(plan.varied for plan in plans) < 450
    assert 150 < sum(plan.fronted for plan in plans) < 250
    for name in ("val", "test", "excluded"):
        assert not any(plan.varied or plan.fronted for plan in plan_set(name, 50, seed=0))


def test_a_fronted_vowel_is_spoken_and_not_written():
    plans = [plan for plan in plan_set("train", 200, seed=0) if "two" in plan.digits.split()]
    assert {plan.fronted for plan in plans} == {True, False}
    for plan in plans:
        assert "[[" not in plan.digits
        assert ("[[tj'u:]]" in plan.spoken_text) == plan.fronted
        assert ("two" in plan.spoken_text) != plan.fronted


@pytest.mark.parametrize("name", SETS)
def test_plans_are_broad(name):
    plans = plan_set(name, 500, seed=0)
    variants, accents = load_voices().of_set(name)
    counts = Counter(plan.variant for plan in plans)
    assert set(counts) == set(variants) and max(counts.values()) - min(counts.values()) <= 1
    assert {plan.accent for plan in plans} == set(accents)
    words = Counter(word for plan in plans for word in plan.digits.split())
    assert set(words) == set(DIGIT_WORDS)
    assert min(words.values()) > 0.7 * max(words.values())
    assert {len(plan.digits.split()) for plan in plans} == set(range(1, MAX_DIGITS + 1))
    rates = sorted(plan.rate_wpm for plan in plans)
    assert RATE_WPM[0] <= rates[0] < 90 and 215 < rates[-1] <= RATE_WPM[1]
    assert len({plan.id for plan in plans}) == 500


def test_what_is_spoken_is_the_text_but_for_pauses():
    plans = plan_set("train", 200, seed=0)
    for plan in plans:
        assert plan.spoken_text.replace(",", "").replace("[[tj'u:]]", "two") == plan.digits
    assert 0.2 < sum("," in plan.spoken_text for plan in plans) / 200 < 0.6
