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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"total_steps": 0}, "total_steps must be at least 1, got 0"),
        ({"total_steps": 9, "warmup_fraction": 1.0}, "warmup_fraction must be in"),
        ({"total_steps": 9, "final_fraction": -0.1}, "final_fraction must be in"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        rates(schedules.warmup_cosine, 1, **options)
