# SPDX-License-Identifier: Apache-2.0
"""Windows of symbols for the pruned loss: their masses, and the best feasible sequence."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from transducer_toolkit.ops import native
from transducer_toolkit.ops.topology import Topology


def _greedy_ranges(
    px_grad: Tensor, py_grad: Tensor, boundary: Tensor, width: int, step: int
) -> Tensor:
    """Returns the ranges (B, T, R) int64 of a feasible sequence of windows.

    The windows are close to the best one of each frame (csrc/prune_windows.h).
    """
    if px_grad.dtype != py_grad.dtype or px_grad.dtype not in native.DTYPES:
        px_grad, py_grad = (part.to(torch.float64) for part in (px_grad, py_grad))
    # The names keep the tensors alive.
    px, py, boundary = px_grad.contiguous(), py_grad.contiguous(), boundary.contiguous()
    num_utterances, num_symbols, px_frames = px.shape
    ranges = boundary.new_empty(num_utterances, py.size(2), width)
    with native.backend_of(px) as backend:
        backend.stages.prune_windows(
            native.extension.PrunePosteriors(
                dtype=native.DTYPES[px.dtype],
                num_utterances=num_utterances,
                num_symbols=num_symbols,
                num_frames=py.size(2),
                px_frames=px_frames,
                px=native.address(px),
                py=native.address(py),
                boundary=native.address(boundary),
            ),
            options=native.extension.PruneOptions(width=width, step=step),
            **backend.queue,
            ranges=native.address(ranges),
        )
    return ranges


# A custom operator, because torch.compile cannot trace a call of a stage.
torch.library.custom_op(
    "transducer_toolkit::greedy_ranges",
    _greedy_ranges,
    mutates_args=(),
    schema="(Tensor px_grad, Tensor py_grad, Tensor boundary, SymInt width, SymInt step) -> Tensor",
)


@torch.library.register_fake("transducer_toolkit::greedy_ranges")
def _greedy_ranges_fake(px_grad, py_grad, boundary, width, step):
    return boundary.new_empty(py_grad.size(0), py_grad.size(2), width)


def greedy_ranges(
    px_grad: Tensor, py_grad: Tensor, boundary: Tensor, width: int, step: int
) -> Tensor:
    """Returns the ranges (B, T, R) int64 of the method "greedy".

    Args:
        px_grad: as in :func:`~transducer_toolkit.get_rnnt_prune_ranges`.
        py_grad: as in :func:`~transducer_toolkit.get_rnnt_prune_ranges`.
        boundary: (B, 4) int64 on the same device.
        width: R.
        step: the largest increase of the start from frame to frame.
    """
    ranges: Tensor = torch.ops.transducer_toolkit.greedy_ranges(
        px_grad.detach(), py_grad.detach(), boundary, width, step
    )
    return ranges


def window_mass(px_grad: Tensor, py_grad: Tensor, width: int) -> Tensor:
    """Returns the mass of each window by frame and start, (B, T, S + 2 - R) float64."""
    blank = py_grad.detach().to(torch.float64)
    num_starts = blank.size(1) - width + 1
    mass = blank[:, :num_starts].clone()
    for column in range(1, width):
        mass += blank[:, column : column + num_starts]
    # Subtract the posterior of the symbol that enters the window. No symbol enters column 0.
    mass[:, 1:] -= px_grad.detach()[:, : num_starts - 1, : blank.size(2)]
    return mass.transpose(1, 2)


def optimal_starts(
    mass: Tensor, t_begin: Tensor, t_end: Tensor, first: Tensor, last: Tensor, step: int
) -> Tensor:
    """Returns the feasible sequence of largest total mass (B, T) int64, by dynamic programming.

    :func:`~transducer_toolkit.get_rnnt_prune_ranges` defines "feasible". Among equal predecessors
    it selects the lowest.

    Args:
        mass: (B, T, starts), from :func:`window_mass`.
        t_begin: (B,) the first real frame.
        t_end: (B,) the end of the real frames.
        first: (B,) the start of the first real frame.
        last: (B,) the start of the last real frame.
        step: the largest increase of the start from frame to frame.
    """
    num_utterances, num_frames, num_starts = mass.shape
    impossible = mass.new_full((num_utterances, num_starts), float("-inf"))
    everywhere = torch.arange(num_starts, device=mass.device)
    step = min(step, num_starts - 1)
    best = impossible  # total mass of the best sequence that ends in each start
    steps_back = []
    for t in range(num_frames):
        # The possible predecessors of start s are s - step, ..., s.
        padded = torch.nn.functional.pad(best, (step, 0), value=float("-inf"))
        came_from = padded.unfold(1, step + 1, 1)  # (B, starts, step + 1)
        choice = came_from.argmax(2)
        arrived = came_from.gather(2, choice[:, :, None]).squeeze(2) + mass[:, t]
        begun = torch.where(everywhere == first[:, None], mass[:, t], impossible)
        is_first, is_inside = t_begin == t, (t_begin < t) & (t_end > t)
        best = torch.where(is_first[:, None], begun, best)
        best = torch.where(is_inside[:, None], arrived, best)
        steps_back.append(torch.where(is_inside[:, None], step - choice, 0))
    start = last
    starts = []
    for t in range(num_frames - 1, -1, -1):
        starts.append(start)
        start = start - steps_back[t].gather(1, start[:, None]).squeeze(1)
    return torch.stack(starts[::-1], 1)


def feasible_width(s_range: int, boundary: Tensor, num_symbols: int, topology: Topology) -> int:
    """Returns R, raised to the minimum of all utterances with a warning, and at most S + 1.

    The boundary is on the CPU.
    """
    width, reason = s_range, ""
    for b, (s_begin, t_begin, s_end, t_end) in enumerate(boundary.tolist()):
        symbols, frames, needed = s_end - s_begin, t_end - t_begin, 1
        if topology.labels_share_frames:
            # T frames with an increase of at most R - 1 must reach column U: (R - 1) * T >= U.
            needed = (symbols - 1) // frames + 2
        elif topology.label_takes_blank:  # a label uses the blank of the next column
            needed += symbols > 0
        if needed > width:
            width, reason = needed, f"utterance {b} ({symbols} symbols, {frames} frames)"
    if reason:
        warnings.warn(
            f"s_range: {reason} needs at least {width} for rnnt_type {topology.name!r}, "
            f"got {s_range}: using {width}",
            stacklevel=3,
        )
    return min(width, num_symbols + 1)
