# SPDX-License-Identifier: Apache-2.0
from types import SimpleNamespace

import pytest
import torch

from transducer_toolkit.training.callbacks import clock
from transducer_toolkit.training.callbacks.clock import StepClock


@pytest.mark.parametrize("accumulate", [1, 4])
def test_a_step_is_all_of_its_batches(monkeypatch, accumulate):
    now = SimpleNamespace(s=100.0)
    monkeypatch.setattr(clock.time, "perf_counter", lambda: now.s)
    trainer = SimpleNamespace(accumulate_grad_batches=accumulate)
    module = SimpleNamespace(device=torch.device("cpu"))
    step_clock = StepClock()
    step_clock.on_train_start(trainer, module)
    step_clock.on_train_epoch_start(trainer, module)
    for batch in range(12):
        now.s += 7.0 if batch < StepClock.NUM_IGNORED_BATCHES else 0.5
        step_clock.on_train_batch_end()
    assert step_clock.seconds_per_step == pytest.approx(0.5 * accumulate)
    step_clock.on_train_end(trainer, module)
    assert step_clock.training_s == pytest.approx(5 * 7.0 + 7 * 0.5)
