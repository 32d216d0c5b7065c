# SPDX-License-Identifier: Apache-2.0
"""Windows of symbols for the pruned loss: their masses, and the best feasible sequence."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from transducer_toolkit.ops.topology import Topology

# Several windows of a frame may contain all of the mass. Rounding of float32 posteriors makes their
# masses differ in the seventh digit, so differences below this value are ignored.
EQUAL_MASS = 2.0**-20


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


def _lowest_from_here_on(values: Tensor) -> Tensor:
    """Returns out[b, t] = min over t' >= t of values[b, t']."""
    return values.flip(1).cummin(1).values.flip(1)


def greedy_starts(
    mass: Tensor, t_begin: Tensor, t_end: Tensor, first: Tensor, last: Tensor, step: int
) -> Tensor:
    """Returns a feasible sequence of starts, close to the best window of each frame.

    :func:`~transducer_toolkit.get_rnnt_prune_ranges` defines "feasible".

    Args:
        mass: (B, T, starts), from :func:`window_mass`.
        t_begin: (B,) the first real frame.
        t_end: (B,) the end of the real frames.
        first: (B,) the start of the first real frame.
        last: (B,) the start of the last real frame.
        step: the largest increase of the start from frame to frame.

    Returns:
        (B, T) int64 starts, meaningless in padding.
    """
    frames = torch.arange(mass.size(1), device=mass.device)
    starts = torch.round(mass / EQUAL_MASS).argmax(2)  # argmax returns the lowest of equal starts
    # The start of the last real frame is fixed. It is an upper bound for the frames before it.
    starts = torch.where(frames < t_end[:, None] - 1, starts, last[:, None])
    starts = torch.maximum(_lowest_from_here_on(starts), first[:, None])
    # If no increase is above `step`, then step * t - start never decreases.
    slack = _lowest_from_here_on(step * frames - starts)
    # The first real frame starts at `first`, so frame t starts at most step * (t - t_begin) later.
    return torch.minimum(step * frames - slack, first[:, None] + step * (frames - t_begin[:, None]))


def optimal_starts(
    mass: Tensor, t_begin: Tensor, t_end: Tensor, first: Tensor, last: Tensor, step: int
) -> Tensor:
    """Returns the feasible sequence of largest total mass (B, T), by dynamic programming.

    Among equal predecessors it selects the lowest. The arguments are those of
    :func:`greedy_starts`.
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
    """Returns R, raised to the minimum of all utterances with a warning, and at most S + 1."""
    symbols, frames = (boundary[:, 2:] - boundary[:, :2]).unbind(1)
    needed = torch.ones_like(symbols)
    if topology.labels_share_frames:
        # T frames with an increase of at most R - 1 must reach column U: (R - 1) * T >= U.
        needed = torch.div(symbols - 1, frames, rounding_mode="floor") + 2
    elif topology.label_takes_blank:  # a label uses the blank of the next column
        needed = needed + (symbols > 0)
    utterance = int(needed.argmax())
    width = max(s_range, int(needed[utterance]))
    if width > s_range:
        warnings.warn(
            f"s_range: utterance {utterance} ({int(symbols[utterance])} symbols, "
            f"{int(frames[utterance])} frames) needs at least {width} for rnnt_type "
            f"{topology.name!r}, got {s_range}: using {width}",
            stacklevel=3,
        )
    return min(width, num_symbols + 1)
