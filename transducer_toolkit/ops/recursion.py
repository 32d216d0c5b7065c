# SPDX-License-Identifier: Apache-2.0
"""Stage 2 on dense scores (B, T, S + 1), as an operator, for mutual_information_recursion."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from transducer_toolkit.ops import checks, native, stages
from transducer_toolkit.ops.lattice import CellScores, LatticeBatch, Lengths
from transducer_toolkit.ops.options import LossOptions
from transducer_toolkit.ops.registration import Backward, Derivative, Operator


class DenseScores(NamedTuple):
    """Tensors of :func:`lattice_losses`.

    Attributes:
        blank: (B, T, S + 1) of any floating dtype, with any strides.
        label: (B, T, S), or (B, T + 1, S) with an open end.
        boundary: (B, 4) int64. Values on the CPU are checked.
    """

    blank: Tensor
    label: Tensor
    boundary: Tensor


@dataclass(frozen=True)
class RecursionOptions:
    """Options of :func:`lattice_losses`.

    Attributes:
        topology: a topology whose label arcs include no blank, so not "constrained".
        open_end: whether a path ends in cell (t_end, s_end), where frame t_end has label scores
            only. Otherwise it ends with the arc that leaves frame t_end - 1.
        exact: whether the scores were computed in float64 (see stages.lattice).
    """

    topology: str
    open_end: bool
    exact: bool


class RecursionPlan(NamedTuple):
    """Whether to compute the posteriors. Every gradient needs them."""

    with_posteriors: bool


class DenseLosses(NamedTuple):
    """Result of :func:`lattice_losses`.

    Attributes:
        losses: (B,) float64, differentiable.
        blank_posteriors: float64, with the shape of blank; not differentiable. Without
            with_posteriors it has no elements.
        label_posteriors: float64, with the shape of label; otherwise as blank_posteriors.
    """

    losses: Tensor
    blank_posteriors: Tensor
    label_posteriors: Tensor


def lattice_losses(
    scores: DenseScores, options: RecursionOptions, *, with_posteriors: bool
) -> DenseLosses:
    """Runs stage 2 on dense scores. The losses are differentiable."""
    losses, blank_posteriors, label_posteriors = operator(
        scores, options, RecursionPlan(with_posteriors)
    )
    return DenseLosses(losses, blank_posteriors.detach(), label_posteriors.detach())


def _shift(scores: Tensor, frames: Tensor, columns: Tensor) -> Tensor:
    """Returns out[b, t, u] = scores[b, t + frames[b], u + columns[b]].

    Elements before the first row or column are 0; those after the last repeat it.
    """
    _, num_rows, num_columns = scores.shape
    device = scores.device
    rows = torch.arange(num_rows, device=device) + frames[:, None]  # (B, T)
    cols = torch.arange(num_columns, device=device) + columns[:, None]  # (B, U)
    utterances = torch.arange(len(scores), device=device)[:, None, None]
    shifted = scores[
        utterances,
        rows.clamp(0, num_rows - 1)[:, :, None],
        cols.clamp(0, num_columns - 1)[:, None, :],
    ]
    return shifted.masked_fill_((rows < 0)[:, :, None] | (cols < 0)[:, None, :], 0)


def _may_hold(condition: Tensor) -> bool:
    """Returns whether an element is true. For a tensor on a device, returns True unread."""
    return not condition.is_cpu or bool(condition.any())


def _forward(scores: DenseScores, options: RecursionOptions, plan: RecursionPlan) -> DenseLosses:
    blank, label, boundary = scores
    num_utterances, num_frames, num_columns = blank.shape
    if boundary.device.type == "cpu":
        checks.check_boundary_values(
            boundary, max_targets=num_columns - 1, max_frames=num_frames, min_frames=0
        )
    may_shift = boundary.device.type != "cpu" or bool(boundary[:, :2].any())
    s_begin, t_begin, s_end, t_end = boundary.to(blank.device).unbind(1)

    # With an open end, there is one more row than frames. Labels get one more column, which is
    # never used.
    rows = num_frames + options.open_end
    shape = (num_utterances, rows, num_columns)
    blank_score, label_score = (blank.new_empty(shape, dtype=native.SCORE_DTYPE) for _ in range(2))
    blank_score[:, :num_frames] = blank
    label_score[:, : label.size(1), : num_columns - 1] = label
    label_score[:, :, num_columns - 1] = float("-inf")
    if options.open_end:
        blank_score[:, num_frames] = float("-inf")
        label_score[:, label.size(1) :] = float("-inf")
        utterances, end = torch.arange(num_utterances), t_end.clamp(0, num_frames)
        at_end = torch.arange(num_columns, device=blank.device) == s_end[:, None]
        blank_score[utterances, end] = torch.where(at_end, 0.0, float("-inf")).to(blank_score)
        if label.size(1) == num_frames:
            label_score[utterances, end] = float("-inf")
    if may_shift:
        blank_score, label_score = (
            _shift(score, t_begin, s_begin) for score in (blank_score, label_score)
        )

    possible = (s_begin >= 0) & (s_end < num_columns) & (t_begin >= 0) & (t_end <= num_frames)
    lengths = Lengths(
        torch.where(possible, t_end - t_begin + options.open_end, -1),  # -1: NaN loss
        s_end - s_begin,
    )
    batch = LatticeBatch(
        lengths,
        t_end.new_zeros(num_utterances, num_columns - 1),  # stage 2 reads no targets
        num_rows=num_utterances * rows * num_columns,
        max_frames=rows,
        padded=True,
    )
    flat = CellScores(blank_score.flatten(), label_score.flatten(), normalizer=blank_score)
    losses, use_blank, use_label = stages.lattice(
        flat,
        batch,
        LossOptions(blank=0, topology=options.topology),
        with_uses=plan.with_posteriors,
        exact=options.exact,
    )
    # A score of +inf is invalid, so the loss of its utterance becomes NaN.
    is_bad = losses == float("-inf")
    losses = losses.masked_fill(is_bad, float("nan"))
    if not plan.with_posteriors:
        return DenseLosses(losses, use_blank, use_label)
    posteriors = [use_blank.view(shape), use_label.view(shape)]
    if _may_hold(is_bad):
        for posterior in posteriors:
            posterior.masked_fill_(is_bad[:, None, None], float("nan"))
    if may_shift:
        posteriors = [_shift(posterior, -t_begin, -s_begin) for posterior in posteriors]
    if options.open_end:  # this function has added the blank that leaves frame t_end
        posteriors[0][utterances, end] = 0
    return DenseLosses(
        losses,
        posteriors[0][:, :num_frames].clone() if options.open_end else posteriors[0],
        posteriors[1][:, : label.size(1), : num_columns - 1].contiguous(),
    )


def _fake(scores: DenseScores, options: RecursionOptions, plan: RecursionPlan) -> DenseLosses:
    blank, label, _ = scores
    dtype = native.SCORE_DTYPE
    return DenseLosses(
        blank.new_empty(blank.size(0), dtype=dtype),
        blank.new_empty(blank.shape if plan.with_posteriors else 0, dtype=dtype),
        blank.new_empty(label.shape if plan.with_posteriors else 0, dtype=dtype),
    )


def _backward(call: Backward) -> dict[str, Tensor]:
    """Returns -posteriors * loss_grad in the dtype of the scores.

    The gradient is 0 if loss_grad is 0, even if the posteriors are NaN.
    """
    weight = -call.grads["losses"][:, None, None]
    posteriors = {"blank": call.outputs.blank_posteriors, "label": call.outputs.label_posteriors}
    grads = {}
    for name in call.wanted:
        grad = posteriors[name] * weight
        if _may_hold(weight == 0):
            grad.masked_fill_(weight == 0, 0.0)
        grads[name] = grad.to(getattr(call.inputs, name).dtype)
    return grads


operator = Operator(
    "lattice_losses",
    (DenseScores, RecursionOptions, RecursionPlan, DenseLosses),
    forward=_forward,
    fake=_fake,
    derivative=Derivative(
        backward=_backward,
        of=("blank", "label"),
        through=("losses",),
        unsaved=("blank", "label", "boundary", "losses"),
        shapes={"blank": "blank_posteriors", "label": "label_posteriors"},
    ),
    functions="mutual_information_recursion, joint_mutual_information_recursion",
)


def posteriors_of_symbols_and_frames(
    label_posteriors: Tensor,
    blank_posteriors: Tensor,
    dtype: torch.dtype,
    *,
    behind_the_end: bool = False,
) -> tuple[Tensor, Tensor]:
    """Returns px_grad (B, S, frames) and py_grad (B, S + 1, T), the transposed posteriors.

    With `behind_the_end`, px_grad has one more column, which is zero.
    """

    def transposed(posteriors: Tensor, num_more: int) -> Tensor:
        num_utterances, num_frames, num_columns = posteriors.shape
        size = num_utterances, num_columns, num_frames + num_more
        out = posteriors.new_empty(size, dtype=dtype)
        if num_more:
            out[:, :, num_frames:] = 0
        out[:, :, :num_frames] = posteriors.detach().transpose(1, 2)
        return out

    return transposed(label_posteriors, int(behind_the_end)), transposed(blank_posteriors, 0)


def append_one(tensor: Tensor, dim: int, value: float = 0.0) -> Tensor:
    """Appends one slice of ``value`` along ``dim``.

    ``torch.nn.functional.pad`` of torch 2.4 rejects tensors that are empty along another axis.

    Args:
        tensor: a tensor of any shape.
        dim: the axis along which the slice is appended.
        value: the value of all new elements.

    Returns:
        The larger tensor.

    Example:
        >>> append_one(torch.ones(2, 1), 1), append_one(torch.ones(2, 0), 0).shape
        (tensor([[1., 0.],
                [1., 0.]]), torch.Size([3, 0]))
    """
    shape = list(tensor.shape)
    shape[dim] = 1
    return torch.cat((tensor, tensor.new_full(shape, value)), dim)
