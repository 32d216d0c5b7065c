# SPDX-License-Identifier: Apache-2.0
"""Beam search for every topology, batched over utterances and hypotheses."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from transducer_toolkit.decoding.beam_rows import (
    Paths,
    Rows,
    append_token,
    best_of_groups,
    merge,
    settle,
)
from transducer_toolkit.decoding.language_model import LanguageModel, check_lm
from transducer_toolkit.decoding.search import (
    Hypothesis,
    check_encoder_lengths,
    check_encoder_out,
    check_extra,
    check_model,
    check_state,
    refuse_non_finite,
)
from transducer_toolkit.modules.joiner import Joiner
from transducer_toolkit.modules.predictor import Predictor
from transducer_toolkit.ops.checks import check_at_least, check_flag, check_int, check_number
from transducer_toolkit.ops.topology import get_topology

MAX_BEAM = 2**20  # larger beams would overflow the sizes of tensors
# Score of a blank of probability 0, so that an utterance never runs out of hypotheses.
IMPOSSIBLE = -1e9


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


@dataclass(frozen=True)
class BeamState:
    """State of the beam search of a batch between two chunks.

    It holds the partial hypotheses and their tokens that :meth:`BeamSearch.advance` has not
    returned yet.

    Attributes:
        rows: the partial hypotheses; their frames count from the start of the next chunk.
        paths: the tokens of the partial hypotheses.
        num_frames: (B,) int64, number of frames decoded so far.
    """

    rows: Rows
    paths: Paths
    num_frames: Tensor


class BeamSearch:
    """Decodes with the ``beam`` most probable symbol sequences of each frame.

    On frame t, a hypothesis y with score s(t, y) continues by blank or by a label k. In the
    topology ``regular``, where a label stays on its frame::

        s(t + 1, y) <- s(t, y) + blank(t, y)
        s(t, y + k) <- s(t, y) + label(t, y, k) + lm_weight * lm(k | y)

    In the other topologies, a label moves on, too. In a token-and-duration transducer (TDT), every
    duration is a continuation of its own, and its log-probability is added; in a multi-blank
    transducer, every blank is one. A hypothesis that skips frames waits until the search arrives at
    its frame.

    The search adds the probabilities of equal sequences that stand at the same frame. If the beam
    and the window are large enough for all sequences, the scores are exact log-likelihoods: they
    equal the negative losses of the topology.

    Predictor and joiner process all hypotheses of the batch in one call. The result does not depend
    on the batch that contains the utterance, nor on the chunks that it is divided into.

    Args:
        predictor: predictor of the model, in eval mode.
        joiner: joiner of the model, in eval mode.
        beam: number K of hypotheses kept at each frame, from 1 to 2^20. The search also keeps the K
            best that have emitted n labels on the current frame, for each n. A hypothesis continues
            with its K best labels.
        score_window: hypotheses whose score is lower than the best of the utterance by this many
            nats, or more, are dropped; None keeps all that the beam holds.
        max_symbols_per_frame: maximum number of labels on one frame, at least 1.
        topology: topology of the loss that trained the model.
        length_normalized: whether hypotheses are finally ranked by ``score / (U + 1)`` instead of
            ``score``, where U is the number of symbols.
        lm: language model for shallow fusion, or None.
        lm_weight: weight of the language model's log-probabilities.

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: if an argument is out of range, the topology is unknown, or predictor and joiner
            do not fit each other or the topology.

    Example:
        >>> from transducer_toolkit.modules import Joiner, StatelessPredictor
        >>> search = BeamSearch(StatelessPredictor(5, 16), Joiner(8, 16, 32, 5), score_window=None)
        >>> encoder_out, lengths = torch.randn(2, 9, 8), torch.tensor([9, 4])
        >>> [len(hypotheses) for hypotheses in search.nbest(encoder_out, lengths)]
        [4, 4]

    Source:
        Frame-synchronous search with several labels a frame: J. Kim, Y. Lee, E. Kim, "Accelerating
        RNN transducer inference via adaptive expansion search", 2020. This search adds all paths of
        a sequence instead of those of its prefixes in the beam.
    """

    def __init__(
        self,
        predictor: Predictor,
        joiner: Joiner,
        *,
        beam: int = 4,
        score_window: float | None = 4.0,
        max_symbols_per_frame: int = 10,
        topology: str = "regular",
        length_normalized: bool = False,
        lm: LanguageModel | None = None,
        lm_weight: float = 0.3,
    ) -> None:
        self.topology = row = get_topology(topology)
        check_model(predictor, joiner)
        check_extra(joiner, row)
        check_int(beam, "beam")
        if beam < 1:
            raise ValueError(f"beam: expected at least 1, got {beam}")
        if beam > MAX_BEAM:
            raise ValueError(f"beam: expected at most {MAX_BEAM}, got {beam}")
        if score_window is not None:
            check_number(score_window, "score_window")
            if not score_window > 0:
                raise ValueError(f"score_window: expected more than 0, or None, got {score_window}")
        check_at_least(1, max_symbols_per_frame=max_symbols_per_frame)
        check_flag(length_normalized, "length_normalized")
        check_lm(lm, lm_weight)
        self.predictor = predictor
        self.joiner = joiner
        self.beam = beam
        self.score_window = math.inf if score_window is None else float(score_window)
        # A label that takes the blank of its frame is a label that stays, followed by blank.
        self._label_durations = (0,) if row.label_takes_blank else row.label_durations
        self._label_with_blank_ends_nothing = row.label_takes_blank and not row.ends_with_label
        stays = 0 in self._label_durations and not row.label_takes_blank
        self.max_symbols_per_frame = max_symbols_per_frame if stays else 1
        self.length_normalized = length_normalized
        num_symbols = predictor.vocab_size + row.num_big_blanks
        # The last symbol is the first of the big blanks.
        self._blanks = [predictor.blank, *range(num_symbols - 1, predictor.vocab_size - 1, -1)]
        # Where the joiner can, the output of the predictor is projected once for all frames.
        self._project: Callable[[Tensor], Tensor] = lambda predictor_out: predictor_out
        self._join: Callable[[Tensor, Tensor], Tensor] = joiner.step_projected
        if hasattr(joiner, "project_predictor"):
            self._project, self._join = joiner.project_predictor, joiner.join_projected
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
        if len(encoder_out) == 0:
            return []
        check_encoder_out(encoder_out, self.joiner)
        state = self.initial_state(len(encoder_out), encoder_out.device)
        return self._ranked(self._decode(encoder_out, encoder_lengths, state))

    @torch.inference_mode()
    def initial_state(self, batch_size: int, device: torch.device | str = "cpu") -> BeamState:
        """Returns the state before the first frame, after the predictor has read the start symbol.

        Raises:
            TypeError: if ``batch_size`` is not an int.
            ValueError: if ``batch_size`` is negative.
        """
        check_at_least(0, batch_size=batch_size)
        start = torch.full((batch_size,), self.predictor.blank, dtype=torch.int64, device=device)
        predictor_out, predictor_state = self.predictor.step(
            start, self.predictor.initial_state(batch_size, device)
        )
        lm_log_probs = lm_state = None
        if self.lm is not None:
            lm_log_probs, lm_state = self.lm.step(start, self.lm.initial_state(batch_size, device))
        zeros = torch.zeros_like(start)
        rows = Rows(
            utterance=torch.arange(batch_size, device=device),
            frame=zeros,
            scores=torch.zeros(batch_size, 2, dtype=torch.float64, device=device),
            sequence=zeros,
            num_tokens=zeros,
            path=zeros - 1,
            unread=zeros - 1,
            predictor_out=self._project(predictor_out),
            predictor_state=predictor_state,
            lm_log_probs=lm_log_probs,
            lm_state=lm_state,
        )
        return BeamState(rows, Paths(), zeros)

    @torch.inference_mode()
    def advance(
        self, encoder_out: Tensor, encoder_lengths: Tensor, state: BeamState
    ) -> tuple[list[Hypothesis], BeamState]:
        """Decodes the next chunk of each utterance.

        Args:
            encoder_out: (B, T_chunk, E) float.
            encoder_lengths: (B,) int32 or int64, number of frames of each utterance in this chunk,
                on any device; 0 for an utterance without frames.
            state: the state returned by :meth:`initial_state` or by the previous call. It is not
                modified.

        Returns:
            The next tokens of each utterance that all hypotheses share, so that no later chunk can
            change them, and the state after the chunk. Frames count from the start of the
            utterance. The tokens of all chunks and of :meth:`finish` together are the hypothesis of
            the whole utterance.

        Raises:
            TypeError: as in :meth:`nbest`; also if ``state`` is not a :class:`BeamState`.
            ValueError: as in :meth:`nbest`; also if ``state`` has another number of utterances.
            NonFiniteScoresError: as in :meth:`nbest`.
        """
        check_encoder_lengths(encoder_out, encoder_lengths)
        check_encoder_out(encoder_out, self.joiner)
        check_state(state, BeamState, len(encoder_out))
        state = self._decode(encoder_out, encoder_lengths, state)
        settled, rows, paths = settle(state.rows, state.paths, len(encoder_out))
        return settled, BeamState(rows, paths, state.num_frames)

    @torch.inference_mode()
    def finish(self, state: BeamState) -> list[BeamHypothesis]:
        """Returns the rest of the best hypothesis of each utterance.

        Args:
            state: the state after the last chunk.

        Returns:
            The tokens of the best hypothesis of each utterance that :meth:`advance` has not
            returned, and the score of all its tokens.
        """
        return [hypotheses[0] for hypotheses in self._ranked(state)]

    def _decode(self, encoder_out: Tensor, encoder_lengths: Tensor, state: BeamState) -> BeamState:
        """Decodes a chunk and keeps all tokens in the state."""
        lengths = encoder_lengths.to(encoder_out.device)
        projected = self.joiner.project_encoder(encoder_out)
        num_places = projected.size(1) + max(self._label_durations + self.topology.blank_durations)
        chunk = _Chunk(projected, num_places, state.num_frames, state.paths.copy(), checks=[])
        rows = state.rows
        for frame in range(int(lengths.max()) if len(lengths) else 0):
            if len(rows.frame) == 0:  # all scores are bad
                break
            is_here = (rows.frame == frame) & (lengths[rows.utterance] > frame)
            here = is_here.nonzero().squeeze(1)
            if len(here) == len(is_here):
                rows = self._read_frame(frame, rows, None, chunk)
            elif len(here) > 0:
                waiting = rows.take((~is_here).nonzero().squeeze(1))
                rows = self._read_frame(frame, rows.take(here), waiting, chunk)
        is_bad = torch.zeros_like(lengths, dtype=torch.bool)
        for utterance, bad in chunk.checks:
            is_bad[utterance[bad]] = True
        refuse_non_finite(is_bad)
        rows = rows._replace(frame=rows.frame - lengths[rows.utterance])
        return BeamState(rows, chunk.paths, state.num_frames + lengths)

    def _read_frame(self, frame: int, rows: Rows, waiting: Rows | None, chunk: _Chunk) -> Rows:
        """Continues the hypotheses that stand at a frame.

        Args:
            frame: the frame, from the start of the chunk.
            rows: the hypotheses that stand at it.
            waiting: those that stand at later frames, or None if there are none.
            chunk: the chunk.

        Returns:
            The hypotheses that stand at later frames.
        """
        best = rows.scores.new_full(chunk.num_frames.shape, -torch.inf)  # (B,)
        projected = chunk.projected[:, frame]
        parts = []
        if waiting is not None:
            _raise_to(best, waiting.utterance, waiting.scores[:, 0])
            parts.append(waiting)
        for num_labels in range(self.max_symbols_per_frame + 1):
            # All of these rows have emitted num_labels labels on this frame.
            rows = self._read_tokens(rows)
            cells = self._cells(projected.index_select(0, rows.utterance), rows.predictor_out)
            chunk.checks.append((rows.utterance, cells.is_bad))
            by_blank = self._by_blank(rows, cells, best)
            if num_labels > 0 and self._label_with_blank_ends_nothing:
                may_end = torch.full_like(by_blank.scores[:, 0], -torch.inf)
                scores = torch.stack((by_blank.scores[:, 0], may_end), 1)
                by_blank = by_blank._replace(scores=scores)
            parts.append(by_blank)
            if num_labels == self.max_symbols_per_frame:
                break
            by_label = self._by_label(rows, cells, best, chunk)
            if by_label is None:
                break
            stays = by_label.frame == frame
            if not bool(stays.all()):
                parts.append(by_label.take((~stays).nonzero().squeeze(1)))
                by_label = by_label.take(stays.nonzero().squeeze(1))
            if len(by_label.frame) == 0:
                break
            rows = by_label
        if len(parts) == 1 and len(self.topology.blank_durations) == 1:
            rows = parts[0]  # these differ, and are not more than before
        else:
            rows = merge(functools.reduce(Rows.__add__, parts))
            group = rows.utterance * chunk.num_places + rows.frame
            rows = rows.take(best_of_groups(rows.scores[:, 0], group, self.beam))
        if self.score_window == math.inf:
            return rows
        scores = rows.scores[:, 0]
        _raise_to(best.fill_(-torch.inf), rows.utterance, scores)
        keep = (scores > self._threshold(best, rows)).nonzero().squeeze(1)
        return rows if len(keep) == len(scores) else rows.take(keep)

    def _read_tokens(self, rows: Rows) -> Rows:
        """Runs predictor and language model on the tokens that they have not read."""
        is_unread = rows.unread >= 0
        index = is_unread.nonzero().squeeze(1)
        if len(index) == 0:
            return rows
        tokens = rows.unread[index]

        def update(old: Tensor, new: Tensor) -> Tensor:
            return new if len(index) == len(old) else old.index_copy(0, index, new)

        out, state = self.predictor.step(tokens, rows.predictor_state[index])
        rows = rows._replace(
            unread=torch.full_like(rows.unread, -1),
            predictor_out=update(rows.predictor_out, self._project(out)),
            predictor_state=update(rows.predictor_state, state),
        )
        if self.lm is not None and rows.lm_state is not None and rows.lm_log_probs is not None:
            log_probs, state = self.lm.step(tokens, rows.lm_state[index])
            rows = rows._replace(
                lm_log_probs=update(rows.lm_log_probs, log_probs),
                lm_state=update(rows.lm_state, state),
            )
        return rows

    def _cells(self, projected: Tensor, predictor_out: Tensor) -> _Cells:
        """Computes the log-probabilities of lattice cells, at least float32."""
        logits = self._join(projected, predictor_out)
        dtype = torch.promote_types(logits.dtype, torch.float32)
        num_durations = self.topology.num_durations
        if num_durations == 0:
            log_probs = logits.log_softmax(1, dtype)
            # One logit that is NaN or +inf, or only -inf, makes all log-probabilities NaN.
            return _Cells(log_probs, None, log_probs[:, 0].isnan())
        symbols, durations = logits.tensor_split([logits.size(1) - num_durations], 1)
        log_probs, of_durations = symbols.log_softmax(1, dtype), durations.log_softmax(1, dtype)
        return _Cells(log_probs, of_durations, (log_probs[:, 0] + of_durations[:, 0]).isnan())

    def _by_blank(self, rows: Rows, cells: _Cells, best: Tensor) -> Rows:
        """Continues hypotheses by the blanks of all durations.

        It raises the `best` score (B,) of each utterance to those of the continuations.
        """
        durations = self.topology.blank_durations
        added = cells.log_probs[:, self._blanks]  # a copy, (N, number of blanks)
        if cells.of_durations is not None:
            added = added + cells.of_durations[:, -len(durations) :]
        added[:, 0].clamp_(min=IMPOSSIBLE)
        scores = rows.scores[:, :1] + added
        _raise_to(best, rows.utterance, scores.amax(1))
        if len(durations) == 1:
            return rows._replace(frame=rows.frame + durations[0], scores=scores.expand(-1, 2))
        index, column = (scores > self._threshold(best, rows).unsqueeze(1)).nonzero().unbind(1)
        rows = rows.take(index)
        moves = torch.tensor(durations, device=index.device)[column]
        scores = scores[index, column].unsqueeze(1).expand(-1, 2)
        return rows._replace(frame=rows.frame + moves, scores=scores)

    def _by_label(self, rows: Rows, cells: _Cells, best: Tensor, chunk: _Chunk) -> Rows | None:
        """Continues hypotheses by labels.

        It raises the `best` score (B,) of each utterance to those of the continuations.

        Returns:
            The best continuations of each duration, or None if there are none in the window.
        """
        predictor, durations = self.predictor, self._label_durations
        of_durations = cells.of_durations
        label_scores = cells.log_probs[:, : predictor.vocab_size]
        if rows.lm_log_probs is not None:
            label_scores = label_scores + self.lm_weight * rows.lm_log_probs
        label_scores[:, predictor.blank] = -torch.inf  # blank has been read
        if rows.lm_log_probs is not None:
            is_bad = (label_scores.isnan() | (label_scores == torch.inf)).any(1)
            chunk.checks.append((rows.utterance, is_bad))
        # Most rows have no label in the window; only the others are sorted.
        highest = rows.scores[:, 0] + label_scores.amax(1)
        if of_durations is not None:
            highest = highest + of_durations.amax(1)
        _raise_to(best, rows.utterance, highest)
        threshold = self._threshold(best, rows)
        some = (highest > threshold).nonzero().squeeze(1)
        count = min(self.beam, predictor.vocab_size - 1)
        if len(some) == 0 or count == 0:
            return None
        best_labels, labels = label_scores.index_select(0, some).topk(count, dim=1)
        scores = (rows.scores[some, :1] + best_labels).unsqueeze(2)  # (N, count, 1)
        if of_durations is not None:
            scores = scores + of_durations[some].unsqueeze(1)  # (N, count, number of durations)
        row, rank, column = (scores > threshold[some].view(-1, 1, 1)).nonzero().unbind(1)
        index, tokens, scores = some[row], labels[row, rank], scores[row, rank, column]
        if len(index) > self.beam:
            group = rows.utterance[index] * len(durations) + column
            kept = best_of_groups(scores, group, self.beam)
            index, tokens, column, scores = index[kept], tokens[kept], column[kept], scores[kept]
        rows = rows.take(index)
        may_end = scores if self.topology.ends_with_label else torch.full_like(scores, -torch.inf)
        frames = rows.frame + chunk.num_frames[rows.utterance]
        log_probs = cells.log_probs[index, tokens]
        return rows._replace(
            frame=rows.frame + torch.tensor(durations, device=index.device)[column],
            scores=torch.stack((scores, may_end), 1),
            sequence=append_token(rows.sequence, tokens),
            num_tokens=rows.num_tokens + 1,
            path=chunk.paths.add(rows.path, tokens, frames, log_probs),
            unread=tokens,
        )

    def _threshold(self, best: Tensor, rows: Rows) -> Tensor:
        """Returns the score (N,) that continuations of these rows must exceed."""
        return best[rows.utterance] - self.score_window

    def _ranked(self, state: BeamState) -> list[list[BeamHypothesis]]:
        """Returns the hypotheses of each utterance as if it ended here, the best first.

        A hypothesis counts if one of its paths ends with the last frame. If an utterance has no
        such hypothesis, because all durations lead past the end, all of its hypotheses count.
        """
        rows = state.rows
        ending = rows.scores[:, 1].where(rows.frame == 0, -torch.inf)
        best = torch.full(state.num_frames.shape, -torch.inf, dtype=ending.dtype).to(ending.device)
        _raise_to(best, rows.utterance, ending)
        scores = ending.where(best[rows.utterance] > -torch.inf, rows.scores[:, 0])
        rows = rows._replace(frame=torch.zeros_like(rows.frame), scores=scores[:, None])
        rows = merge(rows.take((scores > -torch.inf).nonzero().squeeze(1)))
        scores = rows.scores[:, 0]
        if self.lm is not None and hasattr(self.lm, "final"):
            rows = self._read_tokens(rows)
            scores = scores + self.lm_weight * self.lm.final(rows.lm_state)
            is_bad = torch.zeros_like(state.num_frames, dtype=torch.bool)
            is_bad[rows.utterance[scores.isnan() | (scores == torch.inf)]] = True
            refuse_non_finite(is_bad)
        ranking = scores / (rows.num_tokens + 1) if self.length_normalized else scores
        kept = best_of_groups(ranking, rows.utterance, self.beam)
        lists = state.paths.tolist()
        columns = rows.utterance[kept], rows.path[kept], scores[kept]
        found: list[list[BeamHypothesis]] = [[] for _ in state.num_frames]
        for utterance, entry, score in zip(*(column.tolist() for column in columns), strict=True):
            path = lists.hypothesis(entry)
            score = score if score > IMPOSSIBLE / 2 else -math.inf
            # Keep the best hypothesis even if its score is -inf, so that every utterance has one.
            if score > -math.inf or not found[utterance]:
                found[utterance].append(
                    BeamHypothesis(path.tokens, path.frames, path.log_probs, score=score)
                )
        return found


class ModifiedBeamSearch(BeamSearch):
    """The former name of :class:`BeamSearch`; its default topology is ``modified``."""

    def __init__(
        self, predictor: Predictor, joiner: Joiner, *, topology: str = "modified", **options: Any
    ) -> None:
        if "length_normalised" in options:  # the former name, in configs of users
            raise TypeError("length_normalised: renamed, use length_normalized")
        super().__init__(predictor, joiner, topology=topology, **options)


class _Chunk(NamedTuple):
    """Inputs of the search in one chunk, and the results that it collects."""

    projected: Tensor  # (B, T, D) from project_encoder
    num_places: int  # frames at which a hypothesis can stand, with those after the chunk
    num_frames: Tensor  # (B,) frames before the chunk
    paths: Paths
    checks: list[tuple[Tensor, Tensor]]  # utterances (N,), and whether their scores are bad (N,)


class _Cells(NamedTuple):
    """Log-probabilities of the lattice cells of N hypotheses."""

    log_probs: Tensor  # (N, V and the number of big blanks)
    of_durations: Tensor | None  # (N, number of durations)
    is_bad: Tensor  # (N,) bool, whether they are NaN


def _raise_to(best: Tensor, group: Tensor, values: Tensor) -> None:
    """Raises each entry of `best` (B,) to the largest of its group's values (N,), in place."""
    best.scatter_reduce_(0, group, values, "amax")
