# SPDX-License-Identifier: Apache-2.0
"""Checks, defaults and masks of ``boundary`` and ``symbols`` in the k2-compatible losses.

A boundary row ``[s_begin, t_begin, s_end, t_end]`` selects the part of ``(S symbols, T frames)``
that belongs to an utterance: frames ``t_begin <= t < t_end``, columns ``s_begin <= s <= s_end``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from transducer_toolkit.ops import checks


def boundary_or_everything(
    boundary: Tensor | None, num_utterances: int, max_targets: int, max_frames: int
) -> Tensor:
    """Returns `boundary` as int64 on its device; for None, rows [0, 0, S, T] on the CPU."""
    if boundary is not None:
        return boundary.detach().to(torch.int64)
    # torch.tensor([...]) would turn symbolic sizes into constants, so that torch.compile would
    # recompile for each shape.
    begin = torch.zeros(num_utterances, dtype=torch.int64)
    return torch.stack([begin, begin, begin + max_targets, begin + max_frames], 1)


def real_frames(boundary: Tensor, max_frames: int, device: torch.device) -> Tensor:
    """Returns the mask of the frames of each utterance, (B, T) bool: t_begin <= t < t_end."""
    frames = torch.arange(max_frames, device=device)
    begin, end = boundary[:, 1, None].to(device), boundary[:, 3, None].to(device)
    return (begin <= frames) & (frames < end)


def real_columns(boundary: Tensor, num_columns: int, device: torch.device) -> Tensor:
    """Returns the mask of the columns of each utterance, (B, S + 1): s_begin <= s <= s_end."""
    columns = torch.arange(num_columns, device=device)
    begin, end = boundary[:, 0, None].to(device), boundary[:, 2, None].to(device)
    return (begin <= columns) & (columns <= end)


def check_symbols(
    symbols: Tensor, boundary: Tensor, *, max_frames: int, vocab_size: int, topology: str = ""
) -> None:
    """Raises a ValueError that names the utterance if a value on the CPU is out of range.

    With topology "", the existence of a path is not checked. Symbols are checked if the boundary is
    on the CPU, too.
    """
    if boundary.device.type != "cpu":
        return
    checks.check_boundary_values(
        boundary, max_targets=symbols.size(1), max_frames=max_frames, min_frames=1
    )
    if topology:
        lengths = boundary[:, 2:] - boundary[:, :2]
        checks.check_feasible(lengths[:, 1], lengths[:, 0], topology)
    if symbols.device.type != "cpu":
        return
    outside = (symbols < 0) | (symbols >= vocab_size)
    if not bool(outside.any()):
        return
    outside &= real_symbols(symbols, boundary)
    if bool(outside.any()):
        b, s = (int(i) for i in outside.nonzero()[0])
        raise ValueError(
            f"symbols[{b}, {s}] (utterance {b}): expected a symbol in [0, {vocab_size}), "
            f"got {int(symbols[b, s])}"
        )


def real_symbols(symbols: Tensor, boundary: Tensor) -> Tensor:
    """Returns the mask of the symbols of each utterance, (B, S): s_begin <= s < s_end."""
    positions = torch.arange(symbols.size(1), device=symbols.device)
    begin, end = boundary[:, 0, None].to(symbols.device), boundary[:, 2, None].to(symbols.device)
    return (begin <= positions) & (positions < end)


def _checked_symbols(symbols: Tensor, boundary: Tensor, max_frames: int, vocab_size: int) -> Tensor:
    """Checks the symbols; returns them with 0 in padding, clamped to [-1, V]."""
    check_symbols(symbols, boundary, max_frames=max_frames, vocab_size=vocab_size)
    is_padding = ~real_symbols(symbols, boundary)
    return symbols.to(torch.int64).masked_fill(is_padding, 0).clamp(-1, vocab_size)


# A custom operator, because reading the values would break the graph of torch.compile.
torch.library.custom_op(
    "transducer_toolkit::checked_symbols",
    _checked_symbols,
    mutates_args=(),
    schema="(Tensor symbols, Tensor boundary, SymInt max_frames, SymInt vocab_size) -> Tensor",
)


@torch.library.register_fake("transducer_toolkit::checked_symbols")
def _checked_symbols_fake(symbols, boundary, max_frames, vocab_size):
    return symbols.new_empty(symbols.shape, dtype=torch.int64)


def checked_symbols(
    symbols: Tensor, boundary: Tensor, *, max_frames: int, vocab_size: int
) -> tuple[Tensor, Tensor | None]:
    """Returns symbols in [0, V), which are safe for gather, and a mask of the invalid symbols.

    Padding and invalid symbols become 0. The mask (B, S) is None if the values have been checked.
    Otherwise the caller must set the loss of an utterance with an invalid symbol to NaN.

    Raises:
        ValueError: if a value on the CPU is out of range; names the utterance.
    """
    safe: Tensor = torch.ops.transducer_toolkit.checked_symbols(
        symbols.detach(), boundary, max_frames, vocab_size
    )
    if symbols.device.type == boundary.device.type == "cpu":
        return safe, None
    invalid = (safe < 0) | (safe >= vocab_size)
    return safe.masked_fill(invalid, 0), invalid
