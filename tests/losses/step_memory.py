# SPDX-License-Identifier: Apache-2.0
"""Prints the bytes that a second step with fused_joiner_loss adds, with inputs and gradients.

python -m tests.losses.step_memory B T U V D PRECISION
"""

import gc
import sys

import torch

from transducer_toolkit import fused_joiner_loss
from transducer_toolkit.training import memory


def step(
    batch: int, frames: int, symbols: int, vocab_size: int, width: int, precision: str
) -> None:
    enc = torch.randn(batch, frames, width, requires_grad=True)
    pred = torch.randn(batch, symbols + 1, width)
    weight = (torch.randn(vocab_size, width) / width**0.5).requires_grad_()
    lengths = torch.full((batch,), frames), torch.full((batch,), symbols)
    targets = torch.randint(1, vocab_size, (batch, symbols))
    loss = fused_joiner_loss(
        enc, pred, weight, None, targets, *lengths, blank=0, precision=precision
    )
    loss.backward()


def main() -> None:
    sizes, precision = [int(size) for size in sys.argv[1:6]], sys.argv[6]
    torch.set_num_threads(1)
    step(*sizes, precision)
    gc.collect()
    cpu = torch.device("cpu")
    before = memory.reset_peak(cpu)
    step(*sizes, precision)
    print(memory.peak(cpu) - before)


if __name__ == "__main__":
    main()
