# SPDX-License-Identifier: Apache-2.0
"""One function for each compiled stage: allocates the outputs and calls it (csrc/README.md).

Arguments are trusted: the public functions in :mod:`transducer_toolkit.losses` check them first.
"""

from __future__ import annotations

import torch
from torch import Tensor

from transducer_toolkit.ops import native
from transducer_toolkit.ops.lattice import CellScores, LatticeBatch, RowTile


def cell_scores(
    logits: Tensor,
    batch: LatticeBatch,
    tile: RowTile,
    out: CellScores,
    *,
    blank: int,
    from_log_softmax: bool = False,
) -> None:
    """Stage 1. logits (tile rows, V) -> normaliser, blank score and label score of these rows."""
    with native.backend_of(logits) as backend:
        backend.stages.cell_scores(
            batch.native,
            tile.native,
            dtype=native.DTYPES[logits.dtype],
            logits=native.address(logits),
            vocab_size=logits.size(-1),
            blank=blank,
            from_log_softmax=from_log_softmax,
            **backend.queue,
            normaliser=native.address(out.normaliser),
            blank_score=native.address(out.blank),
            label_score=native.address(out.label),
        )


def lattice(
    blank_score: Tensor,
    label_score: Tensor,
    batch: LatticeBatch,
    *,
    topology: str,
    delay_penalty: float,
    fastemit_lambda: float,
    with_uses: bool,
    exact: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Stage 2. Scores (rows,) -> loss (B,), uses of the blank and of the label score (rows,).

    Without `with_uses` only the loss is computed and the other two have no elements. `exact` is for
    scores that come of float64: without it, CUDA adds the float64 logarithms up with float32's
    exponentials (an error of 1e-7 a term). The CPU is exact always.
    """
    loss = blank_score.new_empty(batch.num_utterances)
    use_blank, use_label = (
        blank_score.new_zeros(batch.num_rows if with_uses else 0) for _ in range(2)
    )
    with native.backend_of(blank_score) as backend:
        native_topology = native.extension.Topology.__members__[topology]
        scratch = blank_score.new_empty(
            backend.stages.lattice_scratch(
                batch.native, topology=native_topology, with_uses=with_uses
            )
        )
        backend.stages.lattice(
            batch.native,
            topology=native_topology,
            delay_penalty=delay_penalty,
            fastemit_lambda=fastemit_lambda,
            exact=exact,
            blank_score=native.address(blank_score),
            label_score=native.address(label_score),
            **backend.queue,
            scratch=native.address(scratch),
            loss=native.address(loss),
            use_blank=native.address(use_blank) if with_uses else 0,
            use_label=native.address(use_label) if with_uses else 0,
        )
    return loss, use_blank, use_label


def kept_rows(
    use_blank: Tensor, use_label: Tensor, batch: LatticeBatch, *, dropped_mass: float
) -> tuple[Tensor, Tensor]:
    """The rows of the cells that carry gradient (csrc/occupancy.h), and their numbers (B,).

    The first is (rows,): what stands behind its first ``numbers.sum()`` elements means nothing.
    Waits for no device.
    """
    rows = torch.empty(batch.num_rows, dtype=torch.int64, device=use_blank.device)
    counts = torch.empty(batch.num_utterances, dtype=torch.int64, device=use_blank.device)
    dropped = use_blank.new_empty(batch.num_utterances)
    with native.backend_of(use_blank) as backend:
        arguments = {
            "use_blank": native.address(use_blank),
            "use_label": native.address(use_label),
            "dropped_mass": dropped_mass,
            **backend.queue,
            "kept_rows": native.address(rows),
            "num_kept": native.address(counts),
            "dropped": native.address(dropped),
        }
        if backend.is_cuda:
            scratch = use_blank.new_empty(batch.num_utterances)
            backend.stages.kept_rows(batch.native, **arguments, scratch=native.address(scratch))
        else:
            total = backend.stages.kept_rows(batch.native, **arguments)
            assert total <= batch.num_rows
    return rows, counts


def logits_grad(
    logits: Tensor,
    batch: LatticeBatch,
    tile: RowTile,
    normaliser: Tensor,
    use_blank: Tensor,
    use_label: Tensor,
    loss_grad: Tensor,
    *,
    blank: int,
    from_log_softmax: bool = False,
    clamp: float = 0.0,
    out: Tensor,
) -> None:
    """Stage 3. Posteriors and upstream gradient (B,) float64 -> gradient of the tile's logits.

    Written to `out` (tile rows, V); it may be the logits themselves, unless these are whole.
    """
    with native.backend_of(logits) as backend:
        backend.stages.logits_grad(
            batch.native,
            tile.native,
            dtype=native.DTYPES[logits.dtype],
            logits=native.address(logits),
            vocab_size=logits.size(-1),
            blank=blank,
            from_log_softmax=from_log_softmax,
            clamp=clamp,
            normaliser=native.address(normaliser),
            use_blank=native.address(use_blank),
            use_label=native.address(use_label),
            loss_grad=native.address(loss_grad),
            **backend.queue,
            grad=native.address(out),
        )


def join_forward(
    enc: Tensor, pred: Tensor, batch: LatticeBatch, tile: RowTile, *, activation: str, out: Tensor
) -> None:
    """activation(enc_t + pred_u) of the tile's cells: (B,T,D), (B,U+1,D) -> out (tile rows, D)."""
    with native.backend_of(enc) as backend:
        backend.stages.join_forward(
            batch.native,
            tile.native,
            dtype=native.DTYPES[enc.dtype],
            enc=native.address(enc),
            pred=native.address(pred),
            width=enc.size(-1),
            activation=native.extension.Activation.__members__[activation],
            **backend.queue,
            hidden=native.address(out),
        )


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
    """Adds the tile's part of the gradients of enc and pred, which are of compute_dtype."""
    with native.backend_of(enc) as backend:
        backend.stages.join_backward(
            batch.native,
            tile.native,
            dtype=native.DTYPES[enc.dtype],
            grad_hidden=native.address(grad_hidden),
            hidden=native.address(hidden),
            enc=native.address(enc),
            pred=native.address(pred),
            width=enc.size(-1),
            activation=native.extension.Activation.__members__[activation],
            **backend.queue,
            grad_enc=native.address(grad_enc),
            grad_pred=native.address(grad_pred),
        )
