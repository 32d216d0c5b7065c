# SPDX-License-Identifier: Apache-2.0
"""The operator under every loss that has logits: stages 1 and 2 forward, stage 3 backward."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from transducer_toolkit.ops import checks, native, stages
from transducer_toolkit.ops.lattice import CellScores, LatticeBatch


class LogitsLoss(NamedTuple):
    """What :func:`logits_loss` gives.

    Attributes:
        losses: (B,) nats, differentiable; float64 for float64 logits and float32 otherwise.
        use_blank: (rows,) float64, expected uses of each cell's blank score; rows as in the logits.
            No elements if nothing asked for it.
        use_label: (rows,) float64, the same of its label score.
    """

    losses: Tensor
    use_blank: Tensor
    use_label: Tensor


def logits_loss(
    logits: Tensor,
    targets: Tensor,
    logit_lengths: Tensor,
    target_lengths: Tensor,
    *,
    blank: int,
    topology: str,
    from_log_softmax: bool = False,
    fastemit_lambda: float = 0.0,
    delay_penalty: float = 0.0,
    clamp: float = 0.0,
    inplace: bool = False,
    validate: bool | None = None,
    blank_may_be_target: bool = False,
    ranges: Tensor | None = None,
    begins: Tensor | None = None,
    index: Tensor | None = None,
    with_uses: bool = False,
) -> LogitsLoss:
    """Transducer losses of any topology and layout; shapes, dtypes and options are checked already.

    Args:
        logits: packed (cells, V), padded (B, T, U + 1, V), or, with ranges, band (B, T, R, V).
        targets: (B, U).
        logit_lengths: (B,).
        target_lengths: (B,).
        blank: index of blank.
        topology: one of native.TOPOLOGIES.
        from_log_softmax, fastemit_lambda, delay_penalty, clamp, inplace, validate: as in
            :func:`~transducer_toolkit.transducer_loss`.
        blank_may_be_target: do not refuse labels equal to blank.
        ranges: (B, T, R) integers, the symbols of each frame's cells.
        begins: (B, 2) integers, symbol and frame at which each lattice begins; lengths count from
            there. Padded and band layout only.
        index: LatticeShape.index of the lengths on the device of logits, if there is one.
        with_uses: posteriors are wanted even without a gradient.

    Raises:
        ValueError: lengths, labels, boundary or ranges that do not fit, if validated.
        RuntimeError: no stage for this device in this build.
    """
    native.require_supported_device(logits.device)
    checks.refuse_forward_mode(logits)
    with_grad = torch.is_grad_enabled() and logits.requires_grad
    arguments = (
        logits.contiguous(),
        targets,
        logit_lengths,
        target_lengths,
        None if ranges is None else ranges.contiguous(),
        begins,
        index,
        blank,
        from_log_softmax,
        topology,
        float(fastemit_lambda),
        float(delay_penalty),
        float(clamp),
        validate,
        blank_may_be_target,
    )
    if inplace and with_grad:
        _check_inplace(logits)
        losses = _InplaceLogitsLoss.apply(*arguments)
        return LogitsLoss(losses, losses.new_empty(0), losses.new_empty(0))
    losses, _, use_blank, use_label = torch.ops.transducer_toolkit.transducer_loss(
        *arguments, with_grad or with_uses
    )
    return LogitsLoss(losses, use_blank, use_label)


def _check_inplace(logits: Tensor) -> None:
    what = None
    if logits.is_leaf:
        what = "a leaf"
    elif logits._is_view():
        what = "a view (so is what nn.Linear makes of more than two dimensions: pack first)"
    elif not logits.is_contiguous():
        what = "a tensor that is not contiguous"
    if what is not None:
        raise ValueError(
            "inplace: expected logits that an operation has just made (contiguous, neither a leaf "
            f"nor a view), got {what}"
        )


def _lattice_batch(
    logits: Tensor,
    targets: Tensor,
    logit_lengths: Tensor,
    target_lengths: Tensor,
    ranges: Tensor | None,
    begins: Tensor | None,
    index: Tensor | None,
) -> LatticeBatch:
    padded = logits.dim() == 4
    return LatticeBatch(
        logit_lengths,
        target_lengths,
        targets,
        num_rows=logits.shape[:-1].numel(),
        # Bounded by the rows, so that no product of lengths nobody checked can overflow.
        max_frames=logits.size(1)
        if padded
        else min(max(int(logit_lengths.max()), 1), logits.size(0)),
        padded=padded,
        device=logits.device,
        band_start=None if ranges is None else ranges[:, :, 0],
        band_width=0 if ranges is None else ranges.size(2),
        begins=begins,
        index=index,
    )


def _validate(
    logits: Tensor,
    targets: Tensor,
    logit_lengths: Tensor,
    target_lengths: Tensor,
    ranges: Tensor | None,
    begins: Tensor | None,
    blank: int | None,
    topology: str,
    validate: bool | None,
) -> None:
    if not checks.may_read(validate, logit_lengths, target_lengths, begins):
        return
    max_frames = logits.size(1 if logits.dim() == 4 else 0)
    sizes = {"max_frames": max_frames, "max_targets": targets.size(1)}
    first_symbol = first_frame = None
    if begins is None:
        checks.check_lengths_fit(logit_lengths, target_lengths, **sizes)
    else:
        lengths = torch.stack([target_lengths, logit_lengths], 1).to(begins)
        boundary = torch.cat([begins, begins + lengths], 1)
        checks.check_boundary_values(boundary, **sizes, min_frames=1)
        first_symbol, first_frame = begins.unbind(1)
    checks.check_feasible(logit_lengths, target_lengths, topology)
    if not checks.may_read(validate, targets, ranges):
        return
    if ranges is not None:
        checks.check_ranges_values(ranges, logit_lengths, targets.size(1), first_frame)
    checks.check_labels(
        targets,
        target_lengths,
        blank=blank,
        vocab_size=logits.size(-1),
        first=first_symbol,
        name="symbols" if blank is None else "targets",  # the k2 names go with k2's freedom
    )


def _forward(
    logits: Tensor,
    targets: Tensor,
    logit_lengths: Tensor,
    target_lengths: Tensor,
    ranges: Tensor | None,
    begins: Tensor | None,
    index: Tensor | None,
    blank: int,
    from_log_softmax: bool,
    topology: str,
    fastemit_lambda: float,
    delay_penalty: float,
    clamp: float,
    validate: bool | None,
    blank_may_be_target: bool,
    with_uses: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Stages 1 and 2: losses (B,), and what stage 3 needs per row (empty unless with_uses)."""
    indices = targets, logit_lengths, target_lengths, ranges, begins
    _validate(logits, *indices, None if blank_may_be_target else blank, topology, validate)
    if logits.dim() == 2 and logit_lengths.device.type == target_lengths.device.type == "cpu":
        checks.check_packed_rows(logit_lengths, target_lengths, logits.size(0))
    batch = _lattice_batch(logits, *indices, index)
    scores = CellScores(batch, logits.device)
    stages.cell_scores(
        logits, batch, batch.all_rows(), scores, blank=blank, from_log_softmax=from_log_softmax
    )
    losses, use_blank, use_label = stages.lattice(
        scores.blank,
        scores.label,
        batch,
        topology=topology,
        delay_penalty=delay_penalty,
        fastemit_lambda=fastemit_lambda,
        with_uses=with_uses,
        exact=logits.dtype == torch.float64,
    )
    normaliser = scores.normaliser if with_uses else scores.normaliser.new_empty(0)
    return losses.to(native.compute_dtype(logits.dtype)), normaliser, use_blank, use_label


_INPUTS = (
    "Tensor logits, Tensor targets, Tensor logit_lengths, Tensor target_lengths, Tensor? ranges, "
    "Tensor? begins, Tensor? index, int blank, bool from_log_softmax"
)

torch.library.custom_op(
    "transducer_toolkit::transducer_loss",
    _forward,
    mutates_args=(),
    schema=f"({_INPUTS}, str topology, float fastemit_lambda, float delay_penalty, float clamp, "
    "bool? validate, bool blank_may_be_target, bool with_uses) -> (Tensor, Tensor, Tensor, Tensor)",
)


@torch.library.register_fake("transducer_toolkit::transducer_loss")
def _forward_fake(logits, targets, *options):
    with_uses = options[-1]
    # Not Size.numel(): it would turn symbolic sizes into numbers, and each shape into a recompile.
    num_rows = math.prod(logits.shape[:-1]) if with_uses else 0
    losses = logits.new_empty(targets.size(0), dtype=native.compute_dtype(logits.dtype))
    return losses, *(logits.new_empty(num_rows, dtype=native.SCORE_DTYPE) for _ in range(3))


def _write_gradient(inputs, blank, from_log_softmax, clamp, for_stage_3, loss_grad, out):
    logits = inputs[0]
    batch = _lattice_batch(*inputs)
    stages.logits_grad(
        logits,
        batch,
        batch.all_rows(),
        *for_stage_3,
        loss_grad.to(native.SCORE_DTYPE).contiguous(),
        blank=blank,
        from_log_softmax=from_log_softmax,
        clamp=clamp,
        out=out,
    )


def _backward(
    logits: Tensor,
    targets: Tensor,
    logit_lengths: Tensor,
    target_lengths: Tensor,
    ranges: Tensor | None,
    begins: Tensor | None,
    index: Tensor | None,
    blank: int,
    from_log_softmax: bool,
    clamp: float,
    normaliser: Tensor,
    use_blank: Tensor,
    use_label: Tensor,
    loss_grad: Tensor,
) -> Tensor:
    """Stage 3: the gradient of the logits, in their layout."""
    inputs = logits, targets, logit_lengths, target_lengths, ranges, begins, index
    grad = native.empty(*logits.shape, like=logits)
    for_stage_3 = normaliser, use_blank, use_label
    _write_gradient(inputs, blank, from_log_softmax, clamp, for_stage_3, loss_grad, grad)
    return grad


torch.library.custom_op(
    "transducer_toolkit::transducer_loss_backward",
    _backward,
    mutates_args=(),
    schema=f"({_INPUTS}, float clamp, Tensor normaliser, Tensor use_blank, Tensor use_label, "
    "Tensor loss_grad) -> Tensor",
)


@torch.library.register_fake("transducer_toolkit::transducer_loss_backward")
def _backward_fake(logits, *arguments):
    return torch.empty_like(logits)


_NUM_TENSORS = 7  # of the operator's inputs, the optional ones included
_CLAMP = 12  # its place among them


def _setup_context(ctx, inputs, output):
    ctx.blank, ctx.from_log_softmax = inputs[_NUM_TENSORS : _NUM_TENSORS + 2]
    ctx.clamp = inputs[_CLAMP]
    ctx.save_for_backward(*inputs[:_NUM_TENSORS], *output[1:])


def _differentiate(ctx, loss_grad, *_):
    saved = ctx.saved_tensors  # once: checkpointing unpacks at every look
    inputs, for_stage_3 = saved[:_NUM_TENSORS], saved[_NUM_TENSORS:]
    grad = torch.ops.transducer_toolkit.transducer_loss_backward(
        *inputs, ctx.blank, ctx.from_log_softmax, ctx.clamp, *for_stage_3, loss_grad
    )
    return grad, *(None for _ in range(15))


torch.library.register_autograd(
    "transducer_toolkit::transducer_loss", _differentiate, setup_context=_setup_context
)


def _refuse_second_derivative(ctx, grad):
    raise RuntimeError(
        "transducer_loss: the gradient of the gradient (create_graph=True) is not implemented"
    )


torch.library.register_autograd(
    "transducer_toolkit::transducer_loss_backward", _refuse_second_derivative
)


class _InplaceLogitsLoss(torch.autograd.Function):
    """The same stages, backward writing over the logits (an operator may not do that)."""

    @staticmethod
    def forward(ctx, *arguments):
        losses, *for_stage_3 = _forward(*arguments, ctx.needs_input_grad[0])
        ctx.save_for_backward(*arguments[:_NUM_TENSORS], *for_stage_3)
        ctx.options = *arguments[_NUM_TENSORS : _NUM_TENSORS + 2], arguments[_CLAMP]
        ctx.is_consumed = False
        return losses

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, loss_grad):
        # Autograd notices by itself if the logits were changed, our own first backward included,
        # but not under saved-tensor hooks.
        if ctx.is_consumed:
            raise RuntimeError(
                "transducer_loss: inplace=True allows one backward; the logits were overwritten "
                "with their gradient (modified by an inplace operation)"
            )
        ctx.is_consumed = True
        saved = ctx.saved_tensors  # once: checkpointing unpacks at every look
        inputs, for_stage_3 = saved[:_NUM_TENSORS], saved[_NUM_TENSORS:]
        logits = inputs[0]
        _write_gradient(inputs, *ctx.options, for_stage_3, loss_grad, logits)
        torch.autograd.graph.increment_version(logits)
        return logits, *(None for _ in range(14))
