# SPDX-License-Identifier: Apache-2.0
import math

import pytest
import torch

from transducer_toolkit.training import schedules


def rates(schedule, num_steps, **options):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2.0)
    scheduler = schedule(optimizer, **options)
    values = []
    for _ in range(num_steps):
        values.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return values


def test_warmup_cosine_rises_falls_and_stays():
    values = rates(
        schedules.warmup_cosine, 110, total_steps=100, warmup_fraction=0.1, final_fraction=0.2
    )
    assert values[:10] == pytest.approx([0.2 * (k + 1) for k in range(10)])
    for step in range(10, 101):
        cosine = (1 + math.cos(math.pi * (step - 10) / 90)) / 2
        assert values[step] == pytest.approx(2 * (0.2 + 0.8 * cosine))
    assert values[100:] == pytest.approx([0.4] * 10)


@pytest.mark.parametrize("total_steps", [1, 2, 3])
def test_warmup_cosine_of_few_steps(total_steps):
    values = rates(schedules.warmup_cosine, total_steps, total_steps=total_steps)
    assert all(0 < value <= 2 for value in values)


def test_constant():
    assert rates(schedules.constant, 4, total_steps=9, warmup_steps=2) == [1, 2, 2, 2]
    assert rates(schedules.constant, 2, total_steps=9) == [2, 2]


@pytest.mark.parametrize("total_steps", [15, 100, 1001])
@pytest.mark.parametrize("warmup_fraction", [0.1, 0.3])
def test_one_cycle_is_that_of_torch_and_goes_on(total_steps, warmup_fraction):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2.0)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 2.0, total_steps, pct_start=warmup_fraction, cycle_momentum=False
    )
    expected = []
    for step in range(total_steps):
        expected.append(scheduler.get_last_lr()[0])
        optimizer.step()
        if step < total_steps - 1:
            scheduler.step()
    options = {"total_steps": total_steps, "warmup_fraction": warmup_fraction}
    values = rates(schedules.one_cycle, total_steps + 5, **options)
    assert values[:total_steps] == pytest.approx(expected)
    assert values[total_steps:] == pytest.approx([8e-6] * 5)


@pytest.mark.parametrize("total_steps", [1, 2, 3])
def test_one_cycle_of_few_steps(total_steps):
    values = rates(schedules.one_cycle, total_steps, total_steps=total_steps)
    assert all(0 < value <= 2 for value in values)


def test_noam_is_that_of_the_paper():
    width, warmup_steps, peak = 144, 40, 2.0
    values = rates(schedules.noam, 200, total_steps=9, warmup_steps=warmup_steps)
    paper = [width**-0.5 * min(k**-0.5, k * warmup_steps**-1.5) for k in range(1, 201)]
    assert values == pytest.approx([peak * (warmup_steps * width) ** 0.5 * rate for rate in paper])
    assert max(values) == values[warmup_steps - 1] == peak
    with pytest.raises(ValueError, match="warmup_steps: expected at least 1, got 0"):
        rates(schedules.noam, 1, total_steps=9, warmup_steps=0)


@pytest.mark.parametrize("schedule", [schedules.warmup_cosine, schedules.one_cycle])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"total_steps": 0}, "total_steps: expected at least 1, got 0"),
        ({"total_steps": 9, "warmup_fraction": 1.0}, "warmup_fraction: expected a number in"),
        ({"total_steps": 9, "final_fraction": -0.1}, "final_fraction: expected a number in"),
    ],
)
def test_bad_arguments_are_named(schedule, options, message):
    with pytest.raises(ValueError, match=message):
        rates(schedule, 1, **options)


def test_the_rise_of_a_constant_is_checked():
    with pytest.raises(ValueError, match="warmup_steps: expected at least 0, got -1"):
        rates(schedules.constant, 1, total_steps=9, warmup_steps=-1)
    with pytest.raises(TypeError, match="warmup_steps: expected a number, got str"):
        rates(schedules.constant, 1, total_steps=9, warmup_steps="x")


def test_the_start_of_one_cycle_is_checked():
    with pytest.raises(
        ValueError, match=r"initial_fraction: expected a number in \[0, 1\], got 1.5"
    ):
        rates(schedules.one_cycle, 1, total_steps=9, initial_fraction=1.5)
