# SPDX-License-Identifier: Apache-2.0
"""Where the target symbols lie in time: best path and lattice occupancy."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from transducer_toolkit.lattice import LatticeShape
from transducer_toolkit.losses import transducer_loss


@dataclass(frozen=True)
class Alignment:
    """The most probable path of one utterance through its lattice.

    Attributes:
        frames: for each target symbol the encoder frame that emits it, never decreasing.
        log_prob: log-probability of the path (natural logarithm).
    """

    frames: list[int]
    log_prob: float


def best_path(blank_log_probs: Tensor, label_log_probs: Tensor) -> Alignment:
    """Find the most probable path of the regular topology (Viterbi) in one lattice.

    ``v(t, u) = max(v(t-1, u) + blank(t-1, u), v(t, u-1) + label(t, u-1))``, in float64; the path
    ends with the blank of cell (T - 1, U). Of equal paths the one with the later labels is taken.

    Args:
        blank_log_probs: (T, U + 1) float, log-probability of blank in each cell.
        label_log_probs: (T, U) float, log-probability of the next target symbol in each cell.

    Returns:
        The alignment.

    Raises:
        ValueError: if the shapes do not fit each other, the scores hold NaN, or no path has
            a probability above zero.

    Example:
        >>> blank = torch.tensor([[0.9, 0.9], [0.1, 0.9]]).log()
        >>> label = torch.tensor([[0.1], [0.9]]).log()
        >>> best_path(blank, label).frames
        [1]
    """
    if blank_log_probs.dim() != 2 or min(blank_log_probs.shape) < 1:
        raise ValueError(
            f"blank_log_probs must have shape (T, U + 1), got {tuple(blank_log_probs.shape)}"
        )
    num_frames, num_targets = blank_log_probs.size(0), blank_log_probs.size(1) - 1
    if label_log_probs.shape != (num_frames, num_targets):
        raise ValueError(
            f"label_log_probs must have shape ({num_frames}, {num_targets}), "
            f"got {tuple(label_log_probs.shape)}"
        )
    # Lists: the recursion runs cell by cell, where Python's own floats are the faster ones.
    blank = blank_log_probs.detach().double().tolist()
    label = label_log_probs.detach().double().tolist()

    best = []  # best[t][u]: log-probability of the best way to stand in cell (t, u)
    before = [0.0] + [-math.inf] * num_targets  # best way into each cell of the frame by a blank
    for t in range(num_frames):
        row = [before[0]]
        for u in range(num_targets):
            row.append(max(before[u + 1], row[u] + label[t][u]))
        best.append(row)
        before = [value + log_prob for value, log_prob in zip(row, blank[t], strict=True)]
    log_prob = before[num_targets]
    if not math.isfinite(log_prob):
        raise ValueError(
            f"the best path through the lattice has the log-probability {log_prob}: "
            "the scores hold NaN, or leave no path"
        )

    frames = []
    t, u = num_frames - 1, num_targets
    while u > 0:
        # Entered by its label, unless a blank from the frame before explains the value.
        if t == 0 or best[t][u - 1] + label[t][u - 1] >= best[t - 1][u] + blank[t - 1][u]:
            u -= 1
            frames.append(t)
        else:
            t -= 1
    return Alignment(frames[::-1], log_prob)


def lattice_scores(
    logits: Tensor, targets: Tensor, shape: LatticeShape, blank: int
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of blank and of the next target symbol in every cell of a batch.

    Args:
        logits: (cells, V) float, packed, not normalised.
        targets: (B, U) integer; padding may hold any value.
        shape: the batch's lattices.
        blank: id of blank.

    Returns:
        ``blank_log_probs`` (B, T, U + 1) and ``label_log_probs`` (B, T, U), -inf in padding.

    Example:
        >>> shape = LatticeShape.from_lengths([3], [2])
        >>> scores = lattice_scores(torch.randn(9, 5), torch.tensor([[1, 4]]), shape, blank=0)
        >>> [tuple(score.shape) for score in scores]
        [(1, 3, 3), (1, 3, 2)]
    """
    log_probs = shape.unpack(logits.log_softmax(-1), fill=-torch.inf)  # (B, T, U + 1, V)
    num_frames, num_targets = log_probs.size(1), log_probs.size(2) - 1
    columns = torch.arange(num_targets)
    real = columns < shape.target_lengths.unsqueeze(1)  # (B, U)
    symbols = targets[:, :num_targets].long().cpu().where(real, blank).to(logits.device)
    index = symbols[:, None, :, None].expand(-1, num_frames, -1, 1)  # (B, T, U, 1)
    label_log_probs = log_probs[:, :, :num_targets].gather(-1, index).squeeze(-1)
    label_log_probs = label_log_probs.masked_fill(~real[:, None].to(logits.device), -torch.inf)
    return log_probs[..., blank], label_log_probs


def align(logits: Tensor, targets: Tensor, shape: LatticeShape, blank: int) -> list[Alignment]:
    """Align a batch: the best path of every utterance.

    Args:
        logits: (cells, V) float, packed, as a joiner gives them.
        targets: (B, U) integer; padding may hold any value.
        shape: the batch's lattices.
        blank: id of blank.

    Returns:
        One alignment an utterance.

    Raises:
        ValueError: if an utterance has no path with a probability above zero.

    Example:
        >>> shape = LatticeShape.from_lengths([3, 2], [2, 1])
        >>> targets = torch.tensor([[1, 4], [2, -1]])
        >>> [len(a.frames) for a in align(torch.randn(13, 5), targets, shape, blank=0)]
        [2, 1]
    """
    blank_log_probs, label_log_probs = lattice_scores(logits, targets, shape, blank)
    lengths = zip(shape.logit_lengths.tolist(), shape.target_lengths.tolist(), strict=True)
    return [
        best_path(blank_log_probs[b, :t, : u + 1], label_log_probs[b, :t, :u])
        for b, (t, u) in enumerate(lengths)
    ]


def lattice_occupancy(logits: Tensor, targets: Tensor, shape: LatticeShape, blank: int) -> Tensor:
    """Posterior probability that a path of the reference passes each cell.

    The derivative of the log-likelihood with respect to a log-probability is the expected number
    of its uses, and the loss gives just that when its input counts as log-probabilities. Summed
    over blank and label it is the occupancy.

    Args:
        logits: (cells, V) float32 or float64, packed, not normalised.
        targets: (B, U) integer; padding may hold any value.
        shape: the batch's lattices.
        blank: id of blank.

    Returns:
        (B, T, U + 1), zero in padding; an utterance sums to T + U.

    Example:
        >>> shape = LatticeShape.from_lengths([3], [2])
        >>> occupancy = lattice_occupancy(torch.randn(9, 5), torch.tensor([[1, 4]]), shape, blank=0)
        >>> round(float(occupancy.sum()), 4)
        5.0
    """
    # Tensors made in inference mode cannot take part in autograd: their clones can.
    with torch.inference_mode(False), torch.enable_grad():
        log_probs = logits.detach().clone().log_softmax(-1).requires_grad_()
        loss = transducer_loss(
            log_probs,
            targets.clone(),
            shape.logit_lengths.clone(),
            shape.target_lengths.clone(),
            blank,
            from_log_softmax=True,
            reduction="sum",
        )
        (gradient,) = torch.autograd.grad(loss, log_probs)
    return shape.unpack(-gradient.sum(-1))
