# SPDX-License-Identifier: Apache-2.0
"""Finds the cells of lattices that have to be visited; only their scores are computed.

The lattices are divided into blocks (csrc/visit.h). Leaving out a block loses the paths that enter
it. The part of a path behind its entry has a probability of at most 1. So all blocks that are left
out lose at most the sum of the probabilities with which paths enter them: the certificate.

A first sweep follows the blocks into which the most probable paths lead, and finds a lower bound of
the probability of all paths. A second one visits all blocks but those that together lose at most
LEFT_OUT of it. docs/precision.md explains both.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from transducer_toolkit.ops import native, stages
from transducer_toolkit.ops.lattice import CellScores, LatticeBatch
from transducer_toolkit.ops.options import FusedOptions

# Bound of the probability that is lost, relative to that of all paths. The L1 norm of the gradient
# of an utterance's logits changes by at most four times this, times (T + U).
LEFT_OUT = 1e-8
# The first sweep visits the blocks of a wave whose masses are at least this part of the largest.
# With 1e-4 it lost the best path of joined digits, and its bound was e^-180 times too low. The
# second sweep nearly always visits these blocks, too.
NARROW = 1e-16
# An utterance that visits more than this part of its cells is visited as a whole.
MAX_SHARE = 0.7
# So is one whose best path so far loses more nats than this: the improbable paths are many then.
# On lattices that lost 7 nats a wave, 60 % of the cells were visited; at 11 nats, more than 70 %.
NATS_PER_WAVE = 8.0
FIRST_NATS = 50.0
# A wave takes about 0.1 ms besides the scores. With fewer operations than this for each wave and
# thread, that would be noticeable.
MIN_OPERATIONS_PER_WAVE = 4 * 10**8
# Hidden layers and logits below this are far from an overflow.
LARGEST_LOGIT = 1e30


class Visited(NamedTuple):
    """Result of :func:`visit`.

    Attributes:
        has_scores: (rows,) bool, the rows whose scores were computed.
        is_whole: (B,) bool, the utterances that have all their scores.
        state: of the last sweep.
    """

    has_scores: Tensor
    is_whole: Tensor
    state: stages.VisitState


def pays(batch: LatticeBatch, options: FusedOptions, weight: Tensor) -> bool:
    """Returns whether the lattices have blocks, and enough work in each wave of them.

    The batch is packed, without band and windows. The weight (V, D) is that of the output layer.
    """
    has_blocks = (
        options.num_extra == 0
        and not options.arcs.label_takes_blank  # it is the blank of a cell in another block
        and options.delay_penalty == 0  # scores above 0 would break the certificate
    )
    threads = torch.get_num_threads()
    work = batch.num_rows * weight.numel()
    return has_blocks and work >= MIN_OPERATIONS_PER_WAVE * _num_waves(batch) * threads


def _num_blocks(batch: LatticeBatch) -> tuple[int, int]:
    """Returns the numbers of blocks along the frames and along the symbols."""
    frames, symbols = native.extension.BLOCK_FRAMES, native.extension.BLOCK_SYMBOLS
    return -(-batch.max_frames // frames), batch.max_targets // symbols + 1


def _num_waves(batch: LatticeBatch) -> int:
    return sum(_num_blocks(batch)) - 1


def cannot_overflow(joint: stages.Joint, weight: Tensor) -> Tensor:
    """Returns which utterances (B,) have no cell of its own with NaN or an infinity.

    A frame, a symbol or a weight with NaN is on every path, and an infinity is not here.
    """

    def size(values: Tensor) -> Tensor:  # at least the largest magnitude; NaN after a NaN
        return torch.linalg.vector_norm(values.flatten(1), dim=1)

    of_hidden = size(joint.enc) + size(joint.pred)
    of_weight = size(weight.view(1, -1)) * weight.size(1)
    return (of_hidden < LARGEST_LOGIT) & (of_hidden * of_weight < LARGEST_LOGIT)


def visit(
    batch: LatticeBatch,
    scores: CellScores,
    options: FusedOptions,
    score_rows: Callable[[Tensor], None],
    may_leave_out: Tensor,
) -> Visited | None:
    """Has the scores of the cells computed that have to be visited. Those of the others are -inf.

    An utterance that would visit most of its cells, or that has NaN or no path, is visited as a
    whole.

    Args:
        batch: the lattices, packed, without band and windows.
        scores: of all rows; written.
        options: of the loss.
        score_rows: computes the scores of rows (N,) and writes them.
        may_leave_out: (B,) bool, the utterances that need not be visited as a whole.

    Returns:
        What was visited; None if that is everything.
    """
    like, num_cells = scores.blank, batch.rows_of_utterances
    scores.blank.fill_(-torch.inf)
    scores.label.fill_(-torch.inf)
    per_utterance = torch.full((5, batch.num_utterances), -torch.inf, dtype=like.dtype)
    total, left_out, largest, any_mass, threshold = per_utterance.unbind()
    state = stages.VisitState(
        torch.zeros(batch.num_utterances, *_num_blocks(batch), dtype=torch.uint8),
        torch.zeros_like(num_cells),
        native.mapped(batch.num_rows, like=like),
        total,
        left_out,
        torch.zeros_like(num_cells),
        largest,
    )
    max_visited = (num_cells * MAX_SHARE).long().masked_fill_(~may_leave_out, -1)
    has_scores = torch.zeros(batch.num_rows, dtype=torch.bool)
    rows = native.mapped(batch.num_rows, like=like).view(torch.int64)

    def sweep(limits: stages.VisitLimits) -> None:
        for wave in range(_num_waves(batch) + 1):
            count = stages.visit_wave(scores, batch, options, wave, limits, state, rows)
            if count:
                score_rows(rows[:count])
                has_scores.index_fill_(0, rows[:count], True)
            loses = (largest < -FIRST_NATS - NATS_PER_WAVE * wave) & (largest > -torch.inf)
            max_visited.masked_fill_(loses, -1)
            if bool((state.num_visited > max_visited).all()):
                return

    sweep(stages.VisitLimits(any_mass, max_visited, -math.log(NARROW)))
    is_whole = ~total.isfinite() | (state.num_visited > max_visited)
    max_visited.masked_fill_(is_whole, -1)
    if not bool(is_whole.all()):
        num_blocks = math.prod(_num_blocks(batch))
        torch.add(total, math.log(LEFT_OUT / num_blocks), out=threshold)
        sweep(stages.VisitLimits(threshold, max_visited))
        is_whole = ~_is_certain(left_out, total) | (state.num_visited > max_visited)
    if bool(is_whole.any()):
        rest = (batch.per_row(is_whole) & ~has_scores).nonzero().flatten()
        score_rows(rest)
        has_scores.index_fill_(0, rest, True)
    return None if bool(is_whole.all()) else Visited(has_scores, is_whole, state)


def _is_certain(left_out: Tensor, total: Tensor) -> Tensor:
    return left_out - total <= math.log(LEFT_OUT)  # False for NaN


def still_holds(
    visited: Visited, batch: LatticeBatch, scores: CellScores, options: FusedOptions
) -> bool:
    """Returns whether the certificate holds with other scores of the visited cells.

    An utterance without a finite loss counts as certain: all its cells are computed in full
    precision then.
    """
    state = visited.state
    stages.left_out(scores, batch, options, state)
    certain = _is_certain(state.left_out, state.total) | ~state.total.isfinite()
    return bool((certain | visited.is_whole).all())
