# SPDX-License-Identifier: Apache-2.0
"""The ``boundary`` and ``symbols`` of the k2-compatible losses: checks, defaults, what is padding.

A boundary row ``[s_begin, t_begin, s_end, t_end]`` says which part of ``(S symbols, T frames)`` an
utterance is: frames ``t_begin <= t < t_end``, columns ``s_begin <= s <= s_end``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from transducer_toolkit.ops import checks


def boundary_or_everything(
    boundary: Tensor | None, num_utterances: int, max_targets: int, max_frames: int
) -> Tensor:
    """`boundary` as int64 where it is; for None rows [0, 0, S, T] on the CPU."""
    if boundary is not None:
        return boundary.detach().to(torch.int64)
    # Not torch.tensor([...]): it would make symbolic sizes constants, and each shape a recompile.
    begin = torch.zeros(num_utterances, dtype=torch.int64)
    return torch.stack([begin, begin, begin + max_targets, begin + max_frames], 1)


def real_frames(boundary: Tensor, max_frames: int, device: torch.device) -> Tensor:
    """(B, T) bool: t_begin <= t < t_end."""
    frames = torch.arange(max_frames, device=device)
    begin, end = boundary[:, 1, None].to(device), boundary[:, 3, None].to(device)
    return (begin <= frames) & (frames < end)


def real_columns(boundary: Tensor, num_columns: int, device: torch.device) -> Tensor:
    """(B, S + 1) bool: s_begin <= s <= s_end, the contexts that an utterance visits."""
    columns = torch.arange(num_columns, device=device)
    begin, end = boundary[:, 0, None].to(device), boundary[:, 2, None].to(device)
    return (begin <= columns) & (columns <= end)


def _checked_symbols(
    symbols: Tensor, boundary: Tensor, max_frames: int, vocab_size: int, topology: str
) -> Tensor:
    """Symbols as indices that are safe to gather with: padding 0, what nobody could check clipped.

    With boundary and symbols on the CPU all values are checked (ValueErrors name the utterance);
    `topology` "" skips the check that a path exists.
    """
    if boundary.device.type == "cpu":
        checks.check_boundary_values(
            boundary, max_targets=symbols.size(1), max_frames=max_frames, min_frames=1
        )
        if topology:
            lengths = boundary[:, 2:] - boundary[:, :2]
            checks.check_feasible(lengths[:, 1], lengths[:, 0], topology)
    positions = torch.arange(symbols.size(1), device=symbols.device)
    begin, end = boundary[:, 0, None].to(symbols.device), boundary[:, 2, None].to(symbols.device)
    real = (begin <= positions) & (positions < end)  # (B, S)
    outside = (symbols < 0) | (symbols >= vocab_size)
    if symbols.device.type == boundary.device.type == "cpu" and bool((outside & real).any()):
        b, s = (int(i) for i in (outside & real).nonzero()[0])
        raise ValueError(
            f"symbols[{b}, {s}] (utterance {b}): expected a symbol in [0, {vocab_size}), "
            f"got {int(symbols[b, s])}"
        )
    return symbols.to(torch.int64).masked_fill(~real, 0).clamp(-1, vocab_size)


# An operator, so that reading the values does not break a torch.compile graph.
torch.library.custom_op(
    "transducer_toolkit::checked_symbols",
    _checked_symbols,
    mutates_args=(),
    schema="(Tensor symbols, Tensor boundary, SymInt max_frames, SymInt vocab_size, str topology) "
    "-> Tensor",
)


@torch.library.register_fake("transducer_toolkit::checked_symbols")
def _checked_symbols_fake(symbols, boundary, max_frames, vocab_size, topology):
    return symbols.new_empty(symbols.shape, dtype=torch.int64)


def checked_symbols(
    symbols: Tensor, boundary: Tensor, *, max_frames: int, vocab_size: int, topology: str = ""
) -> tuple[Tensor, Tensor | None]:
    """Symbols in [0, V) for gather (padding is 0), and which of them were invalid.

    The mask (B, S) is None where the values have been checked; an invalid symbol that could not be
    checked must give its utterance a NaN loss.

    Raises:
        ValueError: values on the CPU that are impossible; names the utterance.
    """
    safe: Tensor = torch.ops.transducer_toolkit.checked_symbols(
        symbols.detach(), boundary, max_frames, vocab_size, topology
    )
    if symbols.device.type == boundary.device.type == "cpu":
        return safe, None
    invalid = (safe < 0) | (safe >= vocab_size)
    return safe.masked_fill(invalid, 0), invalid
