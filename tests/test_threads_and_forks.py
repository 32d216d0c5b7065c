# SPDX-License-Identifier: Apache-2.0
"""All losses from many threads at once, and forks while stages run."""

import subprocess
import sys
import threading

import torch

import transducer_toolkit as tt

SETUP = """
import os, threading, time
import torch
import transducer_toolkit as tt
from tests import stage_calls as stages
from tests.stage_calls import lattice_batch
from transducer_toolkit.ops.lattice import LatticeBatch, CellScores

torch.set_num_threads(2)
torch.manual_seed(0)
x = torch.randn(3 * 40 * 11, 300)
batch = lattice_batch(
    *(torch.tensor([n] * 3) for n in (40, 10)), torch.ones(3, 10, dtype=torch.int64),
    max_frames=40, padded=True, device=x.device,
)
expected, again = (CellScores.zeros(batch, x.device) for _ in range(2))

def score(out):
    stages.cell_scores(x, batch, batch.all_rows(), out, blank=0)

def score_forever(out):
    while True:
        score(out)

score(expected)
# Nothing but a stage, with the pool's help: what torch does in a fork is torch's own.
for _ in range(3):
    out = CellScores.zeros(batch, x.device)
    threading.Thread(target=score_forever, args=(out,), daemon=True).start()
"""


def run(code):
    """A Python program, which must end by itself."""
    return subprocess.run(
        [sys.executable, "-c", SETUP + code], capture_output=True, text=True, timeout=300
    )


def losses_and_gradients():
    """Every loss once, on the same numbers: their values and gradients."""
    generator = torch.Generator().manual_seed(1)

    def floats(*size):
        return torch.randn(size, generator=generator).requires_grad_()

    logits, am, lm, weight = floats(3, 9, 6, 11), floats(3, 9, 11), floats(3, 6, 11), floats(7, 11)
    symbols = torch.randint(1, 7, (3, 5), generator=generator)
    lengths = torch.tensor([9, 8, 7]), torch.tensor([5, 4, 3])
    ranges = torch.arange(6).expand(3, 9, 6)
    losses = [
        tt.transducer_loss(logits, symbols, *lengths, blank=0),
        tt.rnnt_loss(logits, symbols, 0, rnnt_type="constrained"),
        tt.rnnt_loss_pruned(logits, symbols, ranges, 0),
        tt.rnnt_loss_simple(lm, am, symbols, 0, rnnt_type="modified"),
        tt.rnnt_loss_smoothed(30 * lm, 30 * am, symbols, 0),
        tt.fused_joiner_loss(am, lm, weight, None, symbols, *lengths, blank=0, tile_cells=17),
    ]
    return [torch.stack(losses), *torch.autograd.grad(sum(losses), (logits, am, lm, weight))]


def test_every_loss_from_many_threads():
    torch.set_num_threads(2)
    expected = losses_and_gradients()
    wrong = []
    start = threading.Barrier(6)

    def work():
        start.wait()
        for _ in range(4):
            got = losses_and_gradients()
            if not all(torch.equal(a, b) for a, b in zip(got, expected, strict=True)):
                wrong.append(got)

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_fork_while_other_threads_are_in_a_stage():
    """A child has neither the pool's threads nor the calls that had borrowed them."""
    result = run(
        """
for _ in range(6):
    time.sleep(0.02)
    child = os.fork()
    if child == 0:
        score(again)
        os._exit(0 if again.normalizer.tolist() == expected.normalizer.tolist() else 3)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
os._exit(0)
"""
    )
    assert result.returncode == 0, result.stderr
