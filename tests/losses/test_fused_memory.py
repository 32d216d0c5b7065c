# SPDX-License-Identifier: Apache-2.0
"""The peak memory of a step with fused_joiner_loss, each in a process of its own."""

import subprocess
import sys

import pytest

MEMORY_SCRIPT = """
import gc, sys, torch
from transducer_toolkit.training import memory
from transducer_toolkit import fused_joiner_loss
B, T, U, V, D = map(int, sys.argv[1:6])
torch.set_num_threads(1)
def step():
    enc, pred = torch.randn(B, T, D, requires_grad=True), torch.randn(B, U + 1, D)
    weight = (torch.randn(V, D) / D**0.5).requires_grad_()
    lengths = torch.full((B,), T), torch.full((B,), U)
    targets = torch.randint(1, V, (B, U))
    loss = fused_joiner_loss(
        enc, pred, weight, None, targets, *lengths, blank=0, precision=sys.argv[6]
    )
    loss.backward()
step()
gc.collect()
cpu = torch.device("cpu")
before = memory.reset_peak(cpu)
step()
print(memory.peak(cpu) - before)
"""


def peak_bytes(batch, frames, symbols, vocab_size, width, precision="auto"):
    """Bytes that a second step of a fresh process adds, with its inputs and gradients."""
    sizes = map(str, (batch, frames, symbols, vocab_size, width))
    command = [sys.executable, "-c", MEMORY_SCRIPT, *sizes, precision]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


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
