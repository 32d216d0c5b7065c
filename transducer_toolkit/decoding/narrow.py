# SPDX-License-Identifier: Apache-2.0
"""The lattice of one utterance as logits of three symbols, in bounded memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from transducer_toolkit.ops.lattice import LatticeShape

MAX_LOGITS = 50_000_000  # at a time: 200 MB in float32
LOWEST = -1e30  # of a symbol without probability


@dataclass(frozen=True)
class NarrowLattice:
    """Logits of blank, of the next target symbol, and of all other symbols together.

    Behind them are those of big blanks or durations, as behind the joiner's symbols.

    Alignments and posteriors depend on no other logits.

    Attributes:
        logits: (num_cells, 3 + K) float32 log-probabilities, packed; those of durations are not
            normalized.
        targets: (1, U) ones.
        shape: the lattice.
        blank: 0.
    """

    logits: Tensor
    targets: Tensor
    shape: LatticeShape
    blank: int = 0

    def arguments(self) -> tuple[Tensor, Tensor, LatticeShape, int]:
        """Return logits, targets, shape and blank, in the order of the functions of decoding."""
        return self.logits, self.targets, self.shape, self.blank


def narrow_lattice(
    joiner: Callable[[Tensor, Tensor, LatticeShape], Tensor],
    encoder_out: Tensor,
    predictor_out: Tensor,
    targets: Tensor,
    blank: int,
    *,
    vocab_size: int,
    num_durations: int = 0,
) -> NarrowLattice:
    """Compute the log-probabilities that alignments need, a few frames at a time.

    Args:
        joiner: joins an encoder and a predictor output to packed logits (num_cells, V).
        encoder_out: (1, T, D_enc), without padding.
        predictor_out: (1, U + 1, D_pred).
        targets: (1, U) integer.
        blank: id of blank.
        vocab_size: V.
        num_durations: the last columns of the joiner's logits that are those of durations.

    Returns:
        The lattice; its logits are NaN where those of the joiner are not finite.
    """
    num_frames, num_columns = encoder_out.size(1), predictor_out.size(1)
    # The last column has no target symbol; any symbol but blank does.
    last = targets[:, -1:] if targets.size(1) else targets.new_full((1, 1), int(blank == 0))
    next_symbols = torch.cat([targets, last], 1)
    step = max(1, MAX_LOGITS // (num_columns * vocab_size))
    parts = []
    for frames in encoder_out.split(step, dim=1):
        shape = LatticeShape.from_lengths([frames.size(1)], [num_columns - 1])
        logits = joiner(frames, predictor_out, shape).float()
        if hasattr(joiner, "normalized"):
            logits = joiner.normalized(logits)
        num_symbols = logits.size(1) - num_durations  # with big blanks, which are behind the others
        durations = logits[:, num_symbols:].clamp(min=LOWEST)
        logits = logits[:, :num_symbols].log_softmax(-1)
        big_blanks = logits[:, vocab_size:].clamp(min=LOWEST)
        logits[:, vocab_size:] = -torch.inf
        symbols = next_symbols[0].repeat(frames.size(1)).unsqueeze(1).to(torch.int64)
        of_two = torch.cat([logits[:, blank : blank + 1], logits.gather(1, symbols)], 1)
        logits[:, blank] = -torch.inf
        logits.scatter_(1, symbols, -torch.inf)
        rest = logits.logsumexp(-1, keepdim=True)
        of_three = torch.cat([of_two, rest], 1).clamp(min=LOWEST)
        parts.append(torch.cat([of_three, big_blanks, durations], 1))
    shape = LatticeShape.from_lengths([num_frames], [num_columns - 1])
    return NarrowLattice(torch.cat(parts), torch.ones_like(targets), shape)
