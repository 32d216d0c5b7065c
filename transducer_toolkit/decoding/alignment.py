# SPDX-License-Identifier: Apache-2.0
"""Alignment: the most probable path of the target symbols through their lattice."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from transducer_toolkit.ops import checks, durations, native, stages
from transducer_toolkit.ops.checks import check_tensor
from transducer_toolkit.ops.lattice import CellScores, LatticeBatch, LatticeShape, Lengths
from transducer_toolkit.ops.options import LossOptions
from transducer_toolkit.ops.topology import Topology, get_topology


@dataclass(frozen=True)
class Alignment:
    """The most probable path of one utterance through its lattice.

    Attributes:
        frames: the encoder frame that emits each target symbol, in ascending order.
        log_prob: log-probability of the path in nats.
    """

    frames: list[int]
    log_prob: float


def check_lattice(
    logits: Tensor, targets: Tensor, shape: LatticeShape, blank: int, topology: Topology
) -> None:
    """Checks the packed logits and the targets of a batch.

    Raises:
        TypeError: if an argument has the wrong type or dtype.
        ValueError: if a shape, a device, a label or ``blank`` does not fit.
    """
    check_tensor(logits, "logits")
    checks.check_dtype(logits, "logits", native.SUPPORTED_DTYPES)
    if not isinstance(shape, LatticeShape):
        raise TypeError(f"shape: expected a LatticeShape, got {type(shape).__name__}")
    if logits.dim() != 2 or logits.size(0) != shape.num_cells:
        raise ValueError(
            f"logits: expected shape ({shape.num_cells}, V), one row for each cell of the "
            f"lattices, got {tuple(logits.shape)}"
        )
    vocab_size = logits.size(1) - topology.num_durations
    checks.check_blank(blank, vocab_size)
    checks.check_big_blanks(topology.num_big_blanks, vocab_size)
    check_tensor(targets, "targets")
    checks.check_dtype(targets, "targets", checks.INDEX_DTYPES)
    fits = targets.dim() == 2 and targets.size(0) == shape.num_utterances
    if not fits or targets.size(1) < shape.max_targets:
        raise ValueError(
            f"targets: expected shape ({shape.num_utterances}, U) with U >= {shape.max_targets}, "
            f"B and U from shape, got {tuple(targets.shape)}"
        )
    for name, tensor in (("logits", logits), ("targets", targets)):
        if tensor.device.type == "meta":
            raise ValueError(f"{name}: expected a tensor with data, got one on device meta")
    checks.check_labels(targets, shape.target_lengths, blank=None, vocab_size=vocab_size)


def best_path(
    blank_log_probs: Tensor, label_log_probs: Tensor, *, topology: str = "regular"
) -> Alignment:
    """Finds the most probable path through one lattice (Viterbi), in float64.

    In the regular topology, a label leads to another cell of the same frame, and the path ends
    with the blank of cell (T - 1, U)::

        v(t, u) = max(v(t-1, u) + blank(t-1, u), v(t, u-1) + label(t, u-1))

    In the other topologies, a label leads to the next frame::

        v(t+1, u) = max(v(t, u) + blank(t, u), v(t, u-1) + label(t, u-1) [+ blank(t, u)])

    ``constrained`` adds the term in brackets, the blank that follows the label on the same frame.
    In ``one_sym_per_frame``, the path ends with a blank.

    If several paths are equally probable, the one with the later labels is returned.

    Args:
        blank_log_probs: (T, U + 1) float, log-probability of blank in each cell.
        label_log_probs: (T, U) float, log-probability of the next target symbol in each cell.
        topology: topology of the loss that trained the model, one of :data:`TOPOLOGIES`.

    Returns:
        The alignment.

    Raises:
        TypeError: if an argument has the wrong type or dtype.
        ValueError: if the shapes do not match, the topology is unknown, the scores contain NaN, or
            no path has a probability above zero.

    Example:
        >>> blank = torch.tensor([[0.9, 0.9], [0.1, 0.9]]).log()
        >>> label = torch.tensor([[0.1], [0.9]]).log()
        >>> best_path(blank, label).frames
        [1]
        >>> best_path(blank, label, topology="one_sym_per_frame").frames
        [0]
    """
    row = get_topology(topology)
    for name, scores in (
        ("blank_log_probs", blank_log_probs),
        ("label_log_probs", label_log_probs),
    ):
        check_tensor(scores, name)
        checks.check_dtype(scores, name, native.SUPPORTED_DTYPES)
        if scores.device.type == "meta":
            raise ValueError(f"{name}: expected a tensor with data, got one on device meta")
        if bool(scores.isnan().any()):  # max() below may drop a NaN
            raise ValueError(f"{name}: expected log-probabilities, got NaN")
    if blank_log_probs.dim() != 2 or min(blank_log_probs.shape) < 1:
        raise ValueError(
            f"blank_log_probs: expected shape (T, U + 1), got {tuple(blank_log_probs.shape)}"
        )
    num_frames, num_targets = blank_log_probs.size(0), blank_log_probs.size(1) - 1
    if label_log_probs.shape != (num_frames, num_targets):
        raise ValueError(
            f"label_log_probs: expected shape ({num_frames}, {num_targets}), "
            f"got {tuple(label_log_probs.shape)}"
        )
    blank, label = blank_log_probs.detach().double(), label_log_probs.detach().double()
    if row.label_takes_blank:
        label = label + blank[:, 1:]
    if not row.may_label_last_frame:
        label = label.clone()
        label[-1] = -math.inf
    # Lists: the recursion runs cell by cell, and Python floats are faster than tensor elements.
    search = _labels_stay if row.labels_share_frames else _labels_advance
    frames, log_prob = search(blank.tolist(), label.tolist())
    if not math.isfinite(log_prob):
        raise ValueError(
            "blank_log_probs, label_log_probs: expected a path with a finite log-probability, got "
            f"{log_prob} for the best path"
        )
    return Alignment(frames, log_prob)


Scores = Sequence[Sequence[float]]  # (T, U + 1) for blank, (T, U) for labels


def _labels_stay(blank: Scores, label: Scores) -> tuple[list[int], float]:
    """Finds the best path if a label leads to (t, u + 1); returns label frames, log-probability."""
    num_frames, num_targets = len(blank), len(blank[0]) - 1
    best = []  # best[t][u]: log-probability of the best path into cell (t, u)
    # Log-probability of the best path into each cell of the frame whose last arc is a blank.
    before = [0.0] + [-math.inf] * num_targets
    for t in range(num_frames):
        row = [before[0]]
        for u in range(num_targets):
            row.append(max(before[u + 1], row[u] + label[t][u]))
        best.append(row)
        before = [value + log_prob for value, log_prob in zip(row, blank[t], strict=True)]
    log_prob = before[num_targets]
    if not math.isfinite(log_prob):
        return [], log_prob

    frames = []
    t, u = num_frames - 1, num_targets
    while u > 0:
        # The path entered (t, u) by a label, unless the blank of the previous frame scores more.
        if t == 0 or best[t][u - 1] + label[t][u - 1] >= best[t - 1][u] + blank[t - 1][u]:
            u -= 1
            frames.append(t)
        else:
            t -= 1
    return frames[::-1], log_prob


def _labels_advance(blank: Scores, label: Scores) -> tuple[list[int], float]:
    """Does the same as :func:`_labels_stay` if a label leads to (t + 1, u + 1)."""
    num_targets = len(blank[0]) - 1
    row = [0.0] + [-math.inf] * num_targets
    best = [row]  # best[t][u] as in _labels_stay; row T contains the final node
    for blank_row, label_row in zip(blank, label, strict=True):
        stayed = [value + log_prob for value, log_prob in zip(row, blank_row, strict=True)]
        moved = [value + log_prob for value, log_prob in zip(row, label_row, strict=False)]
        row = [stayed[0], *map(max, stayed[1:], moved)]
        best.append(row)
    if not math.isfinite(row[num_targets]):
        return [], row[num_targets]

    frames = []
    u = num_targets
    for t in range(len(blank) - 1, -1, -1):
        if u > 0 and best[t][u - 1] + label[t][u - 1] >= best[t][u] + blank[t][u]:
            u -= 1
            frames.append(t)
    return frames[::-1], row[num_targets]


def lattice_scores(
    logits: Tensor, targets: Tensor, shape: LatticeShape, blank: int
) -> tuple[Tensor, Tensor]:
    """Computes the log-probabilities of blank and of the next target symbol in every cell.

    Args:
        logits: (num_cells, V) float, packed, unnormalized.
        targets: (B, U) integer. Padding may hold any value.
        shape: the lattices of the batch.
        blank: id of blank.

    Returns:
        ``blank_log_probs`` (B, T, U + 1) and ``label_log_probs`` (B, T, U), with the dtype and the
        device of ``logits``; -inf in padding.

    Raises:
        TypeError: if an argument has the wrong type or dtype.
        ValueError: if ``logits``, ``targets`` and ``shape`` do not match, or if a label or
            ``blank`` is not in [0, V).

    Example:
        >>> shape = LatticeShape.from_lengths([3], [2])
        >>> scores = lattice_scores(torch.randn(9, 5), torch.tensor([[1, 4]]), shape, blank=0)
        >>> [tuple(score.shape) for score in scores]
        [(1, 3, 3), (1, 3, 2)]
    """
    scores = _cell_scores(logits, targets, shape, LossOptions(blank))
    blank_log_probs, label_log_probs = (
        shape.unpack(score, fill=-torch.inf).to(logits.dtype)
        for score in (scores.blank, scores.label)
    )  # (B, T, U + 1)
    return blank_log_probs, label_log_probs[:, :, :-1]


def _cell_scores(
    logits: Tensor, targets: Tensor, shape: LatticeShape, options: LossOptions
) -> CellScores:
    """Runs stage 1 on packed logits, which it checks."""
    check_lattice(logits, targets, shape, options.blank, options.arcs)
    native.require_supported_device(logits.device)
    logits = logits.detach().contiguous()
    batch = LatticeBatch(
        Lengths(*shape.lengths, shape.index(logits.device)),
        targets.to(logits.device),
        max_frames=shape.max_frames,
        padded=False,
        num_rows=shape.num_cells,
    )
    scores = CellScores.zeros(batch, logits.device, options.num_extra)
    stages.cell_scores(logits, batch, batch.all_rows(), options, scores)
    return scores


def align(
    logits: Tensor,
    targets: Tensor,
    shape: LatticeShape,
    blank: int,
    *,
    topology: str = "regular",
) -> list[Alignment]:
    """Finds the most probable path of every utterance of a batch.

    Args:
        logits: (num_cells, V) float, packed, as returned by a joiner.
        targets: (B, U) integer. Padding may hold any value.
        shape: the lattices of the batch.
        blank: id of blank.
        topology: topology of the loss that trained the model, one of :data:`TOPOLOGIES`.

    Returns:
        One alignment for each utterance.

    Raises:
        TypeError: as in :func:`lattice_scores`.
        ValueError: as in :func:`lattice_scores`; also if the topology is unknown, or if an
            utterance has no path with a probability above zero.

    Example:
        >>> shape = LatticeShape.from_lengths([3, 2], [2, 1])
        >>> targets = torch.tensor([[1, 4], [2, -1]])
        >>> [len(a.frames) for a in align(torch.randn(13, 5), targets, shape, blank=0)]
        [2, 1]
    """
    row = get_topology(topology)
    if row.num_extra:
        return _align_with_durations(logits, targets, shape, LossOptions(blank, topology))
    blank_log_probs, label_log_probs = lattice_scores(logits, targets, shape, blank)
    lengths = zip(shape.logit_lengths.tolist(), shape.target_lengths.tolist(), strict=True)
    found = []
    for b, (t, u) in enumerate(lengths):
        scores = blank_log_probs[b, :t, : u + 1], label_log_probs[b, :t, :u]
        try:
            found.append(best_path(*scores, topology=topology))
        except ValueError as error:
            raise ValueError(f"utterance {b}: {error}") from error
    return found


def _align_with_durations(
    logits: Tensor, targets: Tensor, shape: LatticeShape, options: LossOptions
) -> list[Alignment]:
    """Does what :func:`align` does for arcs that advance several frames."""
    cells = _cell_scores(logits, targets, shape, options)
    arcs = durations.arc_scores(cells, options)
    found = []
    lengths = zip(shape.logit_lengths.tolist(), shape.target_lengths.tolist(), strict=True)
    for b, (num_frames, num_targets) in enumerate(lengths):
        rows = slice(int(shape.cell_offsets[b]), int(shape.cell_offsets[b + 1]))
        blank, label = (
            part[rows].cpu().view(num_frames, num_targets + 1, -1).numpy() for part in arcs
        )
        if np.isnan(blank).any() or np.isnan(label[:, :-1]).any():
            raise ValueError(f"utterance {b}: expected log-probabilities, got NaN")
        frames, log_prob = _best_of_durations(blank, label, options.arcs)
        if not math.isfinite(log_prob):
            raise ValueError(
                f"utterance {b}: expected a path with a finite log-probability, got {log_prob} for "
                "the best path"
            )
        found.append(Alignment(frames, log_prob))
    return found


def _best_of_durations(
    blank: NDArray[np.float64], label: NDArray[np.float64], arcs: Topology
) -> tuple[list[int], float]:
    """Finds the best path by its arcs backward from the end; returns label frames, log-probability.

    Args:
        blank: (T, U + 1, number of blank durations).
        label: (T, U + 1, number of label durations); the last column has no label.
        arcs: the topology.
    """
    num_frames, columns, _ = blank.shape
    lowest = np.full(columns, -np.inf)
    end = lowest.copy()
    end[-1] = 0.0
    best: list[NDArray[np.float64]] = [lowest] * num_frames  # of the rest of the path, from a cell

    def after(t: int) -> NDArray[np.float64]:
        return best[t] if t < num_frames else lowest

    for t in range(num_frames - 1, -1, -1):
        row = lowest.copy()
        for k, frames in enumerate(arcs.blank_durations):
            rest = end if t + frames == num_frames else after(t + frames)
            np.maximum(row, blank[t, :, k] + rest, out=row)
        stays = None
        for k, frames in enumerate(arcs.label_durations):
            if frames == 0:
                stays = label[t, :, k]
            else:
                moved = label[t, :-1, k] + after(t + frames)[1:]
                np.maximum(row[:-1], moved, out=row[:-1])
        if stays is not None:
            for u in range(columns - 2, -1, -1):
                row[u] = max(row[u], stays[u] + row[u + 1])
        best[t] = row
    log_prob = float(best[0][0])
    if not math.isfinite(log_prob):
        return [], log_prob
    label_frames = []
    t = u = 0
    while t < num_frames:
        # Blanks first, so that of several best paths the one with the later labels is taken.
        steps = [
            (
                blank[t, u, k] + (end if t + frames == num_frames else after(t + frames))[u],
                frames,
                0,
            )
            for k, frames in enumerate(arcs.blank_durations)
        ]
        if u + 1 < columns:
            steps += [
                (label[t, u, k] + after(t + frames)[u + 1], frames, 1)
                for k, frames in enumerate(arcs.label_durations)
            ]
        _, frames, is_label = max(steps, key=lambda step: step[0])
        if is_label:
            label_frames.append(t)
        t, u = t + frames, u + is_label
    return label_frames, log_prob
