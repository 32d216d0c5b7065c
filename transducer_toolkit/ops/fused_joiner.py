# SPDX-License-Identifier: Apache-2.0
"""The operator of fused_joiner_loss: the tiles of a joiner go through stages 1 to 3."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from transducer_toolkit.ops import (
    checks,
    coarse_to_fine,
    durations,
    native,
    quantized,
    stages,
    visited_blocks,
)
from transducer_toolkit.ops.joint_tiles import (
    JointTiles,
    JointWeights,
    are_logits_few,
    padded_vocab_size,
)
from transducer_toolkit.ops.lattice import Band, CellScores, LatticeBatch, Lengths
from transducer_toolkit.ops.options import FusedOptions
from transducer_toolkit.ops.registration import Backward, Derivative, Operator


class FusedInputs(NamedTuple):
    """Tensors of :func:`fused_loss`.

    Attributes:
        enc: (B, T, D).
        pred: (B, U + 1, D).
        weight: (V, D), or (V + K, D) with K durations.
        bias: (V,) or (V + K,), or None.
        targets: (B, U) integers.
        logit_lengths: (B,) integers.
        target_lengths: (B,) integers.
        ranges: (B, T, R) integers, the symbols of each frame's cells; None: all cells exist.
        shape_index: LatticeShape.index of the lengths on the device of enc, if there is one.
        windows: (B, T, 2) integers, the cells of each frame that exist within the ranges; None: all
            of them.
    """

    enc: Tensor
    pred: Tensor
    weight: Tensor
    bias: Tensor | None
    targets: Tensor
    logit_lengths: Tensor
    target_lengths: Tensor
    ranges: Tensor | None = None
    shape_index: Tensor | None = None
    windows: Tensor | None = None


class FusedPlan(NamedTuple):
    """The decisions that are made before the operator runs.

    Attributes:
        num_rows: rows of the batch.
        keep_logits: logits are kept for backward: all of them, or the fine ones of a coarse plan
            if they fit.
        with_uses: posteriors are wanted: for backward, or by the caller.
        is_coarse: the cells that hardly matter are computed in low precision.
        num_cells: rows that are cells; None for all of them.
    """

    num_rows: int
    keep_logits: bool
    with_uses: bool
    is_coarse: bool = False
    num_cells: int | None = None


class FusedLoss(NamedTuple):
    """Result of :func:`fused_loss`.

    Attributes:
        losses: (B,) nats, differentiable.
        normalizer: (num_rows,) float64.
        use_blank: (num_rows,) float64, expected uses of the blank score.
        use_label: (num_rows,) float64, expected uses of the label score.
        use_extra: (num_rows, K) float64, expected uses of durations or big blanks.
        rows: (num_rows,) int64: the rows that backward visits in full precision, then anything.
        low_rows: (num_rows,) int64: the same for low precision. No elements unless the plan is
            coarse.
        counts: (4,) int64: rows that forward computed in full precision, the numbers of rows of
            the two lists, and the number of fine logits that are kept.
        logits: (num_rows, padded V), no elements unless the plan keeps them. Of a coarse plan, the
            fine logits in the order in which they were computed.
        places: (num_rows,) int64: for each fine row, its place in the logits; -1 for the others.
            No elements unless the plan is coarse.

    All but losses and logits have no elements unless the plan wants the uses.
    """

    losses: Tensor
    normalizer: Tensor
    use_blank: Tensor
    use_label: Tensor
    use_extra: Tensor
    rows: Tensor
    low_rows: Tensor
    counts: Tensor
    logits: Tensor
    places: Tensor

    @property
    def num_fine(self) -> Tensor:
        """Rows that forward computes in full precision, an int64 scalar."""
        return self.counts[0]

    @property
    def num_full(self) -> Tensor:
        """Rows that backward computes in full precision, an int64 scalar."""
        return self.counts[1]

    @property
    def num_low(self) -> Tensor:
        """Rows that backward computes in low precision, an int64 scalar."""
        return self.counts[2]


def fused_loss(
    inputs: FusedInputs,
    options: FusedOptions,
    num_rows: int,
    *,
    with_uses: bool,
    num_cells: int | None = None,
) -> FusedLoss:
    """Returns the losses of a joiner; arguments are checked, but for the values of tensors.

    Args:
        inputs: the tensors.
        options: the options.
        num_rows: rows of the batch.
        with_uses: the caller wants the counts.
        num_cells: as in FusedPlan.
    """
    weight, bias = inputs.weight, inputs.bias
    enc, pred = inputs.enc, inputs.pred
    with_grad = torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in (enc, pred, weight, bias)
    )
    is_coarse = options.precision == "auto" and coarse_to_fine.pays(enc, weight.size(0), num_rows)
    keep_logits = (
        with_grad
        and options.tile_cells is None
        and (is_coarse or are_logits_few(enc, weight.size(0), num_rows))
    )
    contiguous = FusedInputs(  # torch 2.4 cannot trace _replace
        enc.contiguous(),
        pred.contiguous(),
        weight,
        bias,
        inputs.targets,
        inputs.logit_lengths,
        inputs.target_lengths,
        None if inputs.ranges is None else inputs.ranges.contiguous(),
        inputs.shape_index,
        inputs.windows,
    )
    plan = FusedPlan(num_rows, keep_logits, with_grad or with_uses, is_coarse, num_cells)
    return operator(contiguous, options, plan)


def _num_kept_logits(inputs: FusedInputs, plan: FusedPlan) -> int:
    """Returns the rows of the logits that the plan keeps."""
    if not plan.keep_logits:
        return 0
    if plan.is_coarse:
        return coarse_to_fine.num_fine_logits(inputs.enc, inputs.weight.size(0))
    return plan.num_rows


def _lattice_batch(
    inputs: FusedInputs, plan: FusedPlan, skip: Tensor | None = None
) -> LatticeBatch:
    return LatticeBatch(
        Lengths(inputs.logit_lengths, inputs.target_lengths, inputs.shape_index),
        inputs.targets,
        num_rows=plan.num_rows,
        max_frames=inputs.enc.size(1),
        padded=False,
        band=Band.of(inputs.ranges),
        skip=skip,
        windows=inputs.windows,
    )


def _cell_rows(batch: LatticeBatch, plan: FusedPlan) -> Tensor | None:
    """Returns the rows that are cells; None for all rows."""
    return None if plan.num_cells is None else batch.cell_rows(plan.num_cells)


def _joint_tiles(
    inputs: FusedInputs,
    options: FusedOptions,
    batch: LatticeBatch,
    *,
    beside_kept: bool,
    has_backward: bool = False,
) -> JointTiles:
    return JointTiles(
        stages.Joint(inputs.enc, inputs.pred, options.activation),
        JointWeights(inputs.weight, inputs.bias),
        batch,
        tile_cells=options.tile_cells,
        beside_kept=beside_kept,
        pads_vocab=True,
        num_durations=options.arcs.num_durations,
        has_backward=has_backward,
    )


def _validate(inputs: FusedInputs, options: FusedOptions) -> None:
    lengths = inputs.logit_lengths, inputs.target_lengths
    max_targets = inputs.targets.size(1)
    checks.check_lengths_fit(
        *lengths, max_frames=inputs.enc.size(1), max_targets=max_targets, frames_of="enc"
    )
    if options.validate is not False:
        checks.check_feasible(*lengths, options.arcs)
    if not checks.may_read(options.validate, inputs.targets, inputs.ranges):
        return
    if inputs.ranges is not None:
        checks.check_ranges_values(inputs.ranges, inputs.logit_lengths, max_targets)
    checks.check_labels(
        inputs.targets,
        inputs.target_lengths,
        blank=options.blank,
        num_big_blanks=options.arcs.num_big_blanks,
        vocab_size=options.vocab_size(inputs.weight.size(0)),
    )


def _forward(inputs: FusedInputs, options: FusedOptions, plan: FusedPlan) -> FusedLoss:
    enc, num_columns = inputs.enc, inputs.weight.size(0)
    _validate(inputs, options)
    targets, vocab_size = inputs.targets, options.vocab_size(num_columns)
    if padded_vocab_size(enc.device, num_columns) > num_columns or plan.is_coarse:
        # A label in the padding must give a NaN loss, as any other label out of range does.
        inputs = inputs._replace(targets=targets.masked_fill(targets >= vocab_size, -1))
    batch = _lattice_batch(inputs, plan)
    scores = CellScores.zeros(batch, enc.device, options.num_extra)
    logits = native.empty(
        _num_kept_logits(inputs, plan), padded_vocab_size(enc.device, num_columns), like=enc
    )
    # A refinement has to wait for the device, which graph capture forbids.
    is_coarse = plan.is_coarse and not native.is_capturing(enc.device)
    with torch.autocast(enc.device.type, enabled=False):
        if is_coarse:
            return _forward_coarse_to_fine(inputs, options, plan, batch, scores, logits)
        joint = _joint_tiles(inputs, options, batch, beside_kept=plan.keep_logits)
        keeps_all = plan.keep_logits and not plan.is_coarse
        for tile in joint.tiles(None if keeps_all else _cell_rows(batch, plan)):
            out = logits[tile.begin : tile.begin + tile.size] if keeps_all else None
            stages.cell_scores(joint.logits(joint.hidden(tile), out), batch, tile, options, scores)
    del joint  # frees its buffers before the lattice takes memory
    sums = durations.path_sums(
        scores, batch, options, with_uses=plan.with_uses, exact=enc.dtype == torch.float64
    )
    losses = sums.losses.to(native.compute_dtype(enc.dtype))
    if not plan.with_uses:
        return _without_uses(losses, scores, logits)
    counts = targets.new_zeros(4, dtype=torch.int64)
    counts[0].fill_(plan.num_rows if plan.num_cells is None else plan.num_cells)
    kept = stages.kept_rows(
        *durations.occupancies(sums, options),
        batch,
        dropped_mass=options.dropped_mass,
        total=counts[1],
    )
    low_rows, places = (counts.new_empty(plan.num_rows if plan.is_coarse else 0) for _ in range(2))
    uses = sums.use_blank, sums.use_label, sums.use_extra
    return FusedLoss(losses, scores.normalizer, *uses, kept.rows, low_rows, counts, logits, places)


def _without_uses(losses: Tensor, scores: CellScores, logits: Tensor) -> FusedLoss:
    """Returns the losses alone."""
    # Each from its own call: an operator may not return one tensor twice.
    score = scores.normalizer.new_empty
    index = functools.partial(score, dtype=torch.int64)
    nothing = score(0), score(0), score(0), score(0), index(0), index(0), index(0)
    return FusedLoss(losses, *nothing, logits, index(0))


def _coarse_tiles(
    fine: JointTiles, options: FusedOptions, *, has_backward: bool = False
) -> JointTiles:
    """Returns the tiles of the same joiner with products in low precision."""
    enc, pred, _ = fine.joint
    # A GPU gains from a join of 16 bits, which moves half of the memory. But rounding changes the
    # sign of some sums near zero, and with it the derivative of relu.
    if enc.device.type == "cuda" and options.activation != "relu":
        enc, pred = (side.to(coarse_to_fine.COARSE_DTYPE) for side in (enc, pred))
    return JointTiles(
        stages.Joint(enc, pred, options.activation),
        JointWeights(fine.weight, fine.bias),  # padded
        fine.batch,
        tile_cells=options.tile_cells,
        beside_kept=True,
        product_dtype=coarse_to_fine.COARSE_DTYPE,
        has_backward=has_backward,
    )


def _coarse_scorer(
    inputs: FusedInputs, options: FusedOptions, fine: JointTiles, scores: CellScores
) -> Callable[[Tensor | None], None]:
    """Returns a function that writes the coarse scores of rows (N,), or of all rows for None."""
    batch = fine.batch
    if quantized.can_score(inputs.enc) and native.runs_on_cpu(inputs.enc):
        joint = stages.Joint(inputs.enc, inputs.pred, options.activation)
        weights = JointWeights(inputs.weight, inputs.bias)
        return quantized.Scorer(joint, weights, batch, options, scores, options.tile_cells)
    low = _coarse_tiles(fine, options)

    def score(rows: Tensor | None) -> None:
        for tile in low.tiles(rows):
            stages.cell_scores(low.logits(low.hidden(tile)), batch, tile, options, scores)

    return score


def _forward_coarse_to_fine(
    inputs: FusedInputs,
    options: FusedOptions,
    plan: FusedPlan,
    batch: LatticeBatch,
    scores: CellScores,
    logits: Tensor,
) -> FusedLoss:
    enc = inputs.enc
    fine = _joint_tiles(inputs, options, batch, beside_kept=True)
    score_coarse = _coarse_scorer(inputs, options, fine, scores)
    visited = None
    if (
        native.runs_on_cpu(enc)
        and inputs.ranges is None
        and visited_blocks.pays(batch, options, inputs.weight)
    ):
        joint = stages.Joint(enc, inputs.pred, options.activation)
        may_leave_out = visited_blocks.cannot_overflow(joint, inputs.weight)
        visited = visited_blocks.visit(batch, scores, options, score_coarse, may_leave_out)
    else:
        score_coarse(_cell_rows(batch, plan))
    del score_coarse  # frees its buffers before the lattice takes memory

    num_kept = 0

    def score_rows(rows: Tensor, out: CellScores, first: int) -> None:
        nonlocal num_kept
        for tile in fine.tiles(rows):
            begin = first + tile.begin
            end = begin + tile.size
            kept = None
            if end <= logits.size(0):
                kept, num_kept = logits[begin:end], end
            stages.cell_scores(fine.logits(fine.hidden(tile), kept), batch, tile, options, out)

    has_scores = None if visited is None else visited.has_scores
    refined = coarse_to_fine.refine(batch, scores, options, score_rows, has_scores)
    if visited is not None and not visited_blocks.still_holds(visited, batch, scores, options):
        del refined  # frees its memory before the next one
        num_kept = 0
        _coarse_scorer(inputs, options, fine, scores)(None)
        refined = coarse_to_fine.refine(batch, scores, options, score_rows)
    losses = refined.sums.losses.to(enc.dtype)
    if not plan.with_uses:
        return _without_uses(losses, scores, logits)
    counts = refined.places.new_full((4,), refined.num_fine)
    counts[3].fill_(num_kept)
    visit = coarse_to_fine.plan_backward(batch, scores, options, refined, counts[1:3])
    return FusedLoss(
        losses,
        scores.normalizer,
        *refined.sums[1:],
        *visit,
        counts,
        logits,
        refined.places,
    )


def _fake(inputs: FusedInputs, options: FusedOptions, plan: FusedPlan) -> FusedLoss:
    enc, targets = inputs.enc, inputs.targets
    rows = plan.num_rows if plan.with_uses else 0
    per_row = functools.partial(enc.new_empty, dtype=native.SCORE_DTYPE)
    index = functools.partial(targets.new_empty, dtype=torch.int64)
    return FusedLoss(
        enc.new_empty(targets.size(0), dtype=native.compute_dtype(enc.dtype)),
        per_row(rows),
        per_row(rows),
        per_row(rows),
        per_row(rows, options.num_extra) if plan.with_uses else per_row(0),
        index(rows),
        index(rows if plan.is_coarse else 0),
        index(4 if plan.with_uses else 0),
        enc.new_empty(
            _num_kept_logits(inputs, plan), padded_vocab_size(enc.device, inputs.weight.size(0))
        ),
        index(rows if plan.is_coarse else 0),
    )


def _backward(call: Backward) -> dict[str, Tensor]:
    inputs, options, plan, saved = call.inputs, call.options, call.plan, call.outputs
    enc = inputs.enc
    loss_grad = call.grads["losses"].to(native.SCORE_DTYPE).contiguous()
    # The caller may have masked out an utterance because it holds NaN, and 0 * NaN is not zero.
    batch = _lattice_batch(inputs, plan, skip=loss_grad == 0)
    scale = None
    if enc.dtype == torch.float16:
        # A loss scale of 65536 would overflow the tiles: apply it after the products instead.
        largest = loss_grad.abs().max()
        scale = largest.masked_fill(~((largest > 0) & largest.isfinite()), 1.0)
        loss_grad = loss_grad / scale
        scale = scale.to(torch.float32)
    posteriors = stages.Posteriors(
        saved.normalizer, saved.use_blank, saved.use_label, loss_grad, saved.use_extra
    )

    def visit_low(joint: JointTiles, rows: Tensor) -> None:
        """Adds the gradients of rows in low precision."""
        # The normalizer has to fit to the logits, and that of forward comes from other ones.
        # The other scores are not used.
        normalizer, unused = (native.mapped(plan.num_rows, like=saved.normalizer) for _ in range(2))
        extra = None
        if options.num_extra:
            extra = native.mapped(plan.num_rows * options.num_extra, like=saved.normalizer)
        scores = CellScores(unused, unused, normalizer, extra)
        own = posteriors._replace(normalizer=scores.normalizer)
        for tile in joint.tiles(rows):
            hidden = joint.hidden(tile)
            logits = joint.logits(hidden)
            stages.cell_scores(logits, batch, tile, options, scores)
            stages.logits_grad(logits, batch, tile, options, own, logits)
            joint.backward(tile, hidden, logits)

    def visit(joint: JointTiles, rows: Tensor | None, kept: Tensor | None, whole: bool) -> None:
        """Adds the gradients of rows; `kept` are their logits, or those of all rows if `whole`."""
        places = None if kept is None or whole else saved.places
        for tile in joint.tiles(rows, whole_logits=whole, places=places):
            hidden = joint.hidden(tile)
            grad_logits = joint.buffer("logits", tile.size)
            logits = joint.logits(hidden) if kept is None else kept
            stages.logits_grad(logits, batch, tile, options, posteriors, grad_logits)
            joint.backward(tile, hidden, grad_logits)

    with torch.autocast(enc.device.type, enabled=False):
        # Reading the counts synchronizes, which graph capture forbids; every row is visited then.
        if native.is_capturing(enc.device):
            full_rows, num_fine, num_low, num_logits = None, 0, 0, 0
        else:
            num_fine, num_full, num_low, num_logits = saved.counts.tolist()
            full_rows = saved.rows[:num_full]
        # A coarse plan has more numbers of each cell in memory, so its tiles are smaller.
        full = _joint_tiles(inputs, options, batch, beside_kept=plan.is_coarse, has_backward=True)
        full.start_backward(call.wanted)
        if num_low:
            low = _coarse_tiles(full, options, has_backward=True)
            low.start_backward(call.wanted, sums_of=full)
            visit_low(low, saved.low_rows[:num_low])
            del low
        keeps_all = plan.keep_logits and not plan.is_coarse
        if plan.is_coarse and full_rows is not None and 0 < num_logits < num_fine:
            has_logits = saved.places[full_rows] < num_logits
            visit(full, full_rows[has_logits], saved.logits, False)
            visit(full, full_rows[~has_logits], None, False)
        else:
            kept = saved.logits if keeps_all or num_logits > 0 else None
            visit(full, full_rows, kept, keeps_all)
        return full.gradients(scale)


operator = Operator(
    "fused_joiner_loss",
    (FusedInputs, FusedOptions, FusedPlan, FusedLoss),
    forward=_forward,
    fake=_fake,
    derivative=Derivative(
        backward=_backward,
        of=("enc", "pred", "weight", "bias"),
        through=("losses",),
        unsaved=("losses",),
    ),
    functions="fused_joiner_loss",
)
