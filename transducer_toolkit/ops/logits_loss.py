# SPDX-License-Identifier: Apache-2.0
"""The operator of every loss that has logits: stages 1 and 2 forward, stage 3 backward."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from transducer_toolkit.ops import checks, durations, native, stages
from transducer_toolkit.ops.lattice import Band, CellScores, LatticeBatch, Lengths
from transducer_toolkit.ops.options import LossOptions
from transducer_toolkit.ops.registration import Backward, Derivative, Operator


class LogitsInputs(NamedTuple):
    """Tensors of :func:`logits_loss`.

    Attributes:
        logits: packed (cells, V), padded (B, T, U + 1, V), or, with ranges, band (B, T, R, V).
        targets: (B, U) integers.
        logit_lengths: (B,) integers.
        target_lengths: (B,) integers.
        ranges: (B, T, R) integers, the symbols of each frame's cells.
        begins: (B, 2) integers, symbol and frame at which each lattice begins; lengths count from
            there. Padded and band layout only.
        shape_index: LatticeShape.index of the lengths on the device of logits, if there is one.
        windows: (B, T, 2) integers, Restriction.windows for LatticeBatch; not with begins.
    """

    logits: Tensor
    targets: Tensor
    logit_lengths: Tensor
    target_lengths: Tensor
    ranges: Tensor | None = None
    begins: Tensor | None = None
    shape_index: Tensor | None = None
    windows: Tensor | None = None


class LogitsLoss(NamedTuple):
    """Result of :func:`logits_loss`.

    Attributes:
        losses: (B,) nats, differentiable; float64 for float64 logits and float32 otherwise.
        normalizer: (rows,) float64, logsumexp of each row of logits; for stage 3.
        use_blank: (rows,) float64, expected uses of each cell's blank score; rows as in the logits.
        use_label: (rows,) float64, expected uses of each cell's label score.
        use_extra: (rows, K) float64, expected uses of each cell's durations or big blanks; K = 0
            for other topologies.

    All but the losses have no elements if neither the caller nor backward needs them.
    """

    losses: Tensor
    normalizer: Tensor
    use_blank: Tensor
    use_label: Tensor
    use_extra: Tensor


class LogitsPlan(NamedTuple):
    """Whether the posteriors are wanted: for backward, or by the caller."""

    with_uses: bool


def logits_loss(
    inputs: LogitsInputs, options: LossOptions, *, inplace: bool = False, with_uses: bool = False
) -> LogitsLoss:
    """Returns transducer losses of any topology and layout; shapes and dtypes are checked already.

    Args:
        inputs: the tensors.
        options: the options.
        inplace: backward writes the gradient over the logits.
        with_uses: return the posteriors even without a gradient.

    Raises:
        ValueError: lengths, labels, boundary or ranges that do not fit, if validated.
        RuntimeError: no stage for this device in this build.
    """
    logits, ranges = inputs.logits, inputs.ranges
    native.require_supported_device(logits.device)
    checks.refuse_forward_mode(logits)
    with_grad = torch.is_grad_enabled() and logits.requires_grad
    contiguous = LogitsInputs(  # torch 2.4 cannot trace _replace
        logits.contiguous(),
        inputs.targets,
        inputs.logit_lengths,
        inputs.target_lengths,
        None if ranges is None else ranges.contiguous(),
        inputs.begins,
        inputs.shape_index,
        inputs.windows,
    )
    if inplace and with_grad:
        _check_inplace(logits)
        losses = _InplaceLogitsLoss.apply(options, *contiguous)
        nothing = losses.new_empty(0)
        return LogitsLoss(losses, nothing, nothing, nothing, nothing)
    return operator(contiguous, options, LogitsPlan(with_grad or with_uses))


def _check_inplace(logits: Tensor) -> None:
    kind = None
    if logits.is_leaf:
        kind = "a leaf"
    elif logits._is_view():
        kind = "a view (nn.Linear returns one for more than two dimensions: pack first)"
    elif not logits.is_contiguous():
        kind = "a tensor that is not contiguous"
    if kind is not None:
        raise ValueError(
            "inplace: expected logits that an operation has just made (contiguous, neither a leaf "
            f"nor a view), got {kind}"
        )


def most_frames(logits: Tensor, logit_lengths: Tensor) -> int:
    """Returns T of padded logits, or of packed logits whose lengths may be unchecked."""
    if logits.dim() == 4:
        return logits.size(1)
    # Bounded by the rows, so that no product of lengths can overflow.
    return min(max(int(logit_lengths.max()), 1), logits.size(0))


def _lattice_batch(inputs: LogitsInputs) -> LatticeBatch:
    logits = inputs.logits
    return LatticeBatch(
        Lengths(inputs.logit_lengths, inputs.target_lengths, inputs.shape_index),
        inputs.targets,
        num_rows=logits.shape[:-1].numel(),
        max_frames=most_frames(logits, inputs.logit_lengths),
        padded=logits.dim() == 4,
        band=Band.of(inputs.ranges),
        begins=inputs.begins,
        windows=inputs.windows,
    )


def _validate(inputs: LogitsInputs, options: LossOptions) -> None:
    logits, targets, logit_lengths, target_lengths, ranges, begins, *_ = inputs
    if not checks.may_read(options.validate, logit_lengths, target_lengths, begins):
        return
    max_frames = logits.size(1 if logits.dim() == 4 else 0)
    max_targets = targets.size(1)
    first_symbol = first_frame = None
    if begins is None:
        checks.check_lengths_fit(
            logit_lengths, target_lengths, max_frames=max_frames, max_targets=max_targets
        )
    else:
        lengths = torch.stack([target_lengths, logit_lengths], 1).to(begins)
        boundary = torch.cat([begins, begins + lengths], 1)
        checks.check_boundary_values(
            boundary, max_frames=max_frames, max_targets=max_targets, min_frames=1
        )
        first_symbol, first_frame = begins.unbind(1)
    checks.check_feasible(logit_lengths, target_lengths, options.arcs)
    if not checks.may_read(options.validate, targets, ranges):
        return
    if ranges is not None:
        checks.check_ranges_values(ranges, logit_lengths, max_targets, first_frame)
    checks.check_labels(
        targets,
        target_lengths,
        blank=None if options.blank_may_be_target else options.blank,
        num_big_blanks=options.arcs.num_big_blanks,
        vocab_size=options.vocab_size(logits.size(-1)),
        first=first_symbol,
        name="symbols" if options.blank_may_be_target else "targets",  # as k2 names them
    )


def _forward(inputs: LogitsInputs, options: LossOptions, plan: LogitsPlan) -> LogitsLoss:
    """Stages 1 and 2."""
    logits, lengths = inputs.logits, (inputs.logit_lengths, inputs.target_lengths)
    _validate(inputs, options)
    if logits.dim() == 2 and all(tensor.device.type == "cpu" for tensor in lengths):
        checks.check_packed_rows(*lengths, logits.size(0))
    batch = _lattice_batch(inputs)
    scores = CellScores.zeros(batch, logits.device, options.num_extra)
    stages.cell_scores(logits, batch, batch.all_rows(), options, scores)
    sums = durations.path_sums(
        scores, batch, options, with_uses=plan.with_uses, exact=logits.dtype == torch.float64
    )
    normalizer = scores.normalizer if plan.with_uses else scores.normalizer.new_empty(0)
    dtype = native.compute_dtype(logits.dtype)
    return LogitsLoss(sums.losses.to(dtype), normalizer, *sums[1:])


def _fake(inputs: LogitsInputs, options: LossOptions, plan: LogitsPlan) -> LogitsLoss:
    logits = inputs.logits
    # Not Size.numel(): it would turn symbolic sizes into numbers, and each shape into a recompile.
    num_rows = math.prod(logits.shape[:-1]) if plan.with_uses else 0
    losses = logits.new_empty(inputs.targets.size(0), dtype=native.compute_dtype(logits.dtype))
    per_row = functools.partial(logits.new_empty, dtype=native.SCORE_DTYPE)
    use_extra = per_row(num_rows, options.num_extra) if plan.with_uses else per_row(0)
    return LogitsLoss(losses, per_row(num_rows), per_row(num_rows), per_row(num_rows), use_extra)


def _write_gradient(
    inputs: LogitsInputs, options: LossOptions, uses: LogitsLoss, loss_grad: Tensor, out: Tensor
) -> None:
    """Stage 3."""
    batch = _lattice_batch(inputs)
    loss_grad = loss_grad.to(native.SCORE_DTYPE).contiguous()
    posteriors = stages.Posteriors(
        uses.normalizer, uses.use_blank, uses.use_label, loss_grad, uses.use_extra
    )
    stages.logits_grad(inputs.logits, batch, batch.all_rows(), options, posteriors, out)


def _backward(call: Backward) -> dict[str, Tensor]:
    logits = call.inputs.logits
    grad = native.empty(*logits.shape, like=logits)
    _write_gradient(call.inputs, call.options, call.outputs, call.grads["losses"], grad)
    return {"logits": grad}


operator = Operator(
    "transducer_loss",
    (LogitsInputs, LossOptions, LogitsPlan, LogitsLoss),
    forward=_forward,
    fake=_fake,
    derivative=Derivative(
        backward=_backward,
        of=("logits",),
        through=("losses",),
        unsaved=("losses",),
    ),
    functions="transducer_loss",
)


class _InplaceLogitsLoss(torch.autograd.Function):
    """The same stages; backward writes over the logits, which an operator may not do."""

    @staticmethod
    def forward(ctx: Any, options: LossOptions, *inputs: Any) -> Tensor:
        losses, *uses = _forward(
            LogitsInputs(*inputs), options, LogitsPlan(ctx.needs_input_grad[1])
        )
        ctx.save_for_backward(*inputs, *uses)
        ctx.options = options
        ctx.is_consumed = False
        return losses

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, loss_grad: Tensor) -> tuple[Tensor | None, ...]:
        # Autograd notices by itself if the logits were changed, also by our own first backward, but
        # not under saved-tensor hooks.
        if ctx.is_consumed:
            raise RuntimeError(
                "transducer_loss: inplace=True allows one backward; the logits were overwritten "
                "with their gradient (modified by an inplace operation)"
            )
        ctx.is_consumed = True
        saved = ctx.saved_tensors  # once: checkpointing unpacks at every look
        num_inputs = len(LogitsInputs._fields)
        inputs = LogitsInputs(*saved[:num_inputs])
        uses = LogitsLoss(loss_grad, *saved[num_inputs:])
        _write_gradient(inputs, ctx.options, uses, loss_grad, inputs.logits)
        torch.autograd.graph.increment_version(inputs.logits)
        return None, inputs.logits, *(None for _ in inputs[1:])
