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
    trainer = SimpleNamespace(
        accumulate_grad_batches=accumulate, global_step=30, log_every_n_steps=2
    )
    logged = []
    module = SimpleNamespace(
        device=torch.device("cpu"), log=lambda name, value: logged.append((name, value))
    )
    step_clock = StepClock()
    step_clock.on_train_start(trainer, module)
    step_clock.on_train_epoch_start(trainer, module)
    for batch in range(12):
        if batch <= StepClock.NUM_IGNORED_BATCHES:  # nothing is measured yet, which is not 0 s
            assert step_clock.seconds_per_step is None and step_clock.loss_part is None
        now.s += 7.0 if batch < StepClock.NUM_IGNORED_BATCHES else 0.5
        trainer.global_step = 30 + (batch + 1) // accumulate
        step_clock.on_train_batch_end(trainer, module, None, None, batch)
    assert {name for name, _ in logged} == {"train/seconds_per_step"}
    assert logged[0][1] == pytest.approx(7.0 * accumulate) or accumulate > 1
    assert logged[-1][1] == pytest.approx(0.5 * accumulate)
    assert step_clock.seconds_per_step == pytest.approx(0.5 * accumulate)
    seconds = 5 * 7.0 + 7 * 0.5
    saved = step_clock.state_dict()  # in a checkpoint during the training
    step_clock.on_train_end(trainer, module)
    assert step_clock.training_s == step_clock.total_s == pytest.approx(seconds)
    assert step_clock.num_steps == 12 // accumulate
    assert saved == step_clock.state_dict() == {"training_s": pytest.approx(seconds)}
    step_clock.load_state_dict({"training_s": 1.0})  # of the best checkpoint, for the test
    assert step_clock.total_s == pytest.approx(seconds)

    second = StepClock()
    second.load_state_dict(saved)
    assert second.total_s == pytest.approx(seconds)
    second.on_train_start(trainer, module)
    now.s += 4.0
    second.on_train_end(trainer, module)
    assert (second.num_steps, second.training_s) == (0, pytest.approx(4.0))
    assert second.total_s == pytest.approx(seconds + 4.0)
