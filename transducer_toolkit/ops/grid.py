# SPDX-License-Identifier: Apache-2.0
"""The k2-compatible losses of padded logits (B, T, S + 1, V), and of a band (B, T, R, V)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from transducer_toolkit.ops import checks, native
from transducer_toolkit.ops.boundary import (
    boundary_or_everything,
    checked_symbols,
    real_columns,
    real_frames,
)
from transducer_toolkit.ops.logits_loss import LogitsInputs, logits_loss
from transducer_toolkit.ops.options import LossOptions
from transducer_toolkit.ops.recursion import append_one
from transducer_toolkit.ops.topology import TOPOLOGIES


class GridInputs(NamedTuple):
    """Tensors of the losses of padded logits.

    Attributes:
        logits: (B, T, S + 1, V), or (B, T, R, V) with ranges.
        symbols: (B, S) integers.
        boundary: (B, 4) integers, or None.
        ranges: (B, T, R) integers, the columns of each frame, or None for all columns.
    """

    logits: Tensor
    symbols: Tensor
    boundary: Tensor | None
    ranges: Tensor | None = None

    def check(self, termination_symbol: int) -> None:
        """Checks types, shapes, dtypes and devices.

        Raises:
            TypeError: if an argument is not a tensor, or has the wrong dtype.
            ValueError: if a shape, a device or the termination symbol does not fit.
        """
        logits, symbols, boundary, ranges = self
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

    def whole_boundary(self) -> Tensor:
        """Returns the boundary (B, 4) int64; without one, that of the whole grid."""
        num_utterances, num_frames = self.logits.shape[:2]
        return boundary_or_everything(
            self.boundary, num_utterances, self.symbols.size(1), num_frames
        )


def grid_loss(
    inputs: GridInputs, options: LossOptions, *, return_grad: bool
) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """Returns the losses (B,) and the posteriors (px_grad, py_grad), or None for the latter."""
    logits, symbols, boundary, ranges = inputs
    whole = inputs.whole_boundary()
    s_begin, t_begin, s_end, t_end = whole.unbind(1)
    result = logits_loss(
        LogitsInputs(
            logits,
            symbols,
            t_end - t_begin,
            s_end - s_begin,
            ranges=ranges,
            begins=None if boundary is None else whole[:, :2],
        ),
        options,
        with_uses=return_grad,
    )
    if not return_grad:
        return result.losses, None
    topology = TOPOLOGIES[options.topology]
    grid = logits.shape[:-1]  # (B, T, S + 1) or (B, T, R)
    # FastEmit scales the uses of labels by 1 + fastemit_lambda, but posteriors are not scaled.
    label = result.use_label.detach().view(grid) / (1 + options.fastemit_lambda)
    blank = result.use_blank.detach().view(grid)
    if topology.label_takes_blank:  # subtract the uses of blank scores by label arcs
        forced = torch.nn.functional.pad(label[:, :, :-1], (1, 0))
        blank = blank - (1 + options.fastemit_lambda) * forced
    if ranges is not None:
        everything = label.new_zeros(*grid[:2], symbols.size(1) + 1)
        is_frame = real_frames(whole, grid[1], logits.device)[:, :, None]
        columns = ranges.to(torch.int64).masked_fill(~is_frame, 0)
        label, blank = (everything.scatter_add(2, columns, part) for part in (label, blank))
    px_grad, py_grad = label[:, :, :-1].transpose(1, 2), blank.transpose(1, 2)
    if topology.labels_share_frames:  # k2 has a column for symbols after the last frame
        px_grad = append_one(px_grad, 2)
    dtype = result.losses.dtype
    return result.losses, (px_grad.to(dtype).contiguous(), py_grad.to(dtype).contiguous())


def grid_logprobs(inputs: GridInputs, options: LossOptions) -> tuple[Tensor, Tensor]:
    """Returns px and py in plain torch, with -inf outside of the lattice and the band."""
    logits, symbols, _, ranges = inputs
    num_utterances, num_frames, _, vocab_size = logits.shape
    num_symbols = symbols.size(1)
    whole = inputs.whole_boundary()
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
    normalizer = x.logsumexp(-1)
    blank = x[..., options.blank] - normalizer
    label = x.gather(3, next_symbol[..., None]).squeeze(3) - normalizer
    blank, label = (scores.masked_fill(~is_cell, -torch.inf) for scores in (blank, label))
    if ranges is not None:
        nowhere = x.new_full((num_utterances, num_frames, num_symbols + 1), -torch.inf)
        blank, label = (nowhere.scatter(2, columns, scores) for scores in (blank, label))
    label = label[:, :, :-1]  # (B, T, S)
    if invalid is not None:
        label = label.masked_fill(invalid[:, None], torch.nan)
    positions = torch.arange(num_symbols, device=logits.device)
    label = label.masked_fill(positions >= whole[:, 2, None, None].to(logits.device), -torch.inf)
    topology = TOPOLOGIES[options.topology]
    if topology.label_takes_blank:
        label = label + blank[:, :, 1:]
    px, py = label.transpose(1, 2), blank.transpose(1, 2)
    if topology.labels_share_frames:
        px = append_one(px, 2, -torch.inf)
    return px.contiguous(), py.contiguous()
