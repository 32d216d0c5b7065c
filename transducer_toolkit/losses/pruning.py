# SPDX-License-Identifier: Apache-2.0
"""Selection of the R columns of each frame for a pruned loss, with k2's names and arguments."""

from __future__ import annotations

import torch
from torch import Tensor

from transducer_toolkit.ops import checks, native
from transducer_toolkit.ops.additive import pick_rows
from transducer_toolkit.ops.boundary import (
    boundary_or_everything,
    real_columns,
    real_frames,
)
from transducer_toolkit.ops.prune_windows import (
    feasible_width,
    greedy_ranges,
    optimal_starts,
    window_mass,
)
from transducer_toolkit.ops.topology import K2_TOPOLOGIES, Topology, get_topology

METHODS = ("greedy", "optimal")


def get_rnnt_prune_ranges(
    px_grad: Tensor,
    py_grad: Tensor,
    boundary: Tensor | None,
    s_range: int,
    *,
    rnnt_type: str | None = None,
    method: str = "greedy",
) -> Tensor:
    """Selects a window of R columns for each frame, from the posteriors of a simple loss.

    The mass of a window ``[s, s + R)`` of frame t is the posterior of the termination symbols
    inside of it, minus the posterior of the symbol that enters it from the column below::

        mass(t, s) = sum_{s <= u < s + R} py_grad(u, t) - px_grad(s - 1, t)

    A sequence of windows is feasible if

    - the window of the first real frame starts at ``s_begin``;
    - from frame to frame, the start increases by 0 to ``R - 1`` ("regular") or by 0 or 1
      (otherwise);
    - the window of the last real frame starts at ``max(0, s_end - R + 1)``, or as close to it as
      such steps allow.

    The method "greedy" selects the window of largest mass for each frame. If several masses are
    equal within about 1e-6, it selects the lowest window. It then makes the sequence feasible: it
    lowers each start to the minimum of all later starts, and raises starts that are too low to
    reach a later one. The method "optimal" returns the feasible sequence of largest total mass.

    Windows of padding start at ``max(0, s_end - R + 1)``.

    Args:
        px_grad: (B, S, T + 1) or (B, S, T) floating, from a loss with ``return_grad=True``.
        py_grad: (B, S + 1, T), same dtype and device.
        boundary: (B, 4) as in :func:`~transducer_toolkit.rnnt_loss_simple`, or None. Reading a
            boundary on a device synchronizes with the device.
        s_range: R, columns per frame, at least 1. If R is too small for an utterance, it is raised,
            with a warning. The minimum is ``max_b floor((U_b - 1) / T_b) + 2`` for "regular" and 2
            for "constrained", or 1 if no utterance has symbols. R is at most S + 1.
        rnnt_type: "regular", "modified" or "constrained". None for "regular" or "modified",
            according to the shape of px_grad.
        method: "greedy", as in k2, or "optimal".

    Returns:
        (B, T, R) int64, the columns of each window: start, start + 1, ..., start + R - 1. All are
        in [0, S].

    Raises:
        TypeError: if an argument is not a tensor or has the wrong dtype, or s_range is not an int.
        ValueError: if shapes, devices or options do not fit, or the boundary is out of range;
            names the argument or the utterance.

    Example:
        >>> px_grad, py_grad = torch.zeros(1, 3, 5), torch.zeros(1, 4, 4)
        >>> px_grad[0, [0, 1, 2], [1, 2, 2]] = 1.0  # symbols at frames 1, 2, 2
        >>> py_grad[0, [0, 1, 3, 3], [0, 1, 2, 3]] = 1.0  # columns in which the frames end
        >>> get_rnnt_prune_ranges(px_grad, py_grad, None, s_range=2)[0].tolist()
        [[0, 1], [0, 1], [1, 2], [2, 3]]

    Source:
        F. Kuang et al., "Pruned RNN-T for fast, memory-efficient ASR training", 2022, eq. 14-17.
    """
    topology = _check_arguments(px_grad, py_grad, boundary, s_range, rnnt_type, method)
    num_utterances, num_symbols = px_grad.shape[:2]
    num_frames = py_grad.size(2)
    given = boundary_or_everything(boundary, num_utterances, num_symbols, num_frames)
    boundary = given.cpu()
    checks.check_boundary_values(
        boundary, max_targets=num_symbols, max_frames=num_frames, min_frames=1
    )
    width = feasible_width(s_range, boundary, num_symbols, topology)
    step = width - 1 if topology.labels_share_frames else 1
    there = native.to_device(given, px_grad.device)
    if method == "greedy":
        return greedy_ranges(px_grad, py_grad, there, width, step)

    s_begin, t_begin, s_end, t_end = there.unbind(1)
    padding = (s_end - width + 1).clamp(min=0)  # (B,)
    # A window wider than all columns from s_begin to s_end starts before s_begin.
    first = torch.minimum(s_begin, padding)
    last = torch.minimum(padding, first + step * (t_end - t_begin - 1))
    # NaN becomes 0, and infinities become finite, so that sums over frames stay finite.
    mass = window_mass(px_grad, py_grad, width).nan_to_num().clamp(-1e30, 1e30)
    starts = optimal_starts(mass, t_begin, t_end, first, last, step)
    is_frame = real_frames(there, num_frames, px_grad.device)
    starts = torch.where(is_frame, starts, padding[:, None])
    return starts[:, :, None] + torch.arange(width, device=starts.device)


def do_rnnt_pruning(
    am: Tensor, lm: Tensor, ranges: Tensor, *, boundary: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Returns the encoder and predictor rows of every cell in the band, for the joiner.

    ::

        am_pruned[b, t, r] = am[b, t]
        lm_pruned[b, t, r] = lm[b, ranges[b, t, r]]

    Args:
        am: (B, T, D), any dtype.
        lm: (B, S + 1, D'), any dtype, on the same device.
        ranges: (B, T, R) int32 or int64 columns in [0, S], from :func:`get_rnnt_prune_ranges`. The
            values are checked on the CPU only.
        boundary: (B, 4) as in :func:`~transducer_toolkit.rnnt_loss_simple`, or None. With a
            boundary, the rows of padding and their gradients are zero, even if am or lm contain
            NaN there. Without it, a NaN in padding would reach the weights of the joiner.

    Returns:
        am_pruned (B, T, R, D) and lm_pruned (B, T, R, D'). am_pruned is an expanded view.

    Raises:
        TypeError: if an argument is not a tensor, or ranges or boundary has the wrong dtype.
        ValueError: if shapes or devices do not match, or a column is out of range; names the
            argument or the utterance.

    Example:
        >>> am, lm = torch.zeros(1, 2, 4), torch.tensor([[[1.0], [2.0], [3.0]]])
        >>> am_pruned, lm_pruned = do_rnnt_pruning(am, lm, torch.tensor([[[0, 1], [1, 2]]]))
        >>> am_pruned.shape, lm_pruned.squeeze(-1)
        (torch.Size([1, 2, 2, 4]), tensor([[[1., 2.],
                 [2., 3.]]]))
    """
    _check_pruning_arguments(am, lm, ranges, boundary)
    num_utterances, num_frames, width = ranges.shape
    if boundary is not None:
        boundary = boundary_or_everything(boundary, num_utterances, lm.size(1) - 1, num_frames)
        am = am.masked_fill(~real_frames(boundary, num_frames, am.device)[:, :, None], 0)
        lm = lm.masked_fill(~real_columns(boundary, lm.size(1), lm.device)[:, :, None], 0)
    lm_pruned = pick_rows(lm, ranges.to(torch.int64).reshape(num_utterances, num_frames * width))
    lm_pruned = lm_pruned.reshape(num_utterances, num_frames, width, lm.size(2))
    if boundary is not None:
        is_frame = real_frames(boundary, num_frames, lm.device)
        lm_pruned = lm_pruned.masked_fill(~is_frame[:, :, None, None], 0)
    return am[:, :, None].expand(-1, -1, width, -1), lm_pruned


# --- checks -------------------------------------------------------------------------------------


def _check_arguments(
    px_grad: Tensor,
    py_grad: Tensor,
    boundary: Tensor | None,
    s_range: int,
    rnnt_type: str | None,
    method: str,
) -> Topology:
    """Checks everything but the values of the boundary; returns the topology."""
    if method not in METHODS:
        raise ValueError(f"method: expected one of {METHODS}, got {method!r}")
    checks.check_int(s_range, "s_range")
    if s_range < 1:
        raise ValueError(f"s_range: expected at least 1, got {s_range}")
    for name, tensor, axes in (
        ("px_grad", px_grad, "(B, S, T + 1) or (B, S, T)"),
        ("py_grad", py_grad, "(B, S + 1, T)"),
    ):
        checks.check_tensor(tensor, name)
        if not tensor.is_floating_point():
            raise TypeError(f"{name}: expected a floating dtype, got {tensor.dtype}")
        if tensor.dim() != 3 or tensor.size(0) == 0:
            raise ValueError(
                f"{name}: expected shape {axes} with B >= 1, got {tuple(tensor.shape)}"
            )
    if py_grad.device != px_grad.device:
        raise ValueError(
            f"py_grad: expected device {px_grad.device}, that of px_grad, got {py_grad.device}"
        )
    num_utterances, num_columns, num_frames = py_grad.shape
    shapes = {
        name: (num_utterances, num_columns - 1, num_frames + row.labels_share_frames)
        for name, row in K2_TOPOLOGIES.items()
    }
    if rnnt_type is None:
        rnnt_type = next((t for t in shapes if shapes[t] == tuple(px_grad.shape)), None)
        expected = f"{shapes['regular']} or {shapes['modified']}"
    else:
        get_topology(rnnt_type, "rnnt_type", k2=True)
        expected = f"{shapes[rnnt_type]} for rnnt_type {rnnt_type!r}"
    if rnnt_type is None or shapes[rnnt_type] != tuple(px_grad.shape):
        raise ValueError(
            f"px_grad: expected shape {expected} for py_grad {tuple(py_grad.shape)}, "
            f"got {tuple(px_grad.shape)}"
        )
    checks.check_boundary(boundary, num_utterances, px_grad.device)
    return K2_TOPOLOGIES[rnnt_type]


def _check_pruning_arguments(
    am: Tensor, lm: Tensor, ranges: Tensor, boundary: Tensor | None
) -> None:
    for name, tensor in (("am", am), ("lm", lm), ("ranges", ranges)):
        checks.check_tensor(tensor, name)
        if tensor.dim() != 3:
            axes = {"am": "(B, T, D)", "lm": "(B, S + 1, D)", "ranges": "(B, T, R)"}[name]
            raise ValueError(f"{name}: expected shape {axes}, got {tuple(tensor.shape)}")
        if tensor.device != am.device:
            raise ValueError(
                f"{name}: expected device {am.device}, that of am, got {tensor.device}"
            )
    checks.check_dtype(ranges, "ranges", checks.INDEX_DTYPES)
    if lm.size(0) != am.size(0):
        raise ValueError(f"lm: expected B = {am.size(0)}, that of am, got {tuple(lm.shape)}")
    if ranges.shape[:2] != am.shape[:2]:
        raise ValueError(
            f"ranges: expected shape ({am.size(0)}, {am.size(1)}, R), B and T from am, "
            f"got {tuple(ranges.shape)}"
        )
    checks.check_boundary(boundary, am.size(0), am.device)
    if ranges.device.type != "cpu" or torch.compiler.is_compiling():
        return
    if boundary is not None and boundary.device.type == "cpu":
        checks.check_boundary_values(
            boundary, max_targets=lm.size(1) - 1, max_frames=am.size(1), min_frames=0
        )
    outside = (ranges < 0) | (ranges >= lm.size(1))
    if bool(outside.any()):
        b, t, r = (int(i) for i in outside.nonzero()[0])
        raise ValueError(
            f"ranges[{b}, {t}, {r}] (utterance {b}): expected a column in [0, {lm.size(1) - 1}], "
            f"got {int(ranges[b, t, r])}"
        )
