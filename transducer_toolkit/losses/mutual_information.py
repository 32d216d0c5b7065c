# SPDX-License-Identifier: Apache-2.0
"""The forward-backward recursion of the k2-compatible losses, on symbol and frame scores."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from transducer_toolkit.ops import checks, native
from transducer_toolkit.ops.boundary import boundary_or_everything
from transducer_toolkit.ops.recursion import (
    DenseScores,
    RecursionOptions,
    lattice_losses,
    posteriors_of_symbols_and_frames,
)

_DTYPES = (torch.float32, torch.float64)


def mutual_information_recursion(
    px: Tensor, py: Tensor, boundary: Tensor | None = None, return_grad: bool = False
) -> Tensor | tuple[Tensor, tuple[Tensor, Tensor]]:
    """Computes the log of the total score of all monotonic paths through symbols and frames.

    With ``p[s_begin, t_begin] = 0``, the recursion is::

        regular:  p[s, t] = logadd(p[s-1, t  ] + px[s-1, t  ], p[s, t-1] + py[s, t-1])
        modified: p[s, t] = logadd(p[s-1, t-1] + px[s-1, t-1], p[s, t-1] + py[s, t-1])

    Terms outside of the grid are omitted. The result is ``p[s_end, t_end]``. The recursion runs in
    float64 for every dtype.

    Args:
        px: (B, S, T + 1) for the regular recursion or (B, S, T) for the modified one, float32 or
            float64; px[b, s, t] is the score of symbol s after t frames. The last column of the
            regular form contains the scores of symbols after the last frame. Fill it with -inf to
            forbid such symbols.
        py: (B, S + 1, T), same dtype and device; after s symbols, py[b, s, t] is the score of the
            step from frame t to frame t + 1.
        boundary: (B, 4) int32 or int64 rows ``[s_begin, t_begin, s_end, t_end]``, on the CPU or
            the device of px; None for ``[0, 0, S, T]``. px and py outside of the boundary may hold
            any value. A boundary on the CPU is checked.
        return_grad: also return the derivatives of the scores' sum, which are posteriors.

    Returns:
        Scores (B,) in nats, with the dtype of px. An utterance without a path has score -inf and
        zero gradient. With ``return_grad``, a pair of the scores and ``(px_grad, py_grad)``, which
        have the shapes of px and py.

    Raises:
        TypeError: if an argument is not a tensor, or has the wrong dtype.
        ValueError: if shapes or devices do not match, or a boundary is out of range; names the
            argument or the utterance.
        RuntimeError: if this build has no stages for the device, or on a second derivative.

    Example:
        >>> px, py = torch.zeros(1, 2, 4), torch.zeros(1, 3, 3)
        >>> score = mutual_information_recursion(px, py)
        >>> round(score.exp().item(), 4)  # number of paths of 2 symbols and 3 frames: 5 choose 2
        10.0
        >>> _, (px_grad, py_grad) = mutual_information_recursion(px, py, return_grad=True)
        >>> round(px_grad.sum().item(), 4), round(py_grad.sum().item(), 4)  # symbols and frames
        (2.0, 3.0)

    Source:
        F. Kuang et al., "Pruned RNN-T for fast, memory-efficient ASR training", 2022, eq. 4 and 5.
    """
    topology = _check_arguments(px, py, boundary, "px", "py")
    checks.check_flag(return_grad, "return_grad")
    boundary = boundary_or_everything(boundary, px.size(0), px.size(1), py.size(2))
    with_uses = return_grad or (torch.is_grad_enabled() and (px.requires_grad or py.requires_grad))
    losses, blank_posteriors, label_posteriors = lattice_losses(
        DenseScores(py.transpose(1, 2), px.transpose(1, 2), boundary),
        RecursionOptions(topology, open_end=True, exact=px.dtype == torch.float64),
        with_posteriors=with_uses,
    )
    scores = -losses.to(px.dtype)
    if not return_grad:
        return scores
    return scores, posteriors_of_symbols_and_frames(label_posteriors, blank_posteriors, px.dtype)


def joint_mutual_information_recursion(
    px: Sequence[Tensor], py: Sequence[Tensor], boundary: Tensor | None = None
) -> Tensor:
    """Splits :func:`mutual_information_recursion` of a sum of scores into one term per summand.

    Let ``score`` be the result of the recursion on ``sum_n px[n], sum_n py[n]``, and ``px_grad,
    py_grad`` its posteriors. The terms are::

        expected[n] = sum(px_grad * px[n]) + sum(py_grad * py[n])
        term[0] = expected[0] + score - sum_n expected[n]
        term[n] = expected[n]                                         n > 0

    The terms add up to the score. The first term contains the entropy of the paths, which is the
    difference between the score and the expected score of a path.

    Backward treats the posteriors as constants, so the gradient of each px[n] is px_grad. This
    equals the derivative of the score.

    Args:
        px: N >= 1 tensors, each as in :func:`mutual_information_recursion`.
        py: N tensors, each as in :func:`mutual_information_recursion`.
        boundary: as in :func:`mutual_information_recursion`.

    Returns:
        Terms (N, B) in nats, with the dtype of px.

    Raises:
        TypeError: if px or py is not a sequence of tensors, or has the wrong dtype.
        ValueError: if px or py is empty, their lengths differ, or shapes or devices do not match.
        RuntimeError: as in :func:`mutual_information_recursion`.

    Example:
        >>> px, py = torch.rand(2, 1, 2, 4), torch.rand(2, 1, 3, 3)
        >>> terms = joint_mutual_information_recursion(list(px), list(py))
        >>> score = mutual_information_recursion(px.sum(0), py.sum(0))
        >>> terms.shape, torch.allclose(terms.sum(0), score)
        (torch.Size([2, 1]), True)
    """
    for name, value in (("px", px), ("py", py)):
        if isinstance(value, Tensor) or not isinstance(value, Sequence):
            raise TypeError(
                f"{name}: expected a sequence of torch.Tensor, got {type(value).__name__}"
            )
    if not px or len(px) != len(py):
        raise ValueError(
            f"px, py: expected the same number of tensors, at least 1, got {len(px)} and {len(py)}"
        )
    for n, (one_px, one_py) in enumerate(zip(px, py, strict=True)):
        topology = _check_arguments(one_px, one_py, boundary, f"px[{n}]", f"py[{n}]")
        for name, one, first in (("px", one_px, px[0]), ("py", one_py, py[0])):
            if one.shape != first.shape or one.dtype != first.dtype or one.device != first.device:
                raise ValueError(
                    f"{name}[{n}]: expected shape {tuple(first.shape)}, {first.dtype}, "
                    f"{first.device} as of {name}[0], got {tuple(one.shape)}, {one.dtype}, "
                    f"{one.device}"
                )
    boundary = boundary_or_everything(boundary, px[0].size(0), px[0].size(1), py[0].size(2))
    all_px, all_py = (torch.stack(list(scores)).double() for scores in (px, py))
    with torch.no_grad():
        losses, blank_posteriors, label_posteriors = lattice_losses(
            DenseScores(all_py.sum(0).transpose(1, 2), all_px.sum(0).transpose(1, 2), boundary),
            RecursionOptions(topology, open_end=True, exact=px[0].dtype == torch.float64),
            with_posteriors=True,
        )
    terms = _expectation(label_posteriors.transpose(1, 2), all_px) + _expectation(
        blank_posteriors.transpose(1, 2), all_py
    )  # (N, B)
    offset = -losses - terms.detach().sum(0)
    terms = torch.cat([terms[:1] + offset, terms[1:]])
    return terms.to(px[0].dtype)


def _expectation(posteriors: Tensor, scores: Tensor) -> Tensor:
    """Returns the sum of posteriors * scores, (B, ., .) and (N, B, ., .) -> (N, B)."""
    # Impossible arcs and padding have posterior 0 and may have score -inf, and 0 * -inf is NaN.
    used = torch.where(posteriors > 0, scores, 0.0)
    return (posteriors * used).sum((-2, -1))


def _check_arguments(
    px: Tensor, py: Tensor, boundary: Tensor | None, px_name: str, py_name: str
) -> str:
    """Checks types, shapes and devices; returns the topology that the shapes imply."""
    for name, tensor in ((px_name, px), (py_name, py)):
        checks.check_tensor(tensor, name)
        checks.check_dtype(tensor, name, _DTYPES)
        if tensor.dim() != 3:
            shape = "(B, S, T + 1) or (B, S, T)" if tensor is px else "(B, S + 1, T)"
            raise ValueError(f"{name}: expected shape {shape}, got {tuple(tensor.shape)}")
    if py.dtype != px.dtype:
        raise TypeError(f"{py_name}: expected dtype {px.dtype}, that of px, got {py.dtype}")
    if py.device != px.device:
        raise ValueError(f"{py_name}: expected device {px.device}, that of px, got {py.device}")
    num_utterances, num_symbols, num_frames = py.size(0), py.size(1) - 1, py.size(2)
    if num_utterances == 0 or num_symbols < 0:
        raise ValueError(
            f"{py_name}: expected shape (B, S + 1, T) with B >= 1, got {tuple(py.shape)}"
        )
    shapes = [(num_utterances, num_symbols, num_frames + extra) for extra in (1, 0)]
    if tuple(px.shape) not in shapes:
        raise ValueError(
            f"{px_name}: expected shape {shapes[0]} (regular) or {shapes[1]} (modified) for "
            f"{py_name} {tuple(py.shape)}, got {tuple(px.shape)}"
        )
    checks.check_boundary(boundary, num_utterances, px.device)
    native.require_supported_device(px.device)
    return "regular" if tuple(px.shape) == shapes[0] else "modified"
