# SPDX-License-Identifier: Apache-2.0
"""The functions of ops.stages with options as keywords, as tests of single stages want them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from transducer_toolkit.ops import stages
from transducer_toolkit.ops.lattice import Band, CellScores, LatticeBatch, Lengths, RowTile
from transducer_toolkit.ops.options import LossOptions
from transducer_toolkit.ops.topology import tdt_topology

kept_rows = stages.kept_rows
replace_scores, row_weights = stages.replace_scores, stages.row_weights


def lattice_batch(
    logit_lengths: Tensor,
    target_lengths: Tensor,
    targets: Tensor,
    *,
    device: torch.device,
    band_start: Tensor | None = None,
    band_width: int = 0,
    index: Tensor | None = None,
    **layout: Any,
) -> LatticeBatch:
    """A LatticeBatch on a device."""
    band = None if band_start is None else Band(band_start, band_width)
    lengths = Lengths(logit_lengths, target_lengths, index)
    return LatticeBatch(lengths, targets.to(device), band=band, **layout)


def cell_scores(
    logits: Tensor,
    batch: LatticeBatch,
    tile: RowTile,
    out: CellScores,
    *,
    blank: int,
    from_log_softmax: bool = False,
) -> None:
    """Stage 1."""
    options = LossOptions(blank=blank, from_log_softmax=from_log_softmax)
    stages.cell_scores(logits, batch, tile, options, out)


def duration_lattice(
    blank_arcs: Tensor,
    label_arcs: Tensor,
    batch: LatticeBatch,
    *,
    durations: tuple[int, ...],
    with_uses: bool = True,
    exact: bool = True,
    **options: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Stage 2 for arcs of a TDT lattice."""
    scores = stages.ArcScores(blank_arcs, label_arcs)
    topology = tdt_topology(durations).name
    loss_options = LossOptions(blank=0, topology=topology, **options)  # type: ignore[arg-type]
    return stages.duration_lattice(scores, batch, loss_options, with_uses=with_uses, exact=exact)


def lattice(
    blank_score: Tensor,
    label_score: Tensor,
    batch: LatticeBatch,
    *,
    topology: str,
    delay_penalty: float = 0.0,
    fastemit_lambda: float = 0.0,
    with_uses: bool = True,
    exact: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Stage 2."""
    scores = CellScores(blank_score, label_score, normalizer=blank_score.new_empty(0))
    options = LossOptions(
        blank=0,
        topology=topology,
        delay_penalty=delay_penalty,
        fastemit_lambda=fastemit_lambda,
    )
    return stages.lattice(scores, batch, options, with_uses=with_uses, exact=exact)


def logits_grad(
    logits: Tensor,
    batch: LatticeBatch,
    tile: RowTile,
    *posteriors: Tensor,
    blank: int,
    from_log_softmax: bool = False,
    clamp: float = 0.0,
    out: Tensor,
) -> None:
    """Stage 3; posteriors are normalizer, uses of blank and label, upstream gradient."""
    options = LossOptions(blank=blank, from_log_softmax=from_log_softmax, clamp=clamp)
    stages.logits_grad(logits, batch, tile, options, stages.Posteriors(*posteriors), out)


def join_forward(
    enc: Tensor, pred: Tensor, batch: LatticeBatch, tile: RowTile, *, activation: str, out: Tensor
) -> None:
    """Stage 0."""
    stages.join_forward(stages.Joint(enc, pred, activation), batch, tile, out)


def join_backward(
    grad_hidden: Tensor,
    hidden: Tensor,
    enc: Tensor,
    pred: Tensor,
    batch: LatticeBatch,
    tile: RowTile,
    *,
    activation: str,
    grad_enc: Tensor,
    grad_pred: Tensor,
) -> None:
    """The backward pass of stage 0."""
    joint = stages.Joint(enc, pred, activation)
    stages.join_backward(joint, batch, tile, hidden, grad_hidden, (grad_enc, grad_pred))
