# SPDX-License-Identifier: Apache-2.0
"""The operator that runs stage 2 on dense scores (B, T, U + 1), for the k2-compatible losses."""

from __future__ import annotations

import torch
from torch import Tensor

from transducer_toolkit.ops import checks, native, stages
from transducer_toolkit.ops.lattice import LatticeBatch


def lattice_losses(
    blank: Tensor,
    label: Tensor,
    boundary: Tensor,
    *,
    topology: str,
    open_end: bool,
    with_posteriors: bool,
    exact: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Stage 2 on dense scores; differentiable.

    Args:
        blank: (B, T, S + 1), any floating dtype and strides.
        label: (B, T, S), or (B, T + 1, S) with `open_end`.
        boundary: (B, 4) int64; values on the CPU are checked.
        topology: "regular", "modified" or "one_sym_per_frame".
        open_end: the path ends in frame t_end, which has label scores only, instead of with the
            arc that leaves frame t_end - 1.
        with_posteriors: needed for any gradient.
        exact: the scores come of float64 numbers (stages.lattice).

    Returns:
        Losses (B,), posteriors shaped like blank and like label, float64. The posteriors are not
        differentiable; without `with_posteriors` they have no elements.
    """
    losses, blank_posteriors, label_posteriors = torch.ops.transducer_toolkit.lattice_losses(
        blank, label, boundary, topology, open_end, with_posteriors, exact
    )
    return losses, blank_posteriors.detach(), label_posteriors.detach()


def _shift(scores: Tensor, frames: Tensor, columns: Tensor) -> Tensor:
    """out[b, t, u] = scores[b, t + frames[b], u + columns[b]]; 0 before the first row or column."""
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
    """False if no element is true, which is looked at where that waits for no device."""
    return not condition.is_cpu or bool(condition.any())


def _forward(
    blank: Tensor,
    label: Tensor,
    boundary: Tensor,
    topology: str,
    open_end: bool,
    with_posteriors: bool,
    exact: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    num_utterances, num_frames, num_columns = blank.shape
    if boundary.device.type == "cpu":
        checks.check_boundary_values(
            boundary, max_targets=num_columns - 1, max_frames=num_frames, min_frames=0
        )
    may_shift = boundary.device.type != "cpu" or bool(boundary[:, :2].any())
    s_begin, t_begin, s_end, t_end = boundary.to(blank.device).unbind(1)

    # One row more than frames if the path ends in frame T; labels get a column nobody reads.
    rows = num_frames + open_end
    shape = (num_utterances, rows, num_columns)
    blank_score, label_score = (blank.new_empty(shape, dtype=native.SCORE_DTYPE) for _ in range(2))
    blank_score[:, :num_frames] = blank
    label_score[:, : label.size(1), : num_columns - 1] = label
    label_score[:, :, num_columns - 1] = float("-inf")
    if open_end:
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
    batch = LatticeBatch(
        torch.where(possible, t_end - t_begin + open_end, -1),  # -1: NaN loss
        s_end - s_begin,
        boundary.new_zeros(num_utterances, num_columns - 1),  # stage 2 reads no targets
        num_rows=num_utterances * rows * num_columns,
        max_frames=rows,
        padded=True,
        device=blank.device,
    )
    losses, use_blank, use_label = stages.lattice(
        blank_score.flatten(),
        label_score.flatten(),
        batch,
        topology=topology,
        delay_penalty=0.0,
        fastemit_lambda=0.0,
        with_uses=with_posteriors,
        exact=exact,
    )
    # +inf is no score: its utterance is NaN, and says so.
    is_bad = losses == float("-inf")
    losses = losses.masked_fill(is_bad, float("nan"))
    if not with_posteriors:
        return losses, use_blank, use_label
    posteriors = [use_blank.view(shape), use_label.view(shape)]
    if _may_hold(is_bad):
        for posterior in posteriors:
            posterior.masked_fill_(is_bad[:, None, None], float("nan"))
    if may_shift:
        posteriors = [_shift(posterior, -t_begin, -s_begin) for posterior in posteriors]
    if open_end:  # the blank that leaves frame t_end is our own
        posteriors[0][utterances, end] = 0
    return (
        losses,
        posteriors[0][:, :num_frames].clone() if open_end else posteriors[0],
        posteriors[1][:, : label.size(1), : num_columns - 1].contiguous(),
    )


torch.library.custom_op(
    "transducer_toolkit::lattice_losses",
    _forward,
    mutates_args=(),
    schema="(Tensor blank, Tensor label, Tensor boundary, str topology, bool open_end, "
    "bool with_posteriors, bool exact) -> (Tensor, Tensor, Tensor)",
)


@torch.library.register_fake("transducer_toolkit::lattice_losses")
def _forward_fake(blank, label, boundary, topology, open_end, with_posteriors, exact):
    return (
        blank.new_empty(blank.size(0), dtype=native.SCORE_DTYPE),
        blank.new_empty(blank.shape if with_posteriors else 0, dtype=native.SCORE_DTYPE),
        blank.new_empty(label.shape if with_posteriors else 0, dtype=native.SCORE_DTYPE),
    )


def _backward(posteriors: Tensor, loss_grad: Tensor, like: Tensor) -> Tensor:
    """-posteriors * loss_grad in the dtype of `like`; 0 where loss_grad is, even beside NaN."""
    weight = -loss_grad[:, None, None]
    grad = posteriors * weight
    if _may_hold(loss_grad == 0):
        grad.masked_fill_(weight == 0, 0.0)
    return grad.to(like.dtype)


torch.library.custom_op(
    "transducer_toolkit::lattice_losses_backward",
    _backward,
    mutates_args=(),
    schema="(Tensor posteriors, Tensor loss_grad, Tensor like) -> Tensor",
)


@torch.library.register_fake("transducer_toolkit::lattice_losses_backward")
def _backward_fake(posteriors, loss_grad, like):
    return torch.empty_like(posteriors, dtype=like.dtype)


def _setup_context(ctx, inputs, output):
    # Of the scores only the dtype matters; an empty tensor carries it through the operator.
    ctx.save_for_backward(*output[1:], *(score.new_empty(0) for score in inputs[:2]))


def _differentiate(ctx, loss_grad, *_):
    *posteriors, like_blank, like_label = ctx.saved_tensors
    backward = torch.ops.transducer_toolkit.lattice_losses_backward
    grads = (
        backward(posterior, loss_grad, like) if is_needed else None
        for posterior, like, is_needed in zip(
            posteriors, (like_blank, like_label), ctx.needs_input_grad[:2], strict=True
        )
    )
    return *grads, None, None, None, None, None


def _refuse_second_derivative(ctx, grad):
    raise RuntimeError(
        "mutual_information_recursion, rnnt_loss_*: the gradient of the gradient "
        "(create_graph=True) is not implemented"
    )


torch.library.register_autograd(
    "transducer_toolkit::lattice_losses", _differentiate, setup_context=_setup_context
)
torch.library.register_autograd(
    "transducer_toolkit::lattice_losses_backward", _refuse_second_derivative
)


def posteriors_of_symbols_and_frames(
    label_posteriors: Tensor, blank_posteriors: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """(B, frames, S) and (B, T, S + 1) -> px_grad (B, S, frames), py_grad (B, S + 1, T)."""
    px_grad, py_grad = (
        posteriors.detach().transpose(1, 2).to(dtype).contiguous()
        for posteriors in (label_posteriors, blank_posteriors)
    )
    return px_grad, py_grad


def append_one(tensor: Tensor, dim: int, value: float = 0.0) -> Tensor:
    """Append one slice of ``value`` along ``dim``.

    torch 2.4's ``torch.nn.functional.pad`` refuses tensors that are empty along another axis.

    Args:
        tensor: any.
        dim: the axis that grows.
        value: of all new elements.

    Example:
        >>> append_one(torch.ones(2, 1), 1), append_one(torch.ones(2, 0), 0).shape
        (tensor([[1., 0.],
                [1., 0.]]), torch.Size([3, 0]))
    """
    shape = list(tensor.shape)
    shape[dim] = 1
    return torch.cat((tensor, tensor.new_full(shape, value)), dim)
