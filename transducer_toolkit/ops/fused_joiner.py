# SPDX-License-Identifier: Apache-2.0
"""The operator of fused_joiner_loss: the tiles of a joiner go through stages 1 to 3."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from transducer_toolkit.ops import checks, native, stages
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
        weight: (V, D).
        bias: (V,), or None.
        targets: (B, U) integers.
        logit_lengths: (B,) integers.
        target_lengths: (B,) integers.
        ranges: (B, T, R) integers, the symbols of each frame's cells; None: all cells exist.
        shape_index: LatticeShape.index of the lengths on the device of enc, if there is one.
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


class FusedPlan(NamedTuple):
    """What is known before the operator runs.

    Attributes:
        num_rows: cells of the batch.
        keep_logits: all logits are kept for backward.
        with_uses: posteriors are wanted: for backward, or by the caller.
    """

    num_rows: int
    keep_logits: bool
    with_uses: bool


class FusedLoss(NamedTuple):
    """Result of :func:`fused_loss`.

    Attributes:
        losses: (B,) nats, differentiable.
        normalizer: (num_rows,) float64.
        use_blank: (num_rows,) float64, expected uses of the blank score.
        use_label: (num_rows,) float64, expected uses of the label score.
        rows: (num_rows,) int64; the first ``num_kept.sum()`` are the rows that backward visits.
        num_kept: (B,) int64, how many of them each utterance has.
        logits: (num_rows, padded V), no elements unless the plan keeps them.

    All but losses and logits have no elements unless the plan wants the uses.
    """

    losses: Tensor
    normalizer: Tensor
    use_blank: Tensor
    use_label: Tensor
    rows: Tensor
    num_kept: Tensor
    logits: Tensor


def fused_loss(
    inputs: FusedInputs, options: FusedOptions, num_rows: int, *, with_uses: bool
) -> FusedLoss:
    """Returns the losses of a joiner; arguments are checked, but for the values of tensors.

    Args:
        inputs: the tensors.
        options: the options.
        num_rows: cells of the batch.
        with_uses: the caller wants num_kept.
    """
    weight, bias = inputs.weight, inputs.bias
    enc, pred = inputs.enc, inputs.pred
    with_grad = torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in (enc, pred, weight, bias)
    )
    keep_logits = (
        with_grad and options.tile_cells is None and are_logits_few(enc, weight.size(0), num_rows)
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
    )
    return operator(contiguous, options, FusedPlan(num_rows, keep_logits, with_grad or with_uses))


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
    )


def _joint_tiles(
    inputs: FusedInputs, options: FusedOptions, batch: LatticeBatch, *, beside_kept: bool
) -> JointTiles:
    return JointTiles(
        stages.Joint(inputs.enc, inputs.pred, options.activation),
        JointWeights(inputs.weight, inputs.bias),
        batch,
        tile_cells=options.tile_cells,
        beside_kept=beside_kept,
        pads_vocab=True,
    )


def _validate(inputs: FusedInputs, options: FusedOptions) -> None:
    lengths = inputs.logit_lengths, inputs.target_lengths
    max_targets = inputs.targets.size(1)
    checks.check_lengths_fit(*lengths, max_frames=inputs.enc.size(1), max_targets=max_targets)
    if options.validate is not False:
        checks.check_feasible(*lengths, options.topology)
    if not checks.may_read(options.validate, inputs.targets, inputs.ranges):
        return
    if inputs.ranges is not None:
        checks.check_ranges_values(inputs.ranges, inputs.logit_lengths, max_targets)
    checks.check_labels(
        inputs.targets,
        inputs.target_lengths,
        blank=options.forbidden_label,
        vocab_size=inputs.weight.size(0),
    )


def _forward(inputs: FusedInputs, options: FusedOptions, plan: FusedPlan) -> FusedLoss:
    enc, vocab_size = inputs.enc, inputs.weight.size(0)
    _validate(inputs, options)
    num_columns = padded_vocab_size(enc, vocab_size)
    if num_columns > vocab_size:
        # A label in the padding must give a NaN loss, as any other label out of range does.
        targets = inputs.targets
        inputs = inputs._replace(targets=targets.masked_fill(targets >= vocab_size, -1))
    batch = _lattice_batch(inputs, plan)
    scores = CellScores.zeros(batch, enc.device)
    kept_logits = native.empty(plan.num_rows if plan.keep_logits else 0, num_columns, like=enc)
    with torch.autocast(enc.device.type, enabled=False):
        joint = _joint_tiles(inputs, options, batch, beside_kept=plan.keep_logits)
        for tile in joint.tiles():
            out = kept_logits[tile.begin : tile.begin + tile.size] if plan.keep_logits else None
            logits = joint.logits(joint.hidden(tile), out)
            stages.cell_scores(logits, batch, tile, options, scores)
    del joint  # frees its buffers before the lattice takes memory
    losses, use_blank, use_label = stages.lattice(
        scores, batch, options, with_uses=plan.with_uses, exact=enc.dtype == torch.float64
    )
    losses = losses.to(native.compute_dtype(enc.dtype))
    if not plan.with_uses:
        # Each from its own call: an operator may not return one tensor twice.
        per_row = use_blank.new_empty
        index = functools.partial(inputs.targets.new_empty, dtype=torch.int64)
        return FusedLoss(
            losses, per_row(0), per_row(0), per_row(0), index(0), index(0), kept_logits
        )
    rows, num_kept = stages.kept_rows(
        use_blank, use_label, batch, dropped_mass=options.dropped_mass
    )
    return FusedLoss(losses, scores.normalizer, use_blank, use_label, rows, num_kept, kept_logits)


def _fake(inputs: FusedInputs, options: FusedOptions, plan: FusedPlan) -> FusedLoss:
    enc, targets = inputs.enc, inputs.targets
    rows = plan.num_rows if plan.with_uses else 0
    per_row = functools.partial(enc.new_empty, rows, dtype=native.SCORE_DTYPE)
    index = functools.partial(targets.new_empty, dtype=torch.int64)
    return FusedLoss(
        enc.new_empty(targets.size(0), dtype=native.compute_dtype(enc.dtype)),
        per_row(),
        per_row(),
        per_row(),
        index(rows),
        index(targets.size(0) if plan.with_uses else 0),
        enc.new_empty(
            plan.num_rows if plan.keep_logits else 0, padded_vocab_size(enc, inputs.weight.size(0))
        ),
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
    posteriors = stages.Posteriors(saved.normalizer, saved.use_blank, saved.use_label, loss_grad)
    with torch.autocast(enc.device.type, enabled=False):
        joint = _joint_tiles(inputs, options, batch, beside_kept=False)
        joint.start_backward(call.wanted)
        # Reading the count synchronizes, which graph capture forbids; every row is visited then.
        may_wait = not native.is_capturing(enc.device)
        kept_rows = saved.rows[: int(saved.num_kept.sum())] if may_wait else None
        for tile in joint.tiles(kept_rows, whole_logits=plan.keep_logits):
            hidden = joint.hidden(tile)
            grad_logits = joint.buffer("logits", tile.size)
            logits = saved.logits if plan.keep_logits else joint.logits(hidden)
            stages.logits_grad(logits, batch, tile, options, posteriors, grad_logits)
            joint.backward(tile, hidden, grad_logits)
        return joint.gradients(scale)


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
