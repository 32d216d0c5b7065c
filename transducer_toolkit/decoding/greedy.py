# SPDX-License-Identifier: Apache-2.0
"""Greedy search: the most probable symbol of each lattice cell, in batches."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from transducer_toolkit.modules.joiner import Joiner
from transducer_toolkit.modules.predictor import Predictor

FRAMES_AHEAD = 8  # frames scored in one call: the predictor's output holds until the next label


@dataclass(frozen=True)
class Hypothesis:
    """What a search found in one utterance.

    Attributes:
        tokens: symbol ids, without blanks.
        frames: for each token the encoder frame that emitted it.
    """

    tokens: list[int]
    frames: list[int]


@torch.inference_mode()
def greedy_search(
    predictor: Predictor,
    joiner: Joiner,
    encoder_out: Tensor,
    encoder_lengths: Tensor,
    *,
    max_symbols_per_frame: int = 10,
) -> list[Hypothesis]:
    """Walk each lattice along the most probable symbol of every cell.

    At cell (t, u) blank moves on to frame t + 1; a label is appended and moves to u + 1, except
    that after ``max_symbols_per_frame`` labels frame t is left as if by a blank. The utterances of
    the batch walk at their own pace, several frames a call, so that the number of calls is about
    ``max_b U_b + T_b / 8`` and not ``sum_t``. A batch gives what its utterances give alone.

    Args:
        predictor: of the model, in eval mode.
        joiner: of the model, in eval mode.
        encoder_out: (B, T, E) float.
        encoder_lengths: (B,) int64, in encoder frames, on any device.
        max_symbols_per_frame: labels allowed on one frame, at least 1.

    Returns:
        One hypothesis an utterance.

    Raises:
        ValueError: if ``max_symbols_per_frame`` is below 1, or the lengths do not fit
            ``encoder_out``.

    Example:
        >>> from transducer_toolkit.modules import Joiner, StatelessPredictor
        >>> predictor, joiner = StatelessPredictor(5, 16), Joiner(8, 16, 32, 5)
        >>> encoder_out, lengths = torch.randn(2, 9, 8), torch.tensor([9, 4])
        >>> len(greedy_search(predictor, joiner, encoder_out, lengths))
        2
    """
    if max_symbols_per_frame < 1:
        raise ValueError(f"max_symbols_per_frame must be at least 1, got {max_symbols_per_frame}")
    batch_size, max_frames, _ = encoder_out.shape
    if encoder_lengths.shape != (batch_size,):
        raise ValueError(
            f"encoder_lengths must have shape ({batch_size},), got {tuple(encoder_lengths.shape)}"
        )
    device, blank = encoder_out.device, predictor.blank
    lengths = encoder_lengths.to(device)
    rows = torch.arange(batch_size, device=device)
    ahead = torch.arange(FRAMES_AHEAD, device=device)

    start = torch.full((batch_size,), blank, dtype=torch.int64, device=device)
    predictor_out, state = predictor.step(start, predictor.initial_state(batch_size, device))
    frame = torch.zeros_like(lengths)  # where each utterance stands
    labels_here = torch.zeros_like(lengths)  # labels emitted so far on that frame
    emissions = []  # (tokens, frames), each (B,); token = blank where nothing was emitted

    while bool((frame < lengths).any()):
        frames = frame.unsqueeze(1) + ahead  # (B, FRAMES_AHEAD)
        window = encoder_out[rows.unsqueeze(1), frames.clamp(max=max_frames - 1)]
        best = joiner.step(window, predictor_out.unsqueeze(1)).argmax(-1)
        is_label = (best != blank) & (frames < lengths.unsqueeze(1))
        emits, skipped = is_label.any(1), is_label.int().argmax(1)
        tokens = torch.where(emits, best[rows, skipped], blank)
        emitted_at = frame + skipped
        emissions.append((tokens, emitted_at))

        labels_here = torch.where(skipped == 0, labels_here, 0) + 1
        exhausted = labels_here >= max_symbols_per_frame
        frame = torch.where(emits, emitted_at + exhausted, frame + FRAMES_AHEAD)
        labels_here = torch.where(emits & ~exhausted, labels_here, 0)

        next_out, next_state = predictor.step(tokens, state)
        predictor_out = torch.where(emits.unsqueeze(1), next_out, predictor_out)
        state = torch.where(emits.view(-1, *[1] * (state.dim() - 1)), next_state, state)

    return _collect(emissions, batch_size, blank)


def _collect(
    emissions: list[tuple[Tensor, Tensor]], batch_size: int, blank: int
) -> list[Hypothesis]:
    """Gather what each step emitted into one hypothesis an utterance."""
    hypotheses = [Hypothesis([], []) for _ in range(batch_size)]
    if emissions:
        tokens, frames = (torch.stack(column).cpu() for column in zip(*emissions, strict=True))
        for step, row in (tokens != blank).nonzero().tolist():
            hypotheses[row].tokens.append(int(tokens[step, row]))
            hypotheses[row].frames.append(int(frames[step, row]))
    return hypotheses
