# SPDX-License-Identifier: Apache-2.0
"""Greedy search, which follows the most probable symbol of each lattice cell."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from transducer_toolkit.decoding.language_model import LanguageModel, check_lm
from transducer_toolkit.decoding.search import (
    Hypothesis,
    check_encoder_lengths,
    check_encoder_out,
    check_extra,
    check_model,
    check_state,
    collect_hypotheses,
    refuse_non_finite,
    step_where,
)
from transducer_toolkit.modules.joiner import Joiner
from transducer_toolkit.modules.predictor import Predictor
from transducer_toolkit.ops.checks import check_int
from transducer_toolkit.ops.topology import get_topology

# Frames scored in one call. The predictor's output stays the same until the next label.
FRAMES_AHEAD = 8


@dataclass(frozen=True)
class GreedyState:
    """State of the greedy search of a batch between two chunks. Its size is constant.

    The search has left the last frame of the chunk, so the state does not count the labels of a
    frame.

    Attributes:
        predictor_state: (B, ...) state of the predictor after the last label.
        predictor_out: (B, P) output of the predictor after the last label.
        num_frames: (B,) int64, number of frames decoded so far, which is the index of the first
            frame of the next chunk.
        frames_to_skip: (B,) int64, frames at the beginning of the next chunk that a duration skips.
        lm_state: (B, ...) state of the language model after the last label, or None.
        lm_scores: (B, V) its scores of the next label, or None.
    """

    predictor_state: Tensor
    predictor_out: Tensor
    num_frames: Tensor
    frames_to_skip: Tensor
    lm_state: Tensor | None = None
    lm_scores: Tensor | None = None


class GreedySearch:
    """Decodes by following the most probable symbol of every cell.

    At cell (t, u), a blank leads to cell (t + 1, u). A label is appended to the hypothesis and
    leads to cell (t, u + 1). After ``max_symbols_per_frame`` labels on frame t, the search moves to
    frame t + 1 as if it had found a blank.

    With durations, a token-and-duration transducer (TDT) takes the most probable duration of the
    cell, too, and moves on by it: after a blank by at least 1. A multi-blank transducer moves on by
    the duration of its blank.

    A language model, such as a :class:`HotwordModel`, changes the scores of labels only. Where the
    model finds a label, the label with the largest sum of both scores is taken. Where it finds a
    blank, a label is taken if its sum exceeds the score of the blank. On a frame, the language
    model overrules the model at most once, so that a bonus cannot fill a frame with labels.

    Each call of the joiner scores several frames of every utterance, so the number of calls is
    about ``max_b (U_b + T_b / 8)``. The result does not depend on the batch that contains the
    utterance, nor on the chunks that it is divided into.

    Args:
        predictor: predictor of the model, in eval mode.
        joiner: joiner of the model, in eval mode.
        max_symbols_per_frame: maximum number of labels on one frame, at least 1.
        topology: topology of the loss that trained the model. Where a label leads to the next
            frame, ``max_symbols_per_frame`` is 1.
        lm: language model of symbols for shallow fusion, or None.
        lm_weight: weight of the language model's scores.

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: if ``max_symbols_per_frame`` is below 1, ``lm_weight`` is not finite, the
            language model is one of words, the topology is unknown, or predictor and joiner have
            different vocabulary sizes.

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
        lm: LanguageModel | None = None,
        lm_weight: float = 0.3,
    ) -> None:
        self.topology = row = get_topology(topology)
        check_model(predictor, joiner)
        check_extra(joiner, row)
        check_int(max_symbols_per_frame, "max_symbols_per_frame")
        if max_symbols_per_frame < 1:
            raise ValueError(
                f"max_symbols_per_frame: expected at least 1, got {max_symbols_per_frame}"
            )
        check_lm(lm, lm_weight)
        if getattr(lm, "scores_words", False):
            raise ValueError(
                "lm: greedy search cannot use a language model of words; use a beam search "
                "(search=beam), or an ARPA file of the model's symbols"
            )
        self.predictor = predictor
        self.joiner = joiner
        self.lm = lm if lm_weight != 0 else None
        self.lm_weight = float(lm_weight)
        # Compared with int64 tensors below, so it must fit into an int64.
        limit = min(max_symbols_per_frame, 2**62)
        self.max_symbols_per_frame = limit if row.labels_share_frames else 1

    @torch.inference_mode()
    def initial_state(self, batch_size: int, device: torch.device | str = "cpu") -> GreedyState:
        """Returns the state before the first frame, after the predictor has read the start symbol.

        Raises:
            TypeError: if ``batch_size`` is not an int.
            ValueError: if ``batch_size`` is negative.
        """
        check_int(batch_size, "batch_size")
        if batch_size < 0:
            raise ValueError(f"batch_size: expected at least 0, got {batch_size}")
        start = torch.full((batch_size,), self.predictor.blank, dtype=torch.int64, device=device)
        state = self.predictor.initial_state(batch_size, device)
        predictor_out, state = self.predictor.step(start, state)
        zeros = torch.zeros_like(start)
        lm_state = lm_scores = None
        if self.lm is not None:
            lm_scores, lm_state = self.lm.step(start, self.lm.initial_state(batch_size, device))
        return GreedyState(state, predictor_out, zeros, zeros, lm_state, lm_scores)

    def __call__(self, encoder_out: Tensor, encoder_lengths: Tensor) -> list[Hypothesis]:
        """Decodes whole utterances.

        Args:
            encoder_out: (B, T, E) float.
            encoder_lengths: (B,) int32 or int64, number of encoder frames, on any device.

        Returns:
            One hypothesis for each utterance.

        Raises:
            TypeError: if an argument is not a tensor, or has the wrong dtype.
            ValueError: if ``encoder_lengths`` does not match ``encoder_out``, or ``encoder_out``
                does not match the joiner.
            NonFiniteScoresError: if logits are NaN or infinite; names the utterances.
        """
        check_encoder_lengths(encoder_out, encoder_lengths)
        check_encoder_out(encoder_out, self.joiner)
        state = self.initial_state(encoder_out.size(0), encoder_out.device)
        return self.advance(encoder_out, encoder_lengths, state)[0]

    @torch.inference_mode()
    def advance(
        self, encoder_out: Tensor, encoder_lengths: Tensor, state: GreedyState
    ) -> tuple[list[Hypothesis], GreedyState]:
        """Decodes the next chunk of each utterance.

        Args:
            encoder_out: (B, T_chunk, E) float.
            encoder_lengths: (B,) int32 or int64, number of frames of each utterance in this chunk,
                on any device; 0 for an utterance without frames.
            state: the state returned by :meth:`initial_state` or by the previous call. It is not
                modified.

        Returns:
            The hypothesis of each utterance in this chunk, with frames counted from the start of
            the utterance, and the state after the chunk.

        Raises:
            TypeError: as in :meth:`__call__`; also if ``state`` is not a :class:`GreedyState`.
            ValueError: as in :meth:`__call__`; also if ``state`` has another number of utterances,
                or is that of a search without this search's language model.
            NonFiniteScoresError: as in :meth:`__call__`.
        """
        check_encoder_lengths(encoder_out, encoder_lengths)
        check_encoder_out(encoder_out, self.joiner)
        check_state(state, GreedyState, len(encoder_out))
        if (self.lm is None) != (state.lm_scores is None):
            raise ValueError("state: expected one of a search with the same language model")
        batch_size, max_frames, _ = encoder_out.shape
        device, blank = encoder_out.device, self.predictor.blank
        lengths = encoder_lengths.to(device)
        rows = torch.arange(batch_size, device=device)
        ahead = torch.arange(FRAMES_AHEAD, device=device)
        table = self._table_of_durations(device)
        num_durations = self.topology.num_durations
        projected = self.joiner.project_encoder(encoder_out)  # once, because windows overlap

        predictor_out, predictor_state = state.predictor_out, state.predictor_state
        lm_scores, lm_state = state.lm_scores, state.lm_state
        overruled = torch.zeros_like(lengths, dtype=torch.bool)  # on the current frame
        # Current frame of each utterance, within the chunk.
        frame = state.frames_to_skip.to(device)
        labels_here = torch.zeros_like(lengths)  # labels emitted so far on that frame
        # Tokens, frames and log-probabilities, each (B,). The token is blank if none is emitted.
        emissions = []
        is_bad = torch.zeros_like(lengths, dtype=torch.bool)

        while bool((frame < lengths).any()):
            frames = frame.unsqueeze(1) + ahead  # (B, FRAMES_AHEAD)
            window = projected[rows.unsqueeze(1), frames.clamp(max=max_frames - 1)]
            logits = self.joiner.step_projected(window, predictor_out.unsqueeze(1))
            logits, of_durations = logits.tensor_split([logits.size(-1) - num_durations], -1)
            best_logits, best = logits.max(-1)
            own_best = best
            if lm_scores is not None:
                may_overrule = (ahead > 0) | ~overruled.unsqueeze(1)  # (B, FRAMES_AHEAD)
                best = self._overrule(logits, best_logits, best, lm_scores, may_overrule)
            exists = frames < lengths.unsqueeze(1)
            is_label = (best != blank) & (best < self.predictor.vocab_size) & exists
            is_bad_here = ~best_logits.isfinite()  # max returns NaN if there is one
            if table is None:
                moves = None
                left, skipped = (is_label * (FRAMES_AHEAD - ahead)).max(1)  # the first label
                emits = left > 0
                visited = ~emits.unsqueeze(1) | (ahead <= skipped.unsqueeze(1))
                after_blanks = frame + FRAMES_AHEAD
            else:
                if num_durations:
                    of_best, best_duration = of_durations.max(-1)
                    is_bad_here |= ~of_best.isfinite()
                    moves = table[best_duration]
                else:
                    moves = table[best]
                skipped, visited = _follow(is_label | ~exists, moves.clamp(min=1))
                after_blanks = frame + skipped
                is_inside = skipped < FRAMES_AHEAD
                skipped = torch.where(is_inside, skipped, 0)
                emits = is_inside & is_label[rows, skipped]
            is_bad |= (visited & exists & is_bad_here).any(1)
            tokens = torch.where(emits, best[rows, skipped], blank)
            emitted_at = frame + skipped
            cell = logits[rows, skipped].float()
            log_probs = cell[rows, best[rows, skipped]] - cell.logsumexp(-1)
            emissions.append((tokens, emitted_at + state.num_frames, log_probs))

            labels_here = torch.where(skipped == 0, labels_here, 0) + 1
            exhausted = labels_here >= self.max_symbols_per_frame
            move = exhausted.to(torch.int64)
            if num_durations and moves is not None:
                duration = moves[rows, skipped]
                move = torch.where(duration > 0, duration, move)
            frame = torch.where(emits, emitted_at + move, after_blanks)
            stays = emits & (move == 0)
            labels_here = torch.where(stays, labels_here, 0)

            predictor_out, predictor_state = step_where(
                emits, self.predictor.step, tokens, predictor_out, predictor_state
            )
            if self.lm is not None and lm_scores is not None and lm_state is not None:
                overrules = (best != own_best)[rows, skipped]
                overruled = stays & (overrules | (overruled & (skipped == 0)))
                lm_scores, lm_state = step_where(emits, self.lm.step, tokens, lm_scores, lm_state)

        refuse_non_finite(is_bad)
        found = collect_hypotheses(emissions, batch_size, blank)
        return found, GreedyState(
            predictor_state,
            predictor_out,
            state.num_frames + lengths,
            (frame - lengths).clamp(min=0) if table is not None else torch.zeros_like(lengths),
            lm_state,
            lm_scores,
        )

    def finish(self, state: GreedyState) -> list[Hypothesis]:
        """Ends the utterances. :meth:`advance` has returned all tokens, so none remain."""
        return [Hypothesis([], [], []) for _ in state.num_frames]

    def _overrule(
        self,
        logits: Tensor,
        best_logits: Tensor,
        best: Tensor,
        lm_scores: Tensor,
        may_overrule: Tensor,
    ) -> Tensor:
        """Returns the best symbols (B, N) of a window with the scores of the language model.

        Args:
            logits: (B, N, V) or more, logits of the model.
            best_logits: (B, N), the largest of them.
            best: (B, N), their symbols.
            lm_scores: (B, V) scores of the language model.
            may_overrule: (B, N) bool, whether another symbol may be chosen.
        """
        vocab_size, blank = self.predictor.vocab_size, self.predictor.blank
        labels = logits[..., :vocab_size] + self.lm_weight * lm_scores.unsqueeze(1)
        labels[..., blank] = -torch.inf
        top, choice = labels.max(-1)
        is_label = (best != blank) & (best < vocab_size)
        wins = (is_label | (top > best_logits)) & top.isfinite()
        return torch.where(wins & may_overrule, choice, best)

    def _table_of_durations(self, device: torch.device) -> Tensor | None:
        """Returns the frames that each duration advances, or each symbol of a multi-blank model.

        None if every blank advances one frame, and labels do not choose.
        """
        durations = self.topology.label_durations
        if self.topology.predicts_durations:
            return torch.tensor(durations, device=device)
        num_big_blanks = self.topology.num_big_blanks
        if num_big_blanks == 0:
            return None
        table = torch.ones(
            self.predictor.vocab_size + num_big_blanks, dtype=torch.int64, device=device
        )
        big = self.topology.blank_durations[1:]
        table[-num_big_blanks:] = torch.tensor(big[::-1], device=device)
        return table


def _follow(stops: Tensor, moves: Tensor) -> tuple[Tensor, Tensor]:
    """Follows the blanks of a window.

    Args:
        stops: (B, N) bool, places where it ends: those of labels, and behind the last frame.
        moves: (B, N) int64, frames that the blank of each place advances, at least 1.

    Returns:
        The place where it ends (B,), which is N or more behind the window; and the visited places
        (B, N) bool.
    """
    num_places = stops.size(1)
    place = torch.zeros_like(moves[:, 0])
    visited = torch.zeros_like(stops)
    for _ in range(num_places):
        inside = place < num_places
        here = place.clamp(max=num_places - 1).unsqueeze(1)
        visited |= torch.zeros_like(stops).scatter_(1, here, inside.unsqueeze(1))
        goes_on = inside & ~stops.gather(1, here).squeeze(1)
        place = place + torch.where(goes_on, moves.gather(1, here).squeeze(1), 0)
    return place, visited


def greedy_search(
    predictor: Predictor,
    joiner: Joiner,
    encoder_out: Tensor,
    encoder_lengths: Tensor,
    *,
    max_symbols_per_frame: int = 10,
) -> list[Hypothesis]:
    """Decodes whole utterances greedily. It is the function form of :class:`GreedySearch`.

    Args:
        predictor: predictor of the model, in eval mode.
        joiner: joiner of the model, in eval mode.
        encoder_out: (B, T, E) float.
        encoder_lengths: (B,) int32 or int64, number of encoder frames, on any device.
        max_symbols_per_frame: maximum number of labels on one frame, at least 1.

    Returns:
        One hypothesis for each utterance.

    Raises:
        TypeError, ValueError: as in :class:`GreedySearch` and :meth:`GreedySearch.__call__`.

    Example:
        >>> from transducer_toolkit.modules import Joiner, StatelessPredictor
        >>> predictor, joiner = StatelessPredictor(5, 16), Joiner(8, 16, 32, 5)
        >>> encoder_out, lengths = torch.randn(2, 9, 8), torch.tensor([9, 4])
        >>> len(greedy_search(predictor, joiner, encoder_out, lengths))
        2
    """
    search = GreedySearch(predictor, joiner, max_symbols_per_frame=max_symbols_per_frame)
    return search(encoder_out, encoder_lengths)
