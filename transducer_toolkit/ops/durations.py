# SPDX-License-Identifier: Apache-2.0
"""Sums over all paths of a lattice, from the scores of its cells, for every topology.

The arcs of a token-and-duration transducer (TDT) and of a multi-blank transducer advance several
frames. TDT: the score of an arc is that of its symbol plus that of its duration, less sigma.
Multi-blank: every blank is a symbol; the scores of all symbols are less sigma.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from transducer_toolkit.ops import stages
from transducer_toolkit.ops.lattice import CellScores, LatticeBatch
from transducer_toolkit.ops.options import LossOptions


class PathSums(NamedTuple):
    """Result of :func:`path_sums`.

    Attributes:
        losses: (B,) float64.
        use_blank: (rows,) float64, expected uses of the blank score. Not those of big blanks.
        use_label: (rows,) float64, expected uses of the label score.
        use_extra: (rows, K) float64, expected uses of each duration, or of each big blank; (rows,
            0) for other topologies.

    The uses have no elements if they are not wanted.
    """

    losses: Tensor
    use_blank: Tensor
    use_label: Tensor
    use_extra: Tensor


def path_sums(
    scores: CellScores,
    batch: LatticeBatch,
    options: LossOptions,
    *,
    with_uses: bool,
    exact: bool = True,
    before: PathSums | None = None,
) -> PathSums:
    """Runs stage 2. The arguments are those of :func:`stages.lattice`.

    `before` is the result of an earlier call for the same batch, whose memory may be used.
    """
    if scores.extra is None:
        losses, use_blank, use_label = stages.lattice(
            scores,
            batch,
            options,
            with_uses=with_uses,
            exact=exact,
            uses=None if before is None else (before.use_blank, before.use_label),
        )
        return PathSums(losses, use_blank, use_label, use_blank.new_empty(use_blank.numel(), 0))
    losses, blank, label = stages.duration_lattice(
        arc_scores(scores, options),
        batch,
        options,
        with_uses=with_uses,
        exact=exact,
    )
    if not with_uses:
        return PathSums(losses, blank, label, blank.new_empty(0))
    if options.arcs.num_big_blanks:
        # An operator may not return two views of one tensor.
        return PathSums(losses, blank[:, 0].clone(), label[:, 0].clone(), blank[:, 1:].clone())
    use_blank, use_label = blank.sum(1), label.sum(1)
    label[:, label.size(1) - blank.size(1) :] += blank  # durations of 0 are for labels only
    return PathSums(losses, use_blank, use_label, label)


def arc_scores(scores: CellScores, options: LossOptions) -> stages.ArcScores:
    """Returns the scores of the arcs that leave each cell, of TDT or multi-blank."""
    extra = scores.extra
    assert extra is not None
    blank, label = (part[:, None] - options.sigma for part in (scores.blank, scores.label))
    if options.arcs.num_big_blanks:
        return stages.ArcScores(torch.cat([blank, extra - options.sigma], 1), label)
    first = len(options.arcs.label_durations) - len(options.arcs.blank_durations)
    return stages.ArcScores(blank + extra[:, first:], label + extra)


def occupancies(sums: PathSums, options: LossOptions) -> tuple[Tensor, Tensor]:
    """Returns the uses of all blanks together and of the label, (rows,) each."""
    if options.arcs.num_big_blanks:
        return sums.use_blank + sums.use_extra.sum(1), sums.use_label
    return sums.use_blank, sums.use_label
