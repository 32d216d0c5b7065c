# SPDX-License-Identifier: Apache-2.0
"""The full transducer loss of every topology on padded logits; names and arguments are k2's."""

from __future__ import annotations

import torch
from torch import Tensor

from transducer_toolkit.ops import checks, native
from transducer_toolkit.ops.boundary import (
    boundary_or_everything,
    check_rnnt_type,
    checked_symbols,
    real_columns,
    real_frames,
)
from transducer_toolkit.ops.checks import check_reduction, reduce_losses
from transducer_toolkit.ops.logits_loss import logits_loss
from transducer_toolkit.ops.recursion import append_one

LossAndGrads = tuple[Tensor, tuple[Tensor, Tensor]]


def rnnt_loss(
    logits: Tensor,
    symbols: Tensor,
    termination_symbol: int,
    boundary: Tensor | None = None,
    rnnt_type: str = "regular",
    delay_penalty: float = 0.0,
    reduction: str = "mean",
    return_grad: bool = False,
    *,
    fastemit_lambda: float = 0.0,
) -> Tensor | LossAndGrads:
    """Transducer loss of padded logits, regular, modified or constrained.

    The stages of :func:`~transducer_toolkit.transducer_loss` under k2's names. The topologies are
    those of :func:`~transducer_toolkit.rnnt_loss_simple`; "modified" and "constrained" may end with
    a symbol on the last frame.

    Args:
        logits: (B, T, S + 1, V) joiner outputs, float16, bfloat16, float32 or float64,
            unnormalised. -inf means probability zero.
        symbols: (B, S) int32 or int64 in [0, V), on the device of logits.
        termination_symbol: the blank, in [0, V).
        boundary: (B, 4) int32 or int64 rows ``[s_begin, t_begin, s_end, t_end]``, on the CPU or
            the device of logits; None means ``[0, 0, S, T]``. What stands outside does not matter.
        rnnt_type: "regular", "modified" or "constrained".
        delay_penalty: >= 0; adds ``delay_penalty * ((t_end - 1) / 2 - t)`` to the score of every
            symbol at frame t.
        reduction: "none" (B,), "mean" over utterances, or "sum".
        return_grad: also return posteriors.
        fastemit_lambda: as in :func:`~transducer_toolkit.transducer_loss`; not in k2.

    Returns:
        As :func:`~transducer_toolkit.rnnt_loss_simple`.

    Raises:
        TypeError: not a tensor, or a wrong dtype.
        ValueError: arguments that do not fit, and impossible values on the CPU; names the argument
            or utterance, what was expected and what came.
        RuntimeError: no stage for this device in this build; a second derivative.

    Example:
        >>> import torch
        >>> rnnt_loss(torch.zeros(1, 4, 3, 5), torch.tensor([[1, 2]]), termination_symbol=0)
        tensor(7.3540)

    Source:
        As :func:`~transducer_toolkit.rnnt_loss_simple`.
    """
    return joint_loss(
        logits, symbols, None, termination_symbol, boundary, rnnt_type, delay_penalty, reduction,
        return_grad, fastemit_lambda,
    )  # fmt: skip


def get_rnnt_logprobs_joint(
    logits: Tensor,
    symbols: Tensor,
    termination_symbol: int,
    boundary: Tensor | None = None,
    rnnt_type: str = "regular",
) -> tuple[Tensor, Tensor]:
    """Scores of :func:`rnnt_loss` in the form of ``mutual_information_recursion``.

    In plain torch, with a temporary of the logits' size: the losses themselves do not use it.

    Args:
        logits: (B, T, S + 1, V), as in :func:`rnnt_loss`; and so on.
        symbols: (B, S), likewise.
        termination_symbol: likewise.
        boundary: likewise.
        rnnt_type: likewise.

    Returns:
        As :func:`~transducer_toolkit.get_rnnt_logprobs`.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`rnnt_loss`.

    Example:
        >>> import torch
        >>> symbols = torch.tensor([[1, 2]])
        >>> px, py = get_rnnt_logprobs_joint(torch.zeros(1, 4, 3, 5), symbols, 0)
        >>> px.shape, py.shape
        (torch.Size([1, 2, 5]), torch.Size([1, 3, 4]))
    """
    return joint_logprobs(logits, symbols, None, termination_symbol, boundary, rnnt_type)


def joint_loss(
    logits: Tensor,
    symbols: Tensor,
    ranges: Tensor | None,
    termination_symbol: int,
    boundary: Tensor | None,
    rnnt_type: str,
    delay_penalty: float,
    reduction: str,
    return_grad: bool,
    fastemit_lambda: float,
) -> Tensor | LossAndGrads:
    """:func:`rnnt_loss`; with ranges :func:`~transducer_toolkit.rnnt_loss_pruned`."""
    check_reduction(reduction)
    checks.check_options(fastemit_lambda, delay_penalty)
    checks.check_flag(return_grad, "return_grad")
    _check_arguments(logits, symbols, ranges, termination_symbol, boundary, rnnt_type)
    whole = boundary_or_everything(boundary, logits.size(0), symbols.size(1), logits.size(1))
    s_begin, t_begin, s_end, t_end = whole.unbind(1)
    losses, use_blank, use_label = logits_loss(
        logits,
        symbols,
        t_end - t_begin,
        s_end - s_begin,
        blank=termination_symbol,
        topology=rnnt_type,
        delay_penalty=delay_penalty,
        fastemit_lambda=fastemit_lambda,
        blank_may_be_target=True,
        ranges=ranges,
        begins=None if boundary is None else whole[:, :2],
        with_uses=return_grad,
    )
    loss = reduce_losses(losses, reduction)
    if not return_grad:
        return loss
    grid = logits.shape[:-1]  # (B, T, S + 1) or (B, T, R)
    # Arc posteriors are not scaled, uses are.
    label = use_label.detach().view(grid) / (1 + fastemit_lambda)
    blank = use_blank.detach().view(grid)
    if rnnt_type == "constrained":  # without the blank that a label drags along
        forced = torch.nn.functional.pad(label[:, :, :-1], (1, 0))
        blank = blank - (1 + fastemit_lambda) * forced
    if ranges is not None:
        everything = label.new_zeros(*grid[:2], symbols.size(1) + 1)
        is_frame = real_frames(whole, grid[1], logits.device)[:, :, None]
        columns = ranges.to(torch.int64).masked_fill(~is_frame, 0)
        label, blank = (everything.scatter_add(2, columns, part) for part in (label, blank))
    px_grad, py_grad = label[:, :, :-1].transpose(1, 2), blank.transpose(1, 2)
    if rnnt_type == "regular":  # no symbol after the last frame
        px_grad = append_one(px_grad, 2)
    px_grad, py_grad = (part.to(losses.dtype).contiguous() for part in (px_grad, py_grad))
    return loss, (px_grad, py_grad)


def joint_logprobs(
    logits: Tensor,
    symbols: Tensor,
    ranges: Tensor | None,
    termination_symbol: int,
    boundary: Tensor | None,
    rnnt_type: str,
) -> tuple[Tensor, Tensor]:
    """px and py of padded logits, or, with ranges, of those in the band; -inf outside."""
    _check_arguments(logits, symbols, ranges, termination_symbol, boundary, rnnt_type)
    num_utterances, num_frames, _, vocab_size = logits.shape
    num_symbols = symbols.size(1)
    whole = boundary_or_everything(boundary, num_utterances, num_symbols, num_frames)
    safe, invalid = checked_symbols(symbols, whole, max_frames=num_frames, vocab_size=vocab_size)
    if ranges is not None and ranges.device.type == whole.device.type == "cpu":
        first, end = whole[:, 1], whole[:, 3]
        checks.check_ranges_values(ranges, end - first, num_symbols, first)
    is_frame = real_frames(whole, num_frames, logits.device)[:, :, None]  # (B, T, 1)
    is_column = real_columns(whole, num_symbols + 1, logits.device)[:, None]  # (B, 1, S + 1)
    next_symbol = torch.nn.functional.pad(safe, (0, 1))[:, None].expand(-1, num_frames, -1)
    is_cell = (is_frame & is_column).expand(-1, num_frames, -1)
    if ranges is not None:
        columns = ranges.to(torch.int64).masked_fill(~is_frame, 0)
        next_symbol, is_cell = next_symbol.gather(2, columns), is_cell.gather(2, columns)
    x = logits.to(native.compute_dtype(logits.dtype)).masked_fill(~is_cell[..., None], 0)
    normaliser = x.logsumexp(-1)
    blank = x[..., termination_symbol] - normaliser
    label = x.gather(3, next_symbol[..., None]).squeeze(3) - normaliser
    blank, label = (scores.masked_fill(~is_cell, -torch.inf) for scores in (blank, label))
    if ranges is not None:
        nowhere = x.new_full((num_utterances, num_frames, num_symbols + 1), -torch.inf)
        blank, label = (nowhere.scatter(2, columns, scores) for scores in (blank, label))
    label = label[:, :, :-1]  # (B, T, S)
    if invalid is not None:
        label = label.masked_fill(invalid[:, None], torch.nan)
    positions = torch.arange(num_symbols, device=logits.device)
    label = label.masked_fill(positions >= whole[:, 2, None, None].to(logits.device), -torch.inf)
    if rnnt_type == "constrained":
        label = label + blank[:, :, 1:]
    px, py = label.transpose(1, 2), blank.transpose(1, 2)
    if rnnt_type == "regular":
        px = append_one(px, 2, -torch.inf)
    return px.contiguous(), py.contiguous()


def _check_arguments(
    logits: Tensor,
    symbols: Tensor,
    ranges: Tensor | None,
    termination_symbol: int,
    boundary: Tensor | None,
    rnnt_type: str,
) -> None:
    check_rnnt_type(rnnt_type)
    checks.check_tensor(logits, "logits")
    checks.check_dtype(logits, "logits", native.SUPPORTED_DTYPES)
    checks.check_tensor(symbols, "symbols")
    checks.check_dtype(symbols, "symbols", checks.INDEX_DTYPES)
    if symbols.dim() != 2 or symbols.size(0) == 0:
        raise ValueError(f"symbols: expected shape (B, S), B >= 1, got {tuple(symbols.shape)}")
    if logits.dim() != 4:
        layout = "(B, T, S + 1, V)" if ranges is None else "(B, T, R, V)"
        raise ValueError(f"logits: expected shape {layout}, got {tuple(logits.shape)}")
    num_utterances, num_frames, columns, vocab_size = logits.shape
    checks.check_ranges(ranges, num_utterances, num_frames, logits.device)
    expected = symbols.size(1) + 1 if ranges is None else ranges.size(2)
    if (num_utterances, columns) != (symbols.size(0), expected) or num_frames == 0:
        raise ValueError(
            f"logits: expected shape ({symbols.size(0)}, T, {expected}, V), T >= 1, "
            f"got {tuple(logits.shape)}"
        )
    if symbols.device != logits.device:
        raise ValueError(
            f"symbols: expected device {logits.device}, that of logits, got {symbols.device}"
        )
    checks.check_blank(termination_symbol, vocab_size, "termination_symbol")
    checks.check_boundary(boundary, num_utterances, logits.device)
