# SPDX-License-Identifier: Apache-2.0
"""The operator under fused_joiner_loss: a joiner's tiles through stages 1 to 3."""

from __future__ import annotations

import torch
from torch import Tensor

from transducer_toolkit import native
from transducer_toolkit.joint_tiles import JointTiles, padded_vocab_size
from transducer_toolkit.losses import checks


def _lattice_batch(
    enc: Tensor,
    targets: Tensor,
    logit_lengths: Tensor,
    target_lengths: Tensor,
    ranges: Tensor | None,
    index: Tensor | None,
    num_rows: int,
    skip: Tensor | None = None,
) -> native.LatticeBatch:
    return native.LatticeBatch(
        logit_lengths,
        target_lengths,
        targets,
        num_rows=num_rows,
        max_frames=enc.size(1),
        padded=False,
        device=enc.device,
        band_start=None if ranges is None else ranges[:, :, 0],
        band_width=0 if ranges is None else ranges.size(2),
        index=index,
        skip=skip,
    )


def _forward(
    enc: Tensor,
    pred: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    logit_lengths: Tensor,
    target_lengths: Tensor,
    ranges: Tensor | None,
    index: Tensor | None,
    num_rows: int,
    blank: int,
    activation: str,
    topology: str,
    fastemit_lambda: float,
    delay_penalty: float,
    clamp: float,
    dropped_mass: float,
    tile_cells: int,
    validate: bool | None,
    keep_logits: bool,
    with_uses: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Losses (B,); per row normaliser and uses; the rows to visit in backward; their number (B,).

    Last the logits (rows, padded V), empty unless keep_logits; all but these and the losses are
    empty unless with_uses. Of the rows to visit the first num_kept.sum() elements count.
    """
    checks.check_lengths_fit(
        logit_lengths, target_lengths, max_frames=enc.size(1), max_targets=targets.size(1)
    )
    if validate is not False:
        checks.check_feasible(logit_lengths, target_lengths, topology)
    if checks.may_read(validate, targets, ranges):
        if ranges is not None:
            checks.check_ranges_values(ranges, logit_lengths, targets.size(1))
        checks.check_labels(targets, target_lengths, blank=blank, vocab_size=weight.size(0))
    num_columns = padded_vocab_size(enc, weight.size(0))
    if num_columns > weight.size(0):
        # A column without a symbol is as much out of range as those behind it: a NaN loss.
        targets = targets.masked_fill(targets >= weight.size(0), -1)
    batch = _lattice_batch(enc, targets, logit_lengths, target_lengths, ranges, index, num_rows)
    scores = native.CellScores(batch, enc.device)
    kept_logits = native.empty(num_rows if keep_logits else 0, num_columns, like=enc)
    with torch.autocast(enc.device.type, enabled=False):
        joint = JointTiles(
            *(enc, pred, weight, bias, batch),
            activation=activation,
            tile_cells=tile_cells,
            beside_kept=keep_logits,
            pads_vocab=True,
        )
        for tile in joint.tiles():
            out = kept_logits[tile.begin : tile.begin + tile.size] if keep_logits else None
            logits = joint.logits(joint.hidden(tile), out)
            native.cell_scores(logits, batch, tile, scores, blank=blank)
    del joint  # its buffers, before the lattice takes memory
    losses, use_blank, use_label = native.lattice(
        scores.blank,
        scores.label,
        batch,
        topology=topology,
        delay_penalty=delay_penalty,
        fastemit_lambda=fastemit_lambda,
        with_uses=with_uses,
        exact=enc.dtype == torch.float64,
    )
    losses = losses.to(native.compute_dtype(enc.dtype))
    if not with_uses:
        nothing = targets.new_empty(0, dtype=torch.int64)
        empty = (use_blank.clone(), use_blank.clone(), use_label, nothing, nothing.clone())
        return losses, *empty, kept_logits
    rows, num_kept = native.kept_rows(use_blank, use_label, batch, dropped_mass=dropped_mass)
    return losses, scores.normaliser, use_blank, use_label, rows, num_kept, kept_logits


def _backward(
    enc: Tensor,
    pred: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    logit_lengths: Tensor,
    target_lengths: Tensor,
    ranges: Tensor | None,
    index: Tensor | None,
    normaliser: Tensor,
    use_blank: Tensor,
    use_label: Tensor,
    rows: Tensor,
    num_kept: Tensor,
    kept_logits: Tensor,
    loss_grad: Tensor,
    blank: int,
    activation: str,
    clamp: float,
    tile_cells: int,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of enc, pred, weight and bias; empty where not wanted."""
    loss_grad = loss_grad.to(native.SCORE_DTYPE).contiguous()
    # An utterance that the caller masked out may hold NaN, and 0 * NaN is not zero.
    lattices = targets, logit_lengths, target_lengths, ranges, index, normaliser.numel()
    batch = _lattice_batch(enc, *lattices, skip=loss_grad == 0)
    scale = None
    if enc.dtype == torch.float16:
        # A loss scale of 65536 would overflow the tiles: it comes back in after the products.
        largest = loss_grad.abs().max()
        scale = largest.masked_fill(~((largest > 0) & largest.isfinite()), 1.0)
        loss_grad = loss_grad / scale
        scale = scale.to(torch.float32)
    with torch.autocast(enc.device.type, enabled=False):
        joint = JointTiles(
            *(enc, pred, weight, bias, batch),
            activation=activation,
            tile_cells=tile_cells,
            pads_vocab=True,
        )
        joint.start_backward(tuple(wanted))
        # The number of kept rows is waited for; where nobody may wait, all rows are visited.
        waits = not native.is_capturing(enc.device)
        is_kept = len(kept_logits) > 0
        kept_rows = rows[: int(num_kept.sum())] if waits else None
        for tile in joint.tiles(kept_rows, whole_logits=is_kept):
            hidden = joint.hidden(tile)
            grad_logits = joint.buffer("logits", tile.size)
            native.logits_grad(
                kept_logits if is_kept else joint.logits(hidden),
                batch,
                tile,
                normaliser,
                use_blank,
                use_label,
                loss_grad,
                blank=blank,
                clamp=clamp,
                out=grad_logits,
            )
            joint.backward(tile, hidden, grad_logits)
        grads = joint.gradients(scale)
    return tuple(enc.new_empty(0) if grad is None else grad for grad in grads)  # type: ignore


_TENSORS = (
    "Tensor enc, Tensor pred, Tensor weight, Tensor? bias, Tensor targets, Tensor logit_lengths, "
    "Tensor target_lengths, Tensor? ranges, Tensor? index"
)
_NUM_TENSORS = 9

torch.library.custom_op(
    "transducer_toolkit::fused_joiner_loss",
    _forward,
    mutates_args=(),
    schema=f"({_TENSORS}, SymInt num_rows, int blank, str activation, str topology, "
    "float fastemit_lambda, float delay_penalty, float clamp, float dropped_mass, int tile_cells, "
    "bool? validate, bool keep_logits, bool with_uses) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
torch.library.custom_op(
    "transducer_toolkit::fused_joiner_loss_backward",
    _backward,
    mutates_args=(),
    schema=f"({_TENSORS}, Tensor normaliser, Tensor use_blank, Tensor use_label, Tensor rows, "
    "Tensor num_kept, Tensor kept_logits, Tensor loss_grad, int blank, str activation, "
    "float clamp, int tile_cells, bool[] wanted) -> (Tensor, Tensor, Tensor, Tensor)",
)


@torch.library.register_fake("transducer_toolkit::fused_joiner_loss")
def _forward_fake(enc, pred, weight, bias, targets, logit_lengths, target_lengths, *options):
    num_rows, keep_logits, with_uses = options[2], options[-2], options[-1]
    losses = enc.new_empty(targets.size(0), dtype=native.compute_dtype(enc.dtype))
    rows = num_rows if with_uses else 0
    per_row = (enc.new_empty(rows, dtype=native.SCORE_DTYPE) for _ in range(3))
    counts = targets.size(0) if with_uses else 0
    return (
        losses,
        *per_row,
        targets.new_empty(rows, dtype=torch.int64),
        targets.new_empty(counts, dtype=torch.int64),
        enc.new_empty(num_rows if keep_logits else 0, padded_vocab_size(enc, weight.size(0))),
    )


@torch.library.register_fake("transducer_toolkit::fused_joiner_loss_backward")
def _backward_fake(enc, pred, weight, bias, *arguments):
    return tuple(
        torch.empty_like(tensor) if is_wanted else enc.new_empty(0)
        for tensor, is_wanted in zip((enc, pred, weight, bias), arguments[-1], strict=True)
    )


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:_NUM_TENSORS], *output[1:])
    _, ctx.blank, ctx.activation, _, _, _, ctx.clamp, _, ctx.tile_cells, *_ = inputs[_NUM_TENSORS:]
    ctx.set_materialize_grads(False)


def _differentiate(ctx, loss_grad, *_):
    wanted = [bool(needed) for needed in ctx.needs_input_grad[:4]]
    nothing = (None,) * (_NUM_TENSORS + 12)
    if loss_grad is None:
        return nothing
    grads = torch.ops.transducer_toolkit.fused_joiner_loss_backward(
        *ctx.saved_tensors,
        loss_grad,
        ctx.blank,
        ctx.activation,
        ctx.clamp,
        ctx.tile_cells,
        wanted,
    )
    inputs = (grad if is_wanted else None for grad, is_wanted in zip(grads, wanted, strict=True))
    return *inputs, *nothing[4:]


torch.library.register_autograd(
    "transducer_toolkit::fused_joiner_loss", _differentiate, setup_context=_setup_context
)


def _refuse_second_derivative(ctx, *grads):
    raise RuntimeError(
        "fused_joiner_loss: the gradient of the gradient (create_graph=True) is not implemented"
    )


torch.library.register_autograd(
    "transducer_toolkit::fused_joiner_loss_backward", _refuse_second_derivative
)

fused_losses = torch.ops.transducer_toolkit.fused_joiner_loss
