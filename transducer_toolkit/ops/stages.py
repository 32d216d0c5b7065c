# SPDX-License-Identifier: Apache-2.0
"""One function for each compiled stage: allocates the outputs and calls it (csrc/README.md).

Arguments are trusted: the public functions in :mod:`transducer_toolkit.losses` check them first.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from transducer_toolkit.ops import native
from transducer_toolkit.ops.lattice import CellScores, LatticeBatch, RowTile
from transducer_toolkit.ops.options import LossOptions


class Joint(NamedTuple):
    """The two sides of a joiner, and the activation of their sum.

    Attributes:
        enc: (B, T, D), contiguous.
        pred: (B, U + 1, D), contiguous, same dtype and device.
        activation: one of native.ACTIVATIONS.
    """

    enc: Tensor
    pred: Tensor
    activation: str


class Posteriors(NamedTuple):
    """The inputs of stage 3 beside the logits.

    Attributes:
        normalizer: (rows,) float64.
        use_blank: (rows,) float64.
        use_label: (rows,) float64.
        loss_grad: (B,) float64, the upstream gradient.
        use_extra: (rows, K) float64, uses of the durations or big blanks, if there are any.
    """

    normalizer: Tensor
    use_blank: Tensor
    use_label: Tensor
    loss_grad: Tensor
    use_extra: Tensor | None = None


class ArcScores(NamedTuple):
    """Log-probabilities of the arcs that leave each cell, in the order of their durations.

    Attributes:
        blank: (rows, number of blank durations) float64, contiguous.
        label: (rows, number of label durations) float64, contiguous.
    """

    blank: Tensor
    label: Tensor


class QuantizedLogits(NamedTuple):
    """Logits ``data * row_scales[:, None] * column_scales + bias``.

    Attributes:
        data: (rows, V) int32; the stage overwrites it. Columns of durations are behind the symbols.
        row_scales: (rows,) float32.
        column_scales: (V,) float32.
        bias: (V,) float32, or None.
    """

    data: Tensor
    row_scales: Tensor
    column_scales: Tensor
    bias: Tensor | None


class KeptRows(NamedTuple):
    """Result of :func:`kept_rows`.

    Attributes:
        rows: (rows,) int64, ascending. Elements behind the first `total` are undefined.
        counts: (B,) int64, their number in each utterance.
        total: scalar int64, their number.
        lowest: (B,) float64, the lowest occupancy that is kept.
        uses: (rows,) float64 each, the arguments.
    """

    rows: Tensor
    counts: Tensor
    total: Tensor
    lowest: Tensor
    uses: tuple[Tensor, Tensor]


class RowWeights(NamedTuple):
    """The options of :func:`row_weights` (csrc/coarse_to_fine.h)."""

    of_fine_rows: bool
    error_scale: float
    unknown_error: float
    least_error: float
    exponent: float
    least_gradient: float


def _scratch(num_bytes: int, like: Tensor) -> Tensor:
    """Memory for a stage on the device of `like`. It may contain anything."""
    return torch.empty(num_bytes, dtype=torch.uint8, device=like.device)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else native.address(tensor)


def _logit_rows(logits: Tensor, options: LossOptions) -> native.extension.LogitRows:
    pitch = logits.size(-1)
    return native.extension.LogitRows(
        dtype=native.DTYPES[logits.dtype],
        data=native.address(logits),
        vocab_size=options.vocab_size(pitch),
        pitch=pitch,
    )


def _logits_options(options: LossOptions) -> native.extension.LogitsOptions:
    return native.extension.LogitsOptions(
        blank=options.blank,
        from_log_softmax=options.from_log_softmax,
        clamp=options.clamp,
        num_big_blanks=options.arcs.num_big_blanks,
        num_durations=options.arcs.num_durations,
        is_hat=options.is_hat,
    )


def _cell_scores_out(out: CellScores) -> native.extension.CellScoresOut:
    return native.extension.CellScoresOut(
        normalizer=native.address(out.normalizer),
        blank=native.address(out.blank),
        label=native.address(out.label),
        extra=_address(out.extra),
    )


def _join_inputs(joint: Joint) -> native.extension.JoinInputs:
    return native.extension.JoinInputs(
        dtype=native.DTYPES[joint.enc.dtype],
        enc=native.address(joint.enc),
        pred=native.address(joint.pred),
        width=joint.enc.size(-1),
        activation=native.extension.Activation.__members__[joint.activation],
    )


def cell_scores(
    logits: Tensor, batch: LatticeBatch, tile: RowTile, options: LossOptions, out: CellScores
) -> None:
    """Stage 1: writes normalizer, blank score and label score of the tile's rows.

    Args:
        logits: (tile rows, V).
        batch: the lattices.
        tile: the rows that logits holds.
        options: blank and from_log_softmax are used.
        out: the scores of the whole batch.
    """
    with native.backend_of(logits) as backend:
        backend.stages.cell_scores(
            batch.native,
            tile.native,
            logits=_logit_rows(logits, options),
            options=_logits_options(options),
            **backend.queue,
            out=_cell_scores_out(out),
        )


def quantized_cell_scores(
    logits: QuantizedLogits,
    batch: LatticeBatch,
    tile: RowTile,
    options: LossOptions,
    out: CellScores,
) -> None:
    """Stage 1 from quantized logits of the tile's rows, on the CPU."""
    native.extension.cpu.quantized_cell_scores(
        batch.native,
        tile.native,
        logits=native.extension.QuantizedLogits(
            data=native.address(logits.data),
            row_scales=native.address(logits.row_scales),
            column_scales=native.address(logits.column_scales),
            bias=_address(logits.bias),
            vocab_size=options.vocab_size(logits.data.size(-1)),
            pitch=logits.data.size(-1),
        ),
        options=_logits_options(options),
        num_threads=torch.get_num_threads(),
        out=_cell_scores_out(out),
    )


def _native_topology(options: LossOptions) -> native.extension.Topology:
    # The stage for durations does not read it.
    name = "regular" if options.num_extra else options.topology
    return native.extension.Topology.__members__[name]


def _lattice_options(options: LossOptions, exact: bool) -> native.extension.LatticeOptions:
    return native.extension.LatticeOptions(
        topology=_native_topology(options),
        delay_penalty=options.delay_penalty,
        fastemit_lambda=options.fastemit_lambda,
        exact=exact,
    )


def lattice(
    scores: CellScores,
    batch: LatticeBatch,
    options: LossOptions,
    *,
    with_uses: bool,
    exact: bool = True,
    uses: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Stage 2: sums up all paths.

    Args:
        scores: of all rows; the normalizer is not read.
        batch: the lattices.
        options: topology, delay_penalty and fastemit_lambda are used.
        with_uses: compute the posteriors too.
        exact: for scores that were computed in float64. Otherwise CUDA adds the float64 logarithms
            with float32 exponentials, an error of 1e-7 a term. The CPU is always exact.
        uses: results of an earlier call for the same batch, which are overwritten; None for new
            ones.

    Returns:
        Loss (B,), expected uses of the blank score and of the label score (rows,), float64. The
        uses have no elements without `with_uses`.
    """
    blank, label = scores.blank, scores.label
    loss = blank.new_empty(batch.num_utterances)
    if uses is None:  # stage 2 does not write padding
        size = batch.num_rows if with_uses else 0
        use_blank, use_label = native.zeros(size, size, like=blank)
    else:
        use_blank, use_label = uses
    with native.backend_of(blank) as backend:
        topology = _native_topology(options)
        num_bytes = backend.stages.lattice_scratch(
            batch.native, topology=topology, with_uses=with_uses
        )
        scratch = _scratch(num_bytes, like=blank)
        backend.stages.lattice(
            batch.native,
            options=_lattice_options(options, exact),
            scores=native.extension.LatticeScores(
                blank=native.address(blank), label=native.address(label)
            ),
            **backend.queue,
            scratch=native.address(scratch),
            out=native.extension.LatticeOut(
                loss=native.address(loss),
                use_blank=native.address(use_blank) if with_uses else 0,
                use_label=native.address(use_label) if with_uses else 0,
            ),
        )
    return loss, use_blank, use_label


def duration_lattice(
    scores: ArcScores,
    batch: LatticeBatch,
    options: LossOptions,
    *,
    with_uses: bool,
    exact: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Stage 2 for arcs that advance several frames: sums up all paths.

    Args:
        scores: of all rows.
        batch: the lattices.
        options: arcs, delay_penalty and fastemit_lambda are used.
        with_uses: compute the posteriors too.
        exact: as in :func:`lattice`.

    Returns:
        Loss (B,), and the expected uses of each blank arc and of each label arc, shaped like their
        scores; float64. The uses have no elements without `with_uses`.
    """
    blank, label = scores
    loss = blank.new_empty(batch.num_utterances)
    use_blank, use_label = (
        torch.zeros_like(part) if with_uses else part.new_empty(0) for part in scores
    )
    with native.backend_of(blank) as backend:
        num_bytes = backend.stages.duration_lattice_scratch(batch.native, with_uses=with_uses)
        scratch = _scratch(num_bytes, like=blank)
        backend.stages.duration_lattice(
            batch.native,
            options=_lattice_options(options, exact),
            arcs=native.extension.DurationArcs(
                blank_frames=options.arcs.blank_durations,
                label_frames=options.arcs.label_durations,
            ),
            scores=native.extension.ArcScores(
                blank=native.address(blank), label=native.address(label)
            ),
            **backend.queue,
            scratch=native.address(scratch),
            out=native.extension.ArcOut(
                loss=native.address(loss),
                use_blank=native.address(use_blank) if with_uses else 0,
                use_label=native.address(use_label) if with_uses else 0,
            ),
        )
    return loss, use_blank, use_label


def kept_rows(
    use_blank: Tensor,
    use_label: Tensor,
    batch: LatticeBatch,
    *,
    dropped_mass: float,
    taken: KeptRows | None = None,
    total: Tensor | None = None,
) -> KeptRows:
    """Lists the rows of the cells that carry gradient (csrc/occupancy.h), without a wait.

    Args:
        use_blank: (rows,) float64.
        use_label: (rows,) float64.
        batch: the lattices.
        dropped_mass: the occupancy to leave out.
        taken: rows that do not count.
        total: int64 scalar to write the number of rows to, or None.
    """
    rows = native.mapped(batch.num_rows, like=use_blank).view(torch.int64)
    counts = torch.empty(batch.num_utterances, dtype=torch.int64, device=use_blank.device)
    dropped, lowest = (use_blank.new_empty(batch.num_utterances) for _ in range(2))
    if total is None:
        total = counts.new_empty(())
    taken_uses = (None, None) if taken is None else taken.uses
    with native.backend_of(use_blank) as backend:
        scratch = _scratch(backend.stages.kept_rows_scratch(batch.native), like=use_blank)
        backend.stages.kept_rows(
            batch.native,
            uses=native.extension.Uses(
                blank=native.address(use_blank),
                label=native.address(use_label),
                taken_blank=_address(taken_uses[0]),
                taken_label=_address(taken_uses[1]),
                taken_lowest=0 if taken is None else native.address(taken.lowest),
            ),
            dropped_mass=dropped_mass,
            **backend.queue,
            scratch=native.address(scratch),
            out=native.extension.KeptRowsOut(
                rows=native.address(rows),
                num_kept=native.address(counts),
                dropped=native.address(dropped),
                lowest=native.address(lowest),
                total=native.address(total),
            ),
        )
    return KeptRows(rows, counts, total, lowest, (use_blank, use_label))


def replace_scores(
    scores: CellScores,
    fine: CellScores,
    batch: LatticeBatch,
    tile: RowTile,
    *,
    first_place: int,
    places: Tensor,
    error: Tensor,
) -> None:
    """Replaces coarse scores of the tile's rows by fine ones (csrc/coarse_to_fine.h).

    Args:
        scores: coarse scores of all rows; changed. The normalizer is not.
        fine: scores, of which those of the tile's rows are read.
        batch: the lattices.
        tile: the rows.
        first_place: the place of the tile's first row.
        places: (rows,) int64, the place of each refined row, -1 for the others; changed.
        error: (B,) float64, the largest error so far; changed.
    """
    num_extra = 0 if scores.extra is None else scores.extra.size(1)
    with native.backend_of(places) as backend:
        backend.stages.replace_scores(
            batch.native,
            tile.native,
            fine=native.extension.FineScores(
                blank=native.address(fine.blank),
                label=native.address(fine.label),
                extra=_address(fine.extra),
                num_extra=num_extra,
            ),
            first_place=first_place,
            **backend.queue,
            out=native.extension.RefinedOut(
                blank=native.address(scores.blank),
                label=native.address(scores.label),
                extra=_address(scores.extra),
                places=native.address(places),
                error=native.address(error),
            ),
        )


def row_weights(
    scores: CellScores,
    uses: tuple[Tensor, Tensor, Tensor],
    batch: LatticeBatch,
    options: LossOptions,
    weights: RowWeights,
    *,
    loss: Tensor | None,
    error: Tensor,
    places: Tensor,
) -> Tensor:
    """Returns how much the precision of each row matters, (rows,) float64 (csrc/coarse_to_fine.h).

    Args:
        scores: of all rows; the normalizer is not read.
        uses: of blank, of the label and of durations or big blanks, for these scores.
        batch: the lattices.
        options: of the loss.
        weights: which rows are weighed, and how.
        loss: (B,) float64; the weights are NaN where it is not finite. None: not so.
        error: (B,) float64, as of :func:`replace_scores`.
        places: (rows,) int64, as of :func:`replace_scores`.
    """
    weight = native.mapped(batch.num_rows, like=scores.blank)
    use_blank, use_label, use_extra = uses
    with native.backend_of(places) as backend:
        scratch = _scratch(backend.stages.row_weights_scratch(batch.native), like=weight)
        backend.stages.row_weights(
            batch.native,
            inputs=native.extension.RowWeightsIn(
                blank=native.address(scores.blank),
                label=native.address(scores.label),
                extra=_address(scores.extra),
                use_blank=native.address(use_blank),
                use_label=native.address(use_label),
                use_extra=native.address(use_extra),
                loss=_address(loss),
                error=native.address(error),
                places=native.address(places),
            ),
            logits=_logits_options(options),
            options=native.extension.RowWeightsOptions(**weights._asdict()),
            **backend.queue,
            scratch=native.address(scratch),
            weight=native.address(weight),
        )
    return weight


def logits_grad(
    logits: Tensor,
    batch: LatticeBatch,
    tile: RowTile,
    options: LossOptions,
    posteriors: Posteriors,
    out: Tensor,
) -> None:
    """Stage 3: writes the gradient of the tile's logits.

    Args:
        logits: (tile rows, V), or those of all rows if the tile says so.
        batch: the lattices.
        tile: the rows to write.
        options: blank, from_log_softmax and clamp are used.
        posteriors: of all rows.
        out: (tile rows, V); may be the logits themselves, unless these are whole.
    """
    with native.backend_of(logits) as backend:
        backend.stages.logits_grad(
            batch.native,
            tile.native,
            logits=_logit_rows(logits, options),
            options=_logits_options(options),
            posteriors=native.extension.Posteriors(
                normalizer=native.address(posteriors.normalizer),
                use_blank=native.address(posteriors.use_blank),
                use_label=native.address(posteriors.use_label),
                loss_grad=native.address(posteriors.loss_grad),
                use_extra=_address(posteriors.use_extra),
            ),
            **backend.queue,
            grad=native.address(out),
        )


def join_forward(joint: Joint, batch: LatticeBatch, tile: RowTile, out: Tensor) -> None:
    """Writes activation(enc_t + pred_u) of the tile's cells to out (tile rows, D)."""
    with native.backend_of(joint.enc) as backend:
        backend.stages.join_forward(
            batch.native,
            tile.native,
            inputs=_join_inputs(joint),
            **backend.queue,
            hidden=native.address(out),
        )


def join_quantized(
    joint: Joint, batch: LatticeBatch, tile: RowTile, hidden: Tensor, scales: Tensor
) -> None:
    """Writes join_forward's rows as int8 to hidden (tile rows, D), on the CPU.

    Args:
        joint: float32.
        batch: the lattices.
        tile: the rows to write.
        hidden: (tile rows, D) int8.
        scales: (tile rows,) float32, by which the rows were divided.
    """
    native.extension.cpu.join_quantized(
        batch.native,
        tile.native,
        inputs=_join_inputs(joint),
        num_threads=torch.get_num_threads(),
        hidden=native.address(hidden),
        scales=native.address(scales),
    )


def join_backward(
    joint: Joint,
    batch: LatticeBatch,
    tile: RowTile,
    hidden: Tensor,
    grad_hidden: Tensor,
    grads: tuple[Tensor, Tensor],
) -> None:
    """Adds the tile's part to the gradients of enc and pred.

    Args:
        joint: the inputs of join_forward.
        batch: the lattices.
        tile: the rows of the next two.
        hidden: (tile rows, D), the output of join_forward.
        grad_hidden: (tile rows, D), its gradient.
        grads: of enc and pred, shaped like these, of native.compute_dtype.
    """
    with native.backend_of(joint.enc) as backend:
        num_bytes = backend.stages.join_backward_scratch(batch.native, tile.native)
        scratch = _scratch(num_bytes, like=joint.enc)
        backend.stages.join_backward(
            batch.native,
            tile.native,
            inputs=_join_inputs(joint),
            hidden=native.address(hidden),
            grad_hidden=native.address(grad_hidden),
            **backend.queue,
            scratch=native.address(scratch),
            grads=native.extension.JoinGrads(
                enc=native.address(grads[0]), pred=native.address(grads[1])
            ),
        )
