# SPDX-License-Identifier: Apache-2.0
"""Losses and gradients of lattices of any size, exact and as plain torch has them.

:func:`exact_solution` works in 80-bit floating point, a diagonal or a frame at a time;
:func:`plain_solution` in the dtype of the logits, by autograd: what a careful user would write.
"""

from __future__ import annotations

import itertools

import numpy as np
import torch
from torch import Tensor

from transducer_toolkit.ops.topology import TOPOLOGIES, Topology

Exact = np.longdouble
LOG_ZERO = Exact(-np.inf)


def exact_posteriors(
    blank: np.ndarray, label: np.ndarray, topology: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Loss, posteriors of the blank arcs (T, U + 1) and of the label arcs (T, U) of one lattice.

    Args:
        blank: (T, U + 1) scores, of Exact.
        label: (T, U) scores.
        topology: one of TOPOLOGIES.
    """
    num_frames, columns = blank.shape
    row = TOPOLOGIES[topology]
    if row.label_takes_blank:
        label = label + blank[:, 1:]
    if not row.may_label_last_frame:
        label = label.copy()
        label[-1] = LOG_ZERO
    # alpha and beta have a node (T, U) behind the last frame; labels that lead beyond are -inf.
    alpha, beta = (np.full((num_frames + 1, columns), LOG_ZERO) for _ in range(2))
    alpha[0, 0] = beta[num_frames, columns - 1] = 0
    if row.labels_share_frames:
        for d in range(1, num_frames + columns):
            u = np.arange(max(0, d - num_frames), min(columns - 1, d) + 1)
            t = d - u
            by_blank, by_label = np.full(len(u), LOG_ZERO), np.full(len(u), LOG_ZERO)
            ok = t > 0
            by_blank[ok] = alpha[t[ok] - 1, u[ok]] + blank[t[ok] - 1, u[ok]]
            ok = (u > 0) & (t < num_frames)
            by_label[ok] = alpha[t[ok], u[ok] - 1] + label[t[ok], u[ok] - 1]
            alpha[t, u] = np.logaddexp(by_blank, by_label)
        for d in range(num_frames + columns - 2, -1, -1):
            u = np.arange(max(0, d - num_frames + 1), min(columns - 1, d) + 1)
            t = d - u
            by_blank = beta[t + 1, u] + blank[t, u]
            by_label = np.full(len(u), LOG_ZERO)
            ok = u < columns - 1
            by_label[ok] = beta[t[ok], u[ok] + 1] + label[t[ok], u[ok]]
            beta[t, u] = np.logaddexp(by_blank, by_label)
        after_label = beta[:-1, 1:]
    else:
        for t in range(num_frames):
            alpha[t + 1] = alpha[t] + blank[t]
            alpha[t + 1, 1:] = np.logaddexp(alpha[t + 1, 1:], alpha[t, :-1] + label[t])
        for t in range(num_frames - 1, -1, -1):
            beta[t] = beta[t + 1] + blank[t]
            beta[t, :-1] = np.logaddexp(beta[t, :-1], beta[t + 1, 1:] + label[t])
        after_label = beta[1:, 1:]
    total = beta[0, 0]
    if total == LOG_ZERO:
        return -total, np.zeros_like(blank), np.zeros_like(label)
    post_blank = np.exp(alpha[:-1] + blank + beta[1:] - total)
    post_label = np.exp(alpha[:-1, :-1] + label + after_label - total)
    return -total, post_blank, post_label


def exact_solution(
    logits: Tensor, targets: Tensor, blank: int, topology: str
) -> tuple[float, Tensor, Tensor, Tensor]:
    """Loss, gradient of the logits (T, U + 1, V), posteriors of blank and label arcs; float64."""
    x = logits.detach().double().numpy().astype(Exact)
    top = x.max(-1, keepdims=True)
    log_probs = x - top - np.log(np.exp(x - top).sum(-1, keepdims=True))
    index = targets.long().numpy()
    label = np.take_along_axis(
        log_probs[:, :-1], np.broadcast_to(index[None, :, None], (len(x), len(index), 1)), 2
    )[..., 0]
    loss, use_blank, use_label = exact_posteriors(log_probs[:, :, blank], label, topology)
    post_blank = use_blank.copy()
    if TOPOLOGIES[topology].label_takes_blank:  # the blank of a label arc is a use, too
        use_blank[:, 1:] += use_label
    grad = use_blank[..., None] * np.exp(log_probs)
    grad[:, :-1] += use_label[..., None] * np.exp(log_probs[:, :-1])
    grad[:, :, blank] -= use_blank
    for u, target in enumerate(index):
        grad[:, u, target] -= use_label[:, u]
    results = (torch.from_numpy(y.astype(np.float64)) for y in (grad, post_blank, use_label))
    return float(loss), *results


def plain_solution(
    logits: Tensor, targets: Tensor, blank: int, topology: str
) -> tuple[float, Tensor]:
    """Loss and gradient by log_softmax, logaddexp and autograd, all in the dtype of the logits."""
    x = logits.detach().clone().requires_grad_()
    log_probs = x.log_softmax(-1)
    num_frames, columns = log_probs.shape[:2]
    stop = log_probs[:, :, blank]
    index = targets.long().expand(num_frames, columns - 1)[..., None]
    label = log_probs[:, :-1].gather(2, index).squeeze(2)
    row = TOPOLOGIES[topology]
    if row.label_takes_blank:
        label = label + stop[:, 1:]
    stays = row.labels_share_frames
    score = _regular(stop, label) if stays else _advancing(stop, label, row)
    (grad,) = torch.autograd.grad(-score, x)
    return -float(score.detach()), grad.double()


def _regular(stop: Tensor, label: Tensor) -> Tensor:
    num_frames, columns = stop.shape
    alpha, low = stop.new_zeros(1), 0  # of diagonal d, columns low ... low + len - 1
    for d in range(1, num_frames + columns - 1):
        u = torch.arange(low, low + len(alpha))
        t = d - 1 - u
        by_blank = alpha + stop[t, u]
        keep = slice(0, columns - 1 - low)  # the last column has no label
        by_label = alpha[keep] + label[t[keep], u[keep]]
        first, last = max(0, d - num_frames + 1), min(columns - 1, d)
        parts = []
        for lo, hi, has_blank, has_label in _runs(first, last, low, low + len(alpha) - 1):
            blanks = by_blank[lo - low : hi - low + 1] if has_blank else None
            labels = by_label[lo - 1 - low : hi - low] if has_label else None
            if blanks is not None and labels is not None:
                parts.append(torch.logaddexp(blanks, labels))
            else:
                parts.append(blanks if blanks is not None else labels)
        alpha, low = torch.cat(parts), first
    return alpha[-1] + stop[-1, -1]


def _runs(first: int, last: int, low: int, high: int):
    """Runs of columns first ... last by whether a blank and a label lead to them."""
    kinds = [(u, low <= u <= high, low <= u - 1 <= high) for u in range(first, last + 1)]
    for (blank, label), group in itertools.groupby(kinds, key=lambda kind: kind[1:]):
        columns = [u for u, _, _ in group]
        yield columns[0], columns[-1], blank, label


def _advancing(stop: Tensor, label: Tensor, row: Topology) -> Tensor:
    num_frames, columns = stop.shape
    alpha = stop.new_zeros(1)
    for t in range(num_frames):
        count = len(alpha)
        by_blank = alpha + stop[t, :count]
        if not row.ends_with_label and t + 1 == num_frames:
            alpha = by_blank
            break
        by_label = alpha[: columns - 1] + label[t, : min(count, columns - 1)]
        middle = torch.logaddexp(by_blank[1:], by_label[: count - 1])
        parts = [by_blank[:1], middle]
        alpha = torch.cat([*parts, by_label[-1:]] if count < columns else parts)
    return alpha[columns - 1]
