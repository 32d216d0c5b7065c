# SPDX-License-Identifier: Apache-2.0
"""Which R columns of each frame a pruned loss looks at; names and arguments are k2's."""

from __future__ import annotations

import torch
from torch import Tensor

from transducer_toolkit.ops import checks
from transducer_toolkit.ops.additive import pick_rows
from transducer_toolkit.ops.boundary import (
    boundary_or_everything,
    real_columns,
    real_frames,
)
from transducer_toolkit.ops.prune_windows import (
    feasible_width,
    greedy_starts,
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
    """The window of R columns that each frame keeps, from the posteriors of a simple loss.

    A window ``[s, s + R)`` of frame t has the mass::

        mass(t, s) = sum_{s <= u < s + R} py_grad(u, t) - px_grad(s - 1, t)

    terminations inside of it, minus symbols that enter it from below. A sequence of windows is
    feasible if the first real frame starts at ``s_begin``, starts never decrease, a step is at most
    ``R - 1`` for "regular" and 1 otherwise, and the last real frame starts at
    ``max(0, s_end - R + 1)``, or as close to it as such steps lead. "greedy" takes each frame's
    window of largest mass (of windows equal to about 1e-6 the lowest) and repairs the sequence: a
    start comes down to the lowest after it, then up as far as later frames need. "optimal" is the
    feasible sequence of largest total mass. Frames that are padding start at
    ``max(0, s_end - R + 1)``.

    Args:
        px_grad: (B, S, T + 1) or (B, S, T), floating; from ``return_grad=True``.
        py_grad: (B, S + 1, T), same dtype and device.
        boundary: (B, 4) as in :func:`~transducer_toolkit.rnnt_loss_simple`, or None. Reading a
            boundary on a device waits for that device.
        s_range: R, columns per frame. Raised, with a warning, to the least that fits all utterances
            (``max_b floor((U_b - 1) / T_b) + 2`` for "regular", 2 for "constrained", 1 if no
            utterance has symbols); then cut to S + 1.
        rnnt_type: "regular", "modified" or "constrained". None: the shape of px_grad says "regular"
            or "modified".
        method: "greedy" (k2's) or "optimal".

    Returns:
        (B, T, R) int64: the columns themselves, start + 0 ... R - 1, all in [0, S].

    Raises:
        TypeError: not a tensor, or a wrong dtype; s_range is not an int.
        ValueError: arguments that do not fit; names them, or the utterance.

    Example:
        >>> px_grad, py_grad = torch.zeros(1, 3, 5), torch.zeros(1, 4, 4)
        >>> px_grad[0, [0, 1, 2], [1, 2, 2]] = 1.0  # symbols at frames 1, 2, 2
        >>> py_grad[0, [0, 1, 3, 3], [0, 1, 2, 3]] = 1.0  # symbols behind when each frame ends
        >>> get_rnnt_prune_ranges(px_grad, py_grad, None, s_range=2)[0].tolist()
        [[0, 1], [0, 1], [1, 2], [2, 3]]

    Source:
        F. Kuang et al., "Pruned RNN-T for fast, memory-efficient ASR training", 2022, eq. 14-17.
    """
    topology = _check_arguments(px_grad, py_grad, boundary, s_range, rnnt_type, method)
    num_utterances, num_symbols = px_grad.shape[:2]
    num_frames = py_grad.size(2)
    boundary = boundary_or_everything(boundary, num_utterances, num_symbols, num_frames).cpu()
    checks.check_boundary_values(
        boundary, max_targets=num_symbols, max_frames=num_frames, min_frames=1
    )
    width = feasible_width(s_range, boundary, num_symbols, topology)
    step = width - 1 if topology.labels_share_frames else 1

    s_begin, t_begin, s_end, t_end = boundary.to(px_grad.device).unbind(1)
    padding = (s_end - width + 1).clamp(min=0)  # (B,)
    # A window wider than all columns from s_begin to s_end starts before s_begin.
    first = torch.minimum(s_begin, padding)
    last = torch.minimum(padding, first + step * (t_end - t_begin - 1))
    # No window of a NaN is better; and sums over frames stay numbers.
    mass = window_mass(px_grad, py_grad, width).nan_to_num().clamp(-1e30, 1e30)
    find = greedy_starts if method == "greedy" else optimal_starts
    starts = find(mass, t_begin, t_end, first, last, step)
    is_frame = real_frames(boundary, num_frames, px_grad.device)
    starts = torch.where(is_frame, starts, padding[:, None])
    return starts[:, :, None] + torch.arange(width, device=starts.device)


def do_rnnt_pruning(
    am: Tensor, lm: Tensor, ranges: Tensor, *, boundary: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Encoder and predictor rows of every cell in the band, for the joiner.

    ::

        am_pruned[b, t, r] = am[b, t]
        lm_pruned[b, t, r] = lm[b, ranges[b, t, r]]

    Args:
        am: (B, T, D), any dtype.
        lm: (B, S + 1, D'), any dtype, on the same device.
        ranges: (B, T, R) int32 or int64 columns in [0, S], from :func:`get_rnnt_prune_ranges`.
            Checked on the CPU.
        boundary: (B, 4) or None. With it the rows of padding are zero, in value and in gradient,
            whatever am and lm hold there: a joiner's matrix product would spread a NaN.

    Returns:
        am_pruned (B, T, R, D) and lm_pruned (B, T, R, D'). Without a boundary am_pruned is a view.

    Raises:
        TypeError: not a tensor, or a wrong dtype.
        ValueError: shapes, devices or columns that do not fit; names the utterance.

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
        "regular": (num_utterances, num_columns - 1, num_frames + 1),
        "modified": (num_utterances, num_columns - 1, num_frames),
    }
    shapes["constrained"] = shapes["modified"]
    if rnnt_type is None:
        rnnt_type = next((t for t in shapes if shapes[t] == tuple(px_grad.shape)), None)
        expected = f"{shapes['regular']} or {shapes['modified']}"
    else:
        get_topology(rnnt_type, "rnnt_type", k2=True)
        expected = f"{shapes[rnnt_type]} for rnnt_type {rnnt_type!r}"
    if rnnt_type is None or shapes[rnnt_type] != tuple(px_grad.shape):
        raise ValueError(
            f"px_grad: expected shape {expected} beside py_grad {tuple(py_grad.shape)}, "
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
