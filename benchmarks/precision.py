# SPDX-License-Identifier: Apache-2.0
"""Largest gradient error of float32 losses against float64 on the same numbers."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from transducer_toolkit import transducer_loss

SIZES = ((20, 5), (100, 20), (343, 71), (1000, 200), (3000, 30), (3000, 600))  # (T, U)
VOCAB_SIZE = 16


def precision_rows() -> Iterator[dict[str, object]]:
    """For each size and scale of logits: the error of ours and of torchaudio's gradient."""
    from torchaudio.functional import rnnt_loss

    for frames, symbols in SIZES:
        for scale in (1.0, 10.0, 100.0):
            torch.manual_seed(0)
            logits = scale * torch.randn(1, frames, symbols + 1, VOCAB_SIZE)
            targets = torch.randint(1, VOCAB_SIZE, (1, symbols), dtype=torch.int32)
            lengths = torch.tensor([frames]).int(), torch.tensor([symbols]).int()

            def gradient(loss_of, logits=logits, targets=targets, lengths=lengths):
                leaf = logits.clone().requires_grad_()
                loss_of(leaf, targets, *lengths, blank=0).backward()
                return leaf.grad.double()

            exact = gradient(transducer_loss, logits.double())
            yield {
                "T": frames,
                "U": symbols,
                "scale": scale,
                "packed": (gradient(transducer_loss) - exact).abs().max().item(),
                "torchaudio": (gradient(rnnt_loss) - exact).abs().max().item(),
            }
