# SPDX-License-Identifier: Apache-2.0
"""Implementations that go wrong in every way that the benchmarks have to report."""

import os
import signal
import time

import torch
from torch import Tensor

from benchmarks.jobs import Implementation, LossOfLogits, unpruned
from benchmarks.peers.ours import make_loss as make_right_loss
from benchmarks.workloads import Workload


class ScaledGradient(torch.autograd.Function):
    """The identity, with a gradient that is 10 % too large."""

    @staticmethod
    def forward(ctx, logits: Tensor) -> Tensor:
        return logits.clone()

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return 1.1 * grad


def wrong_gradient(workload: Workload) -> LossOfLogits:
    loss = make_right_loss(workload, inplace=False)
    return lambda logits: loss(ScaledGradient.apply(logits))


def wrong_loss(workload: Workload) -> LossOfLogits:
    loss = make_right_loss(workload, inplace=False)
    return lambda logits: loss(logits) + 1


def nan_loss(workload: Workload) -> LossOfLogits:
    return lambda logits: logits.sum(1)[: len(workload.frames)] * float("nan")


def crash(workload: Workload) -> LossOfLogits:
    return lambda logits: os.kill(os.getpid(), signal.SIGSEGV)


def leave(workload: Workload) -> LossOfLogits:
    return lambda logits: os._exit(3)


def fail(workload: Workload) -> LossOfLogits:
    raise ValueError("blank: expected 0 | 1\nand a second line")


def exhaust_memory(workload: Workload) -> LossOfLogits:
    return lambda logits: torch.empty(2**50)


def exceed_the_limit(workload: Workload) -> LossOfLogits:
    return lambda logits: torch.ones(2**28, dtype=torch.float64).sum()  # 2 GiB


def hang(workload: Workload) -> LossOfLogits:
    return lambda logits: time.sleep(600)


def _entry(function, **fields) -> Implementation:
    name = function.__name__.replace("_", " ")
    fields = {"module": "torch", "jobs": unpruned(function, packed=True), **fields}
    return Implementation(name, project="odd", **fields)


def not_installed(workload: Workload) -> LossOfLogits:
    raise AssertionError("its module cannot be imported")


def too_old(workload: Workload) -> LossOfLogits:
    raise AssertionError("its module lacks the function")


IMPLEMENTATIONS = [
    _entry(wrong_gradient),
    _entry(wrong_loss),
    _entry(nan_loss),
    _entry(crash),
    _entry(leave),
    _entry(fail),
    _entry(exhaust_memory),
    _entry(exceed_the_limit),
    _entry(hang),
    _entry(not_installed, module="no_such_project"),
    _entry(too_old, needs=("no_such_loss",)),
]
