# SPDX-License-Identifier: Apache-2.0
"""The recursion under the k2-compatible losses, on scores of symbols and of frames."""

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
    """Log of the total score of all monotonic paths through a grid of symbols and frames.

    With ``p[s_begin, t_begin] = 0`` and terms outside of the grid left out::

        regular:  p[s, t] = logadd(p[s-1, t  ] + px[s-1, t  ], p[s, t-1] + py[s, t-1])
        modified: p[s, t] = logadd(p[s-1, t-1] + px[s-1, t-1], p[s, t-1] + py[s, t-1])

    and the result is ``p[s_end, t_end]``. Arithmetic is in float64 whatever the dtype.

    Args:
        px: (B, S, T + 1) for the regular recursion or (B, S, T) for the modified one, float32 or
            float64; px[b, s, t] is the score of symbol s after t frames. The last column of the
            regular form, symbols after the last frame, is used: fill it with -inf to forbid them.
        py: (B, S + 1, T), same dtype and device; py[b, s, t] is the score of passing frame t with
            s symbols behind.
        boundary: (B, 4) int32 or int64 rows ``[s_begin, t_begin, s_end, t_end]``, on the CPU or
            the device of px; None means ``[0, 0, S, T]``. What px and py hold outside does not
            matter. Values on the CPU are checked.
        return_grad: also return the derivatives of the scores' sum, which are posteriors.

    Returns:
        Scores (B,) of px's dtype in nats, -inf with zero gradient where no path exists; with
        `return_grad` the pair of those and ``(px_grad, py_grad)``, shaped like px and py.

    Raises:
        TypeError: not a tensor, or a wrong dtype.
        ValueError: shapes, devices or boundaries that do not fit; names the argument, and the
            utterance.
        RuntimeError: no stage for this device in this build; a second derivative.

    Example:
        >>> px, py = torch.zeros(1, 2, 4), torch.zeros(1, 3, 3)
        >>> score = mutual_information_recursion(px, py)
        >>> round(score.exp().item(), 4)  # paths of 2 symbols and 3 frames: 5 over 2
        10.0
        >>> _, (px_grad, py_grad) = mutual_information_recursion(px, py, return_grad=True)
        >>> round(px_grad.sum().item(), 4), round(py_grad.sum().item(), 4)  # of every path
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
    """:func:`mutual_information_recursion` of sums of scores, broken down into their terms.

    With ``px_grad, py_grad`` the posteriors under ``sum_n px[n], sum_n py[n]`` and `score` the
    result of the recursion on those sums::

        term[n] = sum(px_grad * px[n]) + sum(py_grad * py[n]),    n > 0
        term[0] = the same + score - sum of all those

    so that the terms add up to the score; the first carries the difference between the log of a sum
    and the sum of logs. Gradients go through the terms with posteriors held fixed: each px[n] gets
    px_grad, which is also the derivative of the score.

    Args:
        px: N >= 1 tensors, each as in :func:`mutual_information_recursion`.
        py: N tensors likewise.
        boundary: as there.

    Returns:
        Terms (N, B) of px's dtype, in nats.

    Raises:
        TypeError: not sequences of tensors, or a wrong dtype.
        ValueError: no tensors, unequal numbers of them, or arguments that do not fit.
        RuntimeError: as there.

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
            f"px, py: expected equally many tensors, at least one, got {len(px)} and {len(py)}"
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
    """Sum of posteriors * scores over all but the first axes: (B, ...), (N, B, ...) -> (N, B)."""
    # An impossible arc has score -inf or lies in the padding: 0 * -inf must not be seen.
    used = torch.where(posteriors > 0, scores, 0.0)
    return (posteriors * used).sum((-2, -1))


def _check_arguments(
    px: Tensor, py: Tensor, boundary: Tensor | None, px_name: str, py_name: str
) -> str:
    """Everything but values; returns "regular" or "modified", which the shapes say."""
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
            f"{px_name}: expected shape {shapes[0]} (regular) or {shapes[1]} (modified) beside "
            f"{py_name} {tuple(py.shape)}, got {tuple(px.shape)}"
        )
    checks.check_boundary(boundary, num_utterances, px.device)
    native.require_supported_device(px.device)
    return "regular" if tuple(px.shape) == shapes[0] else "modified"
