# SPDX-License-Identifier: Apache-2.0
"""Modified beam search, which emits at most one symbol per frame and merges equal hypotheses."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from transducer_toolkit.decoding.language_model import LanguageModel, check_lm, final_scores
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
from transducer_toolkit.ops.checks import check_flag, check_int
from transducer_toolkit.ops.topology import get_topology

MAX_BEAM = 2**20  # larger beams would overflow the sizes of tensors


@dataclass(frozen=True)
class BeamHypothesis(Hypothesis):
    """A hypothesis of the beam search.

    ``frames`` and ``log_probs`` belong to one of its paths. When two hypotheses are merged, the
    path of the more probable one is kept.

    Attributes:
        score: logarithm of the summed probability of its paths in the beam, plus the weighted
            score of the language model. It is not normalized by length.
    """

    score: float = field(default=0.0, compare=False)


class _Beam(NamedTuple):
    """The hypotheses of a batch in (B, K) slots. A slot with score -inf is empty."""

    scores: Tensor  # (B, K) float
    sequence: Tensor  # (B, K) int64, hash of the tokens
    prefix: Tensor  # (B, K) int64, hash of all tokens but the last
    last_token: Tensor  # (B, K) int64, blank if the hypothesis has no tokens
    num_tokens: Tensor  # (B, K) int64


class _Step(NamedTuple):
    """Back-pointers from the beam after a frame to the beam before it, each (B, K).

    A merged hypothesis has two predecessors. The states of predictor and language model come from
    the predecessor that continued by blank. The path, which gives the frames of the tokens, comes
    from the more probable predecessor.
    """

    slots: Tensor  # predecessor of the states
    tokens: Tensor  # the token that the step emitted, or blank
    path_slots: Tensor  # predecessor of the path
    path_tokens: Tensor  # the token that the path emitted, or blank
    path_log_probs: Tensor


class ModifiedBeamSearch:
    """Decodes with the ``beam`` most probable symbol sequences and at most one symbol per frame.

    In each frame, a hypothesis y with score s(y) continues by blank or by one label k::

        s(y)     <- s(y) + blank(t, y)
        s(y + k) <- s(y) + label(t, y, k) + lm_weight * lm(k | y)

    The search adds the probabilities of equal sequences before it selects the best. If the beam is
    large enough for all sequences, their scores are exact log-likelihoods: they equal the negative
    losses of the topologies that allow one symbol per frame. With ``beam=1`` and without a language
    model, the search is a greedy search with one symbol per frame.

    Each call of the predictor or the joiner processes all hypotheses of the batch.

    Args:
        predictor: predictor of the model, in eval mode.
        joiner: joiner of the model, in eval mode.
        beam: number K of hypotheses kept, from 1 to 2^20.
        topology: topology of the loss that trained the model. In ``constrained``, a label is
            followed by a blank on the same frame, whose score is added after the best hypotheses
            are selected. In ``one_sym_per_frame``, the last frame emits no label. ``regular`` is
            searched like ``modified``, as is common.
        length_normalized: whether hypotheses are finally ranked by ``score / (U + 1)`` instead of
            ``score``, where U is the number of symbols.
        lm: language model for shallow fusion, or None.
        lm_weight: weight of the language model's log-probabilities.

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: if ``beam`` is out of range, ``lm_weight`` is not finite, the topology is
            unknown, or predictor and joiner have different vocabulary sizes.

    Example:
        >>> from transducer_toolkit.modules import Joiner, StatelessPredictor
        >>> search = ModifiedBeamSearch(StatelessPredictor(5, 16), Joiner(8, 16, 32, 5), beam=3)
        >>> encoder_out, lengths = torch.randn(2, 9, 8), torch.tensor([9, 4])
        >>> [len(hypotheses) for hypotheses in search.nbest(encoder_out, lengths)]
        [3, 3]

    Source:
        W. Kang et al., "Fast and parallel decoding for transducer", 2022. icefall's
        ``modified_beam_search`` differs: it merges equal sequences after it has selected the best.
    """

    def __init__(
        self,
        predictor: Predictor,
        joiner: Joiner,
        *,
        beam: int = 4,
        topology: str = "modified",
        length_normalized: bool = True,
        lm: LanguageModel | None = None,
        lm_weight: float = 0.3,
        length_normalised: None = None,  # the former name, in configs of users
    ) -> None:
        if length_normalised is not None:
            raise TypeError("length_normalised: renamed, use length_normalized")
        check_model(predictor, joiner)
        check_int(beam, "beam")
        if beam < 1:
            raise ValueError(f"beam: expected at least 1, got {beam}")
        if beam > MAX_BEAM:
            raise ValueError(f"beam: expected at most {MAX_BEAM}, got {beam}")
        check_flag(length_normalized, "length_normalized")
        check_lm(lm, lm_weight)
        self.predictor = predictor
        self.joiner = joiner
        self.beam = beam
        self.topology = get_topology(topology)
        if self.topology.num_extra:
            raise ValueError(
                f"topology: expected one without durations, got {topology!r}; search=greedy "
                "decodes it"
            )
        self.length_normalized = length_normalized
        self.lm = lm if lm_weight != 0 else None
        self.lm_weight = float(lm_weight)

    def __call__(self, encoder_out: Tensor, encoder_lengths: Tensor) -> list[Hypothesis]:
        """Decodes whole utterances; returns the first hypothesis of :meth:`nbest` for each."""
        return [hypotheses[0] for hypotheses in self.nbest(encoder_out, encoder_lengths)]

    @torch.inference_mode()
    def nbest(self, encoder_out: Tensor, encoder_lengths: Tensor) -> list[list[BeamHypothesis]]:
        """Decodes whole utterances; returns several hypotheses for each.

        Args:
            encoder_out: (B, T, E) float.
            encoder_lengths: (B,) int32 or int64, number of encoder frames, on any device.

        Returns:
            Up to ``beam`` hypotheses for each utterance, the best first. Their token sequences
            differ.

        Raises:
            TypeError: if an argument is not a tensor, or has the wrong dtype.
            ValueError: if ``encoder_lengths`` does not match ``encoder_out``, or ``encoder_out``
                does not match the joiner.
            NonFiniteScoresError: if scores are NaN or infinite; names the utterances.
        """
        check_encoder_lengths(encoder_out, encoder_lengths)
        batch_size, device, blank = len(encoder_out), encoder_out.device, self.predictor.blank
        if batch_size == 0:
            return []
        check_encoder_out(encoder_out, self.joiner)
        lengths = encoder_lengths.to(device)
        first_row = self.beam * torch.arange(batch_size, device=device).unsqueeze(1)  # (B, 1)

        start = torch.full((batch_size * self.beam,), blank, dtype=torch.int64, device=device)
        state = self.predictor.initial_state(len(start), device)
        predictor_out, state = self.predictor.step(start, state)
        if self.lm is not None:
            lm_log_probs, lm_state = self.lm.step(start, self.lm.initial_state(len(start), device))
        beam = self._initial_beam(start.view(batch_size, -1), encoder_out.dtype)
        only_blank = torch.full((self.predictor.vocab_size,), -torch.inf, device=device)
        only_blank[blank] = 0
        steps = []

        for frame in range(int(lengths.max())):
            encoder_frame = encoder_out[:, frame, None]  # (B, 1, E)
            log_probs = self._log_probs(encoder_frame, predictor_out)  # (B, K, V)
            # After the end of an utterance, blank has probability 1, so its beam does not change.
            log_probs = torch.where((lengths > frame).view(-1, 1, 1), log_probs, only_blank)
            label_scores = log_probs
            if self.lm is not None:
                lm_scores = lm_log_probs.view(log_probs.shape).to(log_probs.dtype)
                label_scores = log_probs + self.lm_weight * lm_scores
            if not self.topology.may_label_last_frame:
                is_last = (lengths == frame + 1).view(-1, 1, 1)
                label_scores = label_scores.masked_fill(is_last, -torch.inf)
            beam, step = self._grow(beam, log_probs, label_scores)
            steps.append(step)

            rows = (first_row + step.slots).flatten()
            tokens = step.tokens.flatten()
            emits = tokens != blank
            predictor_out, state = step_where(
                emits, self.predictor.step, tokens, predictor_out[rows], state[rows]
            )
            if self.lm is not None:
                lm_log_probs, lm_state = step_where(
                    emits, self.lm.step, tokens, lm_log_probs[rows], lm_state[rows]
                )
            if self.topology.label_takes_blank:
                forced = self._log_probs(encoder_frame, predictor_out)[..., blank]  # (B, K)
                scores = beam.scores + torch.where(emits.view(forced.shape), forced, 0)
                beam = beam._replace(scores=scores)

        if self.lm is not None:
            at_end = self.lm_weight * final_scores(self.lm, lm_state).view(beam.scores.shape)
            beam = beam._replace(scores=beam.scores + at_end.to(beam.scores.dtype))
        refuse_non_finite((beam.scores.isnan() | (beam.scores == torch.inf)).any(1))
        return self._best_first(beam, steps)

    def _log_probs(self, encoder_frame: Tensor, predictor_out: Tensor) -> Tensor:
        """Computes log-probabilities (B, K, V) from (B, 1, E) and (B * K, P), at least float32."""
        by_slot = predictor_out.view(len(encoder_frame), self.beam, -1)
        logits = self.joiner.step(encoder_frame, by_slot)
        return logits.log_softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))

    def _initial_beam(self, blanks: Tensor, dtype: torch.dtype) -> _Beam:
        """Returns a beam that holds the empty sequence in the first slot of each utterance."""
        dtype = torch.promote_types(dtype, torch.float32)
        scores = torch.full(blanks.shape, -torch.inf, dtype=dtype, device=blanks.device)
        scores[:, 0] = 0
        zeros = torch.zeros_like(blanks)
        return _Beam(scores, sequence=zeros, prefix=zeros, last_token=blanks, num_tokens=zeros)

    def _grow(self, beam: _Beam, log_probs: Tensor, label_scores: Tensor) -> tuple[_Beam, _Step]:
        """Scores all continuations by blank and by a label, merges equal ones, keeps the best.

        Args:
            beam: the beam before the frame.
            log_probs: (B, K, V) log-probabilities of the joiner.
            label_scores: (B, K, V) scores of the labels. The column of blank is not used.

        Returns:
            The beam after the frame, and the back-pointers to the beam before it.
        """
        batch_size, num_slots, vocab_size = log_probs.shape
        blank = self.predictor.blank
        blank_log_probs = log_probs[..., blank]
        stay = beam.scores + blank_log_probs
        scores = (beam.scores.unsqueeze(2) + label_scores).view(batch_size, -1)  # (B, K * V)

        # If slot i followed by the last token of slot j equals slot j, the two are merged in j.
        alive = beam.scores > -torch.inf
        follows = (
            (beam.prefix.unsqueeze(2) == beam.sequence.unsqueeze(1))  # (B, j, i)
            & (beam.num_tokens.unsqueeze(2) == beam.num_tokens.unsqueeze(1) + 1)
            & (alive.unsqueeze(2) & alive.unsqueeze(1))
        )
        merges, prefix_slot = follows.any(2), follows.int().argmax(2)
        own_column = torch.arange(num_slots, device=scores.device) * vocab_size + blank  # (K,)
        column = torch.where(merges, prefix_slot * vocab_size + beam.last_token, own_column)
        arriving = scores.gather(1, column)
        if self.topology.label_takes_blank:
            arriving = arriving + blank_log_probs
        arriving = arriving.masked_fill(~merges, -torch.inf)
        scores = scores.scatter(1, column, -torch.inf)
        scores[:, own_column] = torch.logaddexp(stay, arriving)

        best, index = scores.topk(num_slots)
        slot, token = index // vocab_size, index % vocab_size
        emits = token != blank
        from_slot = _Beam(*(field.gather(1, slot) for field in beam))
        grown = _Beam(
            scores=best,
            sequence=torch.where(emits, _hash(from_slot.sequence, token), from_slot.sequence),
            prefix=torch.where(emits, from_slot.sequence, from_slot.prefix),
            last_token=torch.where(emits, token, from_slot.last_token),
            num_tokens=from_slot.num_tokens + emits,
        )
        by_label = (arriving > stay).gather(1, slot) & ~emits
        path = torch.where(by_label, column.gather(1, slot), index)
        path_log_probs = log_probs.view(batch_size, -1).gather(1, path)
        step = _Step(slot, token, path // vocab_size, path % vocab_size, path_log_probs)
        return grown, step

    def _best_first(self, beam: _Beam, steps: list[_Step]) -> list[list[BeamHypothesis]]:
        """Ranks the hypotheses and follows the path of each back to the first frame."""
        ranking = beam.scores / (beam.num_tokens + 1) if self.length_normalized else beam.scores
        slots = ranking.argsort(dim=1, descending=True, stable=True)
        scores = beam.scores.gather(1, slots)
        emissions = []
        for frame, step in reversed(list(enumerate(steps))):
            tokens = step.path_tokens.gather(1, slots).flatten()
            log_probs = step.path_log_probs.gather(1, slots).flatten()
            emissions.append((tokens, torch.full_like(tokens, frame), log_probs))
            slots = step.path_slots.gather(1, slots)
        paths = collect_hypotheses(emissions[::-1], scores.numel(), self.predictor.blank)
        found = [
            BeamHypothesis(path.tokens, path.frames, path.log_probs, score=score)
            for path, score in zip(paths, scores.flatten().tolist(), strict=True)
        ]
        ranked = (found[first : first + self.beam] for first in range(0, len(found), self.beam))
        # Keep the first hypothesis even if its score is -inf, so that every utterance has one.
        return [[best, *(h for h in rest if h.score > -math.inf)] for best, *rest in ranked]


def _hash(sequence: Tensor, token: Tensor) -> Tensor:
    """Returns the int64 hash of a sequence and one more token.

    Two different sequences have equal hashes with a probability of about 2^-63.
    """
    mixed = (sequence ^ (token + 1) * _ODD_1) * _ODD_2  # int64 arithmetic wraps around
    return mixed ^ ((mixed >> 32) & 0xFFFFFFFF)


# The odd multipliers of splitmix64 as signed int64.
_ODD_1, _ODD_2 = 0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64
