# SPDX-License-Identifier: Apache-2.0
"""The peak memory of a step with fused_joiner_loss, each in a process of its own."""

import os
import subprocess

import pytest

from tests.fork_server import ROOT, python


def peak_bytes(batch, frames, symbols, vocab_size, width, precision="auto"):
    """Bytes that a second step of a new process adds, with its inputs and gradients."""
    sizes = map(str, (batch, frames, symbols, vocab_size, width))
    command = [python(), "-m", "tests.losses.step_memory", *sizes, precision]
    variables = os.environ | {"PYTHONPATH": str(ROOT)}
    run = subprocess.run(command, env=variables, capture_output=True, text=True, check=True)
    return int(run.stdout)


@pytest.mark.parametrize(("vocab_size", "more_mib"), [(500, 6), (5000, 14)])
def test_a_coarse_pass_needs_hardly_more_memory(vocab_size, more_mib):
    """It has 8-bit weights in forward, before there are gradients, and more numbers of a cell."""

    def peak(precision):
        return peak_bytes(2, 150, 60, vocab_size, 256, precision)

    full, coarse = peak("full"), peak("auto")
    if coarse >= full + more_mib * 2**20:  # the heap varies by some MiB from process to process
        full, coarse = min(full, peak("full")), min(coarse, peak("auto"))
    assert coarse < full + more_mib * 2**20


def test_memory_does_not_depend_on_the_number_of_logits():
    def peak(vocab_size):
        return peak_bytes(2, 200, 40, vocab_size, 128)

    # Logits of 16,400 cells would be 31 and 625 MiB. The weight and its gradients take 15 MiB more.
    small, large = peak(500), peak(10_000)
    assert small < 20 * 2**20
    assert large < small + 30 * 2**20
