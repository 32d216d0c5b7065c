# SPDX-License-Identifier: Apache-2.0
"""Float32 inputs of a fused loss, for the tests of its coarse pass."""

from __future__ import annotations

import torch

from tests.backends import Backend
from tests.losses.test_cuda_precision import loss_and_grads
from transducer_toolkit import LatticeShape, fused_joiner_loss

FRAMES, SYMBOLS, V, D = [60, 35, 1, 48], [20, 9, 0, 14], 37, 24
CPU = Backend("cpu")
BUDGET = 1e-5  # of the relative error of each gradient


class Case:
    """Float32 inputs of a fused loss; `scale` of the weights makes the lattice peaky."""

    def __init__(self, frames=FRAMES, symbols=SYMBOLS, *, scale=3.0, vocab_size=V, width=D, band=0):
        self.shape = LatticeShape.from_lengths(frames, symbols)
        size, num_frames, columns = len(frames), max(frames), max(symbols) + 1
        self.inputs = [
            torch.randn(size, num_frames, width),
            torch.randn(size, columns, width),
            scale * torch.randn(vocab_size, width) / width**0.5,
            torch.randn(vocab_size),
        ]
        self.targets = torch.randint(1, vocab_size, (size, columns - 1))
        self.ranges = None
        if band:  # climbs from 0 to U + 1 - R along each utterance
            progress = torch.arange(num_frames) / (self.shape.logit_lengths[:, None] - 1).clamp(1)
            last = (self.shape.target_lengths[:, None] + 1 - band).clamp(min=0)
            start = (progress.clamp(max=1) * last).round().long()
            self.ranges = start[:, :, None] + torch.arange(band)

    def loss(self, *leaves, **options):
        device = leaves[0].device
        ranges = None if self.ranges is None else self.ranges.to(device)
        options = {"reduction": "none", "ranges": ranges} | options
        return fused_joiner_loss(
            *leaves, self.targets.to(device), *self.shape.lengths, 0, **options
        )

    def run(self, backend=None, dtype=torch.float32, **options):
        """The losses and their gradients."""
        device = "cpu" if backend is None else backend.device
        inputs = [tensor.to(device, dtype) for tensor in self.inputs]
        if backend is None:
            return loss_and_grads(lambda *leaves: self.loss(*leaves, **options), inputs)
        with backend.active():
            return loss_and_grads(lambda *leaves: self.loss(*leaves, **options), inputs)

    def exact(self, **options):
        return self.run(dtype=torch.float64, dropped_mass=0.0, **options)

    def parts(self, backend=CPU, **options):
        inputs = [tensor.to(backend.device) for tensor in self.inputs]
        with backend.active():
            parts = self.loss(*inputs, return_parts=True, **options)[1]
        return {name: float(part) for name, part in parts._asdict().items()}
