# SPDX-License-Identifier: Apache-2.0
"""Greedy search: the most probable symbol of each lattice cell, in batches and chunk by chunk."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from transducer_toolkit.decoding.search import (
    Hypothesis,
    check_encoder_lengths,
    check_encoder_out,
    check_model,
    collect_hypotheses,
    refuse_non_finite,
    step_where,
)
from transducer_toolkit.modules.joiner import Joiner
from transducer_toolkit.modules.predictor import Predictor
from transducer_toolkit.ops.checks import check_int
from transducer_toolkit.ops.topology import get_topology

FRAMES_AHEAD = 8  # frames scored in one call: the predictor's output holds until the next label


@dataclass(frozen=True)
class GreedyState:
    """Where the greedy search of a batch stands between two chunks; its size never grows.

    Between chunks every frame is left, so the labels of the current frame are no part of it.

    Attributes:
        predictor_state: (B, ...) of the predictor, after the last label.
        predictor_out: (B, P), its output after the last label.
        num_frames: (B,) int64, frames decoded so far: the next chunk starts at this frame.
    """

    predictor_state: Tensor
    predictor_out: Tensor
    num_frames: Tensor


class GreedySearch:
    """Walk each lattice along the most probable symbol of every cell.

    At cell (t, u) blank moves on to frame t + 1; a label is appended and moves to u + 1, except
    that after ``max_symbols_per_frame`` labels frame t is left as if by a blank. The utterances of
    the batch walk at their own pace, several frames a call, so that the number of calls is about
    ``max_b U_b + T_b / 8`` and not ``sum_t``. A batch gives what its utterances give alone, and
    any division into chunks gives what the whole gives.

    Args:
        predictor: of the model, in eval mode.
        joiner: of the model, in eval mode.
        max_symbols_per_frame: labels allowed on one frame, at least 1.
        topology: of the loss that trained the model. In all but ``regular`` a label leads to the
            next frame: ``max_symbols_per_frame`` is 1 there.

    Raises:
        ValueError: if ``max_symbols_per_frame`` is below 1, the topology is unknown, or predictor
            and joiner have different vocabularies.
        TypeError: if an argument is of another type.

    Example:
        >>> from transducer_toolkit.modules import Joiner, StatelessPredictor
        >>> search = GreedySearch(StatelessPredictor(5, 16), Joiner(8, 16, 32, 5))
        >>> encoder_out = torch.randn(2, 9, 8)
        >>> whole = search(encoder_out, torch.tensor([9, 4]))
        >>> state = search.initial_state(batch_size=2)
        >>> first, state = search.advance(encoder_out[:, :4], torch.tensor([4, 4]), state)
        >>> rest, state = search.advance(encoder_out[:, 4:], torch.tensor([5, 0]), state)
        >>> whole[0].tokens == first[0].tokens + rest[0].tokens
        True
        >>> whole[0].frames == first[0].frames + rest[0].frames
        True
    """

    def __init__(
        self,
        predictor: Predictor,
        joiner: Joiner,
        *,
        max_symbols_per_frame: int = 10,
        topology: str = "regular",
    ) -> None:
        row = get_topology(topology)
        check_model(predictor, joiner)
        check_int(max_symbols_per_frame, "max_symbols_per_frame")
        if max_symbols_per_frame < 1:
            raise ValueError(
                f"max_symbols_per_frame must be at least 1, got {max_symbols_per_frame}"
            )
        self.predictor = predictor
        self.joiner = joiner
        # Bounded by what an int64 holds: any more is as good as no limit.
        limit = min(max_symbols_per_frame, 2**62)
        self.max_symbols_per_frame = limit if row.labels_share_frames else 1

    @torch.inference_mode()
    def initial_state(self, batch_size: int, device: torch.device | str = "cpu") -> GreedyState:
        """The state before the first frame: the predictor has read its start symbol."""
        check_int(batch_size, "batch_size")
        if batch_size < 0:
            raise ValueError(f"batch_size must be at least 0, got {batch_size}")
        start = torch.full((batch_size,), self.predictor.blank, dtype=torch.int64, device=device)
        state = self.predictor.initial_state(batch_size, device)
        predictor_out, state = self.predictor.step(start, state)
        return GreedyState(state, predictor_out, torch.zeros_like(start))

    def __call__(self, encoder_out: Tensor, encoder_lengths: Tensor) -> list[Hypothesis]:
        """Decode whole utterances: one chunk from the initial state.

        Args:
            encoder_out: (B, T, E) float.
            encoder_lengths: (B,) int64, in encoder frames, on any device.

        Returns:
            One hypothesis an utterance.

        Raises:
            ValueError: if the lengths do not fit ``encoder_out``, or this not the joiner; a
                NonFiniteScoresError names utterances whose logits are NaN or infinite.
            TypeError: if one is not such a tensor.
        """
        check_encoder_lengths(encoder_out, encoder_lengths)
        check_encoder_out(encoder_out, self.joiner)
        state = self.initial_state(encoder_out.size(0), encoder_out.device)
        return self.advance(encoder_out, encoder_lengths, state)[0]

    @torch.inference_mode()
    def advance(
        self, encoder_out: Tensor, encoder_lengths: Tensor, state: GreedyState
    ) -> tuple[list[Hypothesis], GreedyState]:
        """Decode the next chunk of each utterance.

        Args:
            encoder_out: (B, T_chunk, E) float.
            encoder_lengths: (B,) int64, frames of the chunk in each utterance, on any device; 0
                where an utterance has none.
            state: of :meth:`initial_state` or the previous call; not changed.

        Returns:
            What the chunk adds to each utterance, frames counted from the utterance's start, and
            the state after it.

        Raises:
            ValueError: as of :meth:`__call__`, or if the state is of another number of utterances.
            TypeError: likewise, or if the state is none.
        """
        check_encoder_lengths(encoder_out, encoder_lengths)
        check_encoder_out(encoder_out, self.joiner)
        if not isinstance(state, GreedyState):
            raise TypeError(f"state: expected a GreedyState, got {type(state).__name__}")
        if len(state.num_frames) != len(encoder_out):
            raise ValueError(
                f"state: expected one of {len(encoder_out)} utterances, as many as encoder_out, "
                f"got {len(state.num_frames)}"
            )
        batch_size, max_frames, _ = encoder_out.shape
        device, blank = encoder_out.device, self.predictor.blank
        lengths = encoder_lengths.to(device)
        rows = torch.arange(batch_size, device=device)
        ahead = torch.arange(FRAMES_AHEAD, device=device)
        sooner = FRAMES_AHEAD - ahead  # the largest of what is left is the first
        projected = self.joiner.project_encoder(encoder_out)  # once: windows overlap

        predictor_out, predictor_state = state.predictor_out, state.predictor_state
        frame = torch.zeros_like(lengths)  # where each utterance stands in the chunk
        labels_here = torch.zeros_like(lengths)  # labels emitted so far on that frame
        emissions = []  # (tokens, frames, logits), each (B,); token = blank if nothing is emitted
        is_bad = torch.zeros_like(lengths, dtype=torch.bool)

        while bool((frame < lengths).any()):
            frames = frame.unsqueeze(1) + ahead  # (B, FRAMES_AHEAD)
            window = projected[rows.unsqueeze(1), frames.clamp(max=max_frames - 1)]
            logits = self.joiner.step_projected(window, predictor_out.unsqueeze(1))
            best_logits, best = logits.max(-1)
            exists = frames < lengths.unsqueeze(1)
            is_label = (best != blank) & exists
            left, skipped = (is_label * sooner).max(1)
            emits = left > 0
            visited = exists & (~emits.unsqueeze(1) | (ahead <= skipped.unsqueeze(1)))
            is_bad |= (visited & ~best_logits.isfinite()).any(1)  # a NaN counts as the largest
            tokens = torch.where(emits, best[rows, skipped], blank)
            emitted_at = frame + skipped
            # Of the largest entry: its log-probability is its distance to the normaliser.
            cell = logits[rows, skipped].float()
            log_probs = cell.amax(-1) - cell.logsumexp(-1)
            emissions.append((tokens, emitted_at + state.num_frames, log_probs))

            labels_here = torch.where(skipped == 0, labels_here, 0) + 1
            exhausted = labels_here >= self.max_symbols_per_frame
            frame = torch.where(emits, emitted_at + exhausted, frame + FRAMES_AHEAD)
            labels_here = torch.where(emits & ~exhausted, labels_here, 0)

            predictor_out, predictor_state = step_where(
                emits, self.predictor.step, tokens, predictor_out, predictor_state
            )

        refuse_non_finite(is_bad)
        found = collect_hypotheses(emissions, batch_size, blank)
        return found, GreedyState(predictor_state, predictor_out, state.num_frames + lengths)


def greedy_search(
    predictor: Predictor,
    joiner: Joiner,
    encoder_out: Tensor,
    encoder_lengths: Tensor,
    *,
    max_symbols_per_frame: int = 10,
) -> list[Hypothesis]:
    """Decode whole utterances greedily; the function form of :class:`GreedySearch`.

    Args:
        predictor: of the model, in eval mode.
        joiner: of the model, in eval mode.
        encoder_out: (B, T, E) float.
        encoder_lengths: (B,) int64, in encoder frames, on any device.
        max_symbols_per_frame: labels allowed on one frame, at least 1.

    Returns:
        One hypothesis an utterance.

    Raises:
        ValueError, TypeError: as :class:`GreedySearch` and its call.

    Example:
        >>> from transducer_toolkit.modules import Joiner, StatelessPredictor
        >>> predictor, joiner = StatelessPredictor(5, 16), Joiner(8, 16, 32, 5)
        >>> encoder_out, lengths = torch.randn(2, 9, 8), torch.tensor([9, 4])
        >>> len(greedy_search(predictor, joiner, encoder_out, lengths))
        2
    """
    search = GreedySearch(predictor, joiner, max_symbols_per_frame=max_symbols_per_frame)
    return search(encoder_out, encoder_lengths)
