# SPDX-License-Identifier: Apache-2.0
"""Slow reference implementations of the transducer losses in plain torch.

They follow the definition of the lattice and share no code with the compiled stages.
:func:`brute_force_loss` enumerates all paths, so its correctness does not depend on a recursion. It
is practical for a few cells. :func:`reference_loss` runs the forward recursion and is
differentiable by autograd. It is practical for a few hundred frames. Use float64.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from transducer_toolkit.ops.checks import reduce_losses
from transducer_toolkit.ops.topology import (
    TOPOLOGIES,
    Topology,
    multi_blank_topology,
    tdt_topology,
)

# An arc of the lattice: the kind of score it uses, and the cell it leaves.
Arc = tuple[str, int, int]


def lattice_paths(num_frames: int, num_targets: int, topology: str) -> Iterator[list[Arc]]:
    """Yields every path through the lattice as a list of ("blank" | "label", t, u).

    Args:
        num_frames: T >= 1.
        num_targets: U >= 0.
        topology: one of :data:`~transducer_toolkit.ops.topology.TOPOLOGIES`.

    Example:
        >>> len(list(lattice_paths(3, 2, "regular")))  # (T - 1 + U) choose U
        6
    """
    row = TOPOLOGIES[topology]
    (label_frames,) = row.label_durations

    def extend(t: int, u: int) -> Iterator[list[Arc]]:
        if t == num_frames:
            if u == num_targets:
                yield []
            return
        for rest in extend(t + 1, u):
            yield [("blank", t, u), *rest]
        if u < num_targets:
            if t + label_frames == num_frames and not row.ends_with_label:
                return
            for rest in extend(t + label_frames, u + 1):
                yield [("label", t, u), *rest]

    return extend(0, 0)


def arc_scores(
    log_probs: Tensor, targets: Tensor, blank: int, topology: str, delay_penalty: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Returns the scores of all arcs of one utterance.

    Args:
        log_probs: (T, U + 1, V) log-probabilities.
        targets: (U,) labels.
        blank: index of blank.
        topology: as in :func:`lattice_paths`.
        delay_penalty: as in :func:`~transducer_toolkit.transducer_loss`.

    Returns:
        Blank scores (T, U + 1) and label scores (T, U).
    """
    num_frames, columns, _ = log_probs.shape
    blank_scores = log_probs[:, :, blank]
    index = targets.long().expand(num_frames, columns - 1).unsqueeze(-1)  # (T, U, 1)
    label_scores = log_probs[:, :-1].gather(2, index).squeeze(-1)
    if TOPOLOGIES[topology].label_takes_blank:
        label_scores = label_scores + blank_scores[:, 1:]
    frames = torch.arange(num_frames, dtype=log_probs.dtype, device=log_probs.device)
    penalty = delay_penalty * ((num_frames - 1) / 2 - frames)
    return blank_scores, label_scores + penalty[:, None]


def brute_force_loss(
    log_probs: Tensor, targets: Tensor, blank: int, topology: str, delay_penalty: float = 0.0
) -> Tensor:
    """Computes -log of the sum over all paths by enumeration. It is differentiable.

    Args:
        log_probs: (T, U + 1, V) log-probabilities of one utterance.
        targets: (U,) labels.
        blank: index of blank.
        topology: as in :func:`lattice_paths`.
        delay_penalty: as in :func:`~transducer_toolkit.transducer_loss`.

    Returns:
        A scalar in nats; +inf if there is no path.
    """
    blank_scores, label_scores = arc_scores(log_probs, targets, blank, topology, delay_penalty)
    scores = {"blank": blank_scores, "label": label_scores}
    paths = [
        torch.stack([scores[kind][t, u] for kind, t, u in path]).sum()
        for path in lattice_paths(log_probs.size(0), log_probs.size(1) - 1, topology)
    ]
    if not paths:
        return log_probs.new_full((), float("inf"))
    return -torch.logsumexp(torch.stack(paths), 0)


def brute_force_score(px: Tensor, py: Tensor) -> Tensor:
    """Computes :func:`~transducer_toolkit.mutual_information_recursion` of one utterance.

    It enumerates all paths.

    Args:
        px: (S, T + 1) for the regular recursion, or (S, T) for the modified one.
        py: (S + 1, T).

    Returns:
        A scalar in nats, the log of the sum over all paths; -inf if there is no path.

    Example:
        >>> brute_force_score(torch.zeros(1, 3), torch.zeros(2, 2))  # 3 paths
        tensor(1.0986)
    """
    num_frames = py.size(1)
    if px.size(1) > num_frames:
        # px has scores of labels in frame T. So enumerate the paths of T + 1 frames, and drop the
        # blank that ends frame T.
        paths = [path[:-1] for path in lattice_paths(num_frames + 1, px.size(0), "regular")]
    else:
        paths = list(lattice_paths(num_frames, px.size(0), "modified"))
    if not paths:
        return px.new_full((), float("-inf"))
    zero = px.new_zeros(())
    scores = [
        sum((py[u, t] if kind == "blank" else px[u, t] for kind, t, u in path), start=zero)
        for path in paths
    ]
    return torch.logsumexp(torch.stack(scores), 0)


def recursion_loss(
    log_probs: Tensor, targets: Tensor, blank: int, topology: str, delay_penalty: float = 0.0
) -> Tensor:
    """Computes :func:`brute_force_loss`, with the same arguments, by the forward recursion."""
    return -path_sum(*arc_scores(log_probs, targets, blank, topology, delay_penalty), topology)


def path_sum(blank_scores: Tensor, label_scores: Tensor, topology: str) -> Tensor:
    """Computes the log of the sum over all paths of one utterance by the forward recursion.

    Its derivatives are the posteriors of the arcs.

    Args:
        blank_scores: (T, U + 1), as in :func:`arc_scores`.
        label_scores: (T, U), as in :func:`arc_scores`.
        topology: as in :func:`lattice_paths`.

    Returns:
        A scalar in nats; -inf if there is no path.

    Example:
        >>> path_sum(torch.zeros(3, 3), torch.zeros(3, 2), "regular")  # 6 paths
        tensor(1.7918)
    """
    row = TOPOLOGIES[topology]
    (label_frames,) = row.label_durations
    num_frames, columns = blank_scores.shape
    zero = blank_scores.new_full((), float("-inf"))
    previous: list[Tensor] = []  # alpha(t - 1, u)
    for t in range(num_frames + 1):  # row T contains the final node
        current: list[Tensor] = []
        for u in range(columns):
            terms = [blank_scores.new_zeros(())] if t == u == 0 else []
            if t > 0:
                terms.append(previous[u] + blank_scores[t - 1, u])
            may_follow_label = t < num_frames or row.ends_with_label
            if u > 0 and label_frames == 0 and t < num_frames:
                terms.append(current[u - 1] + label_scores[t, u - 1])
            if u > 0 and label_frames == 1 and t > 0 and may_follow_label:
                terms.append(previous[u - 1] + label_scores[t - 1, u - 1])
            # Drop terms of -inf, because the gradient of logsumexp is NaN if all terms are -inf.
            terms = [term for term in terms if term != float("-inf")]
            current.append(torch.logsumexp(torch.stack(terms), 0) if terms else zero)
        previous = current
    return previous[-1]


def reference_loss(
    logits: Tensor,
    targets: Tensor,
    logit_lengths: Tensor,
    target_lengths: Tensor,
    blank: int,
    from_log_softmax: bool = False,
    topology: str = "regular",
    reduction: str = "mean",
    *,
    delay_penalty: float = 0.0,
    enumerate_paths: bool = False,
) -> Tensor:
    """Computes the transducer loss of padded logits in plain torch.

    Args:
        logits: (B, T, U + 1, V) float; use float64 for accurate references.
        targets: (B, U) integer labels.
        logit_lengths: (B,) integer, number of frames of each utterance.
        target_lengths: (B,) integer, number of labels of each utterance.
        blank: index of blank.
        from_log_softmax: whether logits are log-probabilities already.
        topology: one of :data:`~transducer_toolkit.ops.topology.TOPOLOGIES`.
        reduction: "none", "mean" or "sum".
        delay_penalty: as in :func:`~transducer_toolkit.transducer_loss`.
        enumerate_paths: use :func:`brute_force_loss` instead of the recursion.

    Returns:
        The loss in nats, (B,) for "none" and a scalar otherwise.

    Example:
        >>> one = torch.tensor([1])
        >>> reference_loss(torch.zeros(1, 1, 2, 4), torch.tensor([[2]]), one, one, blank=0)
        tensor(2.7726)
    """
    one = brute_force_loss if enumerate_paths else recursion_loss
    losses = []
    for b in range(targets.size(0)):
        num_frames, num_targets = int(logit_lengths[b]), int(target_lengths[b])
        cells = logits[b, :num_frames, : num_targets + 1]
        log_probs = cells if from_log_softmax else cells.log_softmax(-1)
        losses.append(one(log_probs, targets[b, :num_targets], blank, topology, delay_penalty))
    return reduce_losses(torch.stack(losses), reduction)


# --- arcs that advance several frames -------------------------------------------------------------

# An arc: the kind of score it uses, the cell it leaves, and the index of its duration.
DurationArc = tuple[str, int, int, int]


def _next_cells(
    topology: Topology, cell: tuple[int, int], size: tuple[int, int]
) -> Iterator[tuple[DurationArc, tuple[int, int]]]:
    """Yields the arcs that leave a cell (t, u), each with the cell to which it leads.

    The end of a path is cell (T, U); size = (T, U).
    """
    (t, u), (num_frames, num_targets) = cell, size
    for k, frames in enumerate(topology.blank_durations):
        if t + frames < num_frames or (t + frames, u) == size:
            yield ("blank", t, u, k), (t + frames, u)
    if u < num_targets:
        for k, frames in enumerate(topology.label_durations):
            if t + frames < num_frames:
                yield ("label", t, u, k), (t + frames, u + 1)


def duration_paths(
    num_frames: int, num_targets: int, topology: Topology
) -> Iterator[list[DurationArc]]:
    """Yields every path through a lattice as a list of ("blank" | "label", t, u, k).

    Args:
        num_frames: T >= 1.
        num_targets: U >= 0.
        topology: of a TDT or multi-blank transducer; k counts its durations.

    Example:
        >>> from transducer_toolkit.ops.topology import tdt_topology
        >>> len(list(duration_paths(3, 1, tdt_topology((0, 1, 2)))))
        11
    """
    size = num_frames, num_targets

    def extend(cell: tuple[int, int]) -> Iterator[list[DurationArc]]:
        if cell == size:
            yield []
            return
        for arc, after in _next_cells(topology, cell, size):
            for rest in extend(after):
                yield [arc, *rest]

    return extend((0, 0))


def duration_loss(
    blank_scores: Tensor, label_scores: Tensor, topology: Topology, *, enumerate_paths: bool
) -> Tensor:
    """Computes -log of the sum over all paths of one utterance. It is differentiable.

    Args:
        blank_scores: (T, U + 1, number of blank durations).
        label_scores: (T, U + 1, number of label durations); the last column is not used.
        topology: as in :func:`duration_paths`.
        enumerate_paths: sum over :func:`duration_paths` instead of the forward recursion.

    Returns:
        A scalar in nats; +inf if there is no path.
    """
    scores = {"blank": blank_scores, "label": label_scores}
    size = blank_scores.size(0), blank_scores.size(1) - 1
    if enumerate_paths:
        terms = [
            torch.stack([scores[kind][t, u, k] for kind, t, u, k in path]).sum()
            for path in duration_paths(*size, topology)
        ]
        return -_log_sum_exp(terms, blank_scores)
    arriving: dict[tuple[int, int], list[Tensor]] = {(0, 0): [blank_scores.new_zeros(())]}
    for t in range(size[0]):
        for u in range(size[1] + 1):
            if (t, u) in arriving:
                alpha = _log_sum_exp(arriving[t, u], blank_scores)
                for (kind, *_, k), after in _next_cells(topology, (t, u), size):
                    arriving.setdefault(after, []).append(alpha + scores[kind][t, u, k])
    return -_log_sum_exp(arriving.get(size, []), blank_scores)


def _log_sum_exp(terms: list[Tensor], like: Tensor) -> Tensor:
    # Without terms of -inf, because the gradient of logsumexp is NaN if all terms are -inf.
    terms = [term for term in terms if term != float("-inf")]
    if not terms:
        return like.new_full((), float("-inf"))
    return torch.logsumexp(torch.stack(terms), 0)


def reference_duration_loss(
    logits: Tensor,
    targets: Tensor,
    logit_lengths: Tensor,
    target_lengths: Tensor,
    blank: int,
    *,
    durations: Sequence[int] = (),
    big_blank_durations: Sequence[int] = (),
    sigma: float = 0.0,
    delay_penalty: float = 0.0,
    reduction: str = "mean",
    enumerate_paths: bool = False,
) -> Tensor:
    """Computes the TDT loss or the multi-blank loss of padded logits in plain torch.

    Args:
        logits: (B, T, U + 1, V + K), or (B, T, U + 1, V) with big blanks; use float64.
        targets: (B, U) integer labels.
        logit_lengths: (B,) integer, number of frames of each utterance.
        target_lengths: (B,) integer, number of labels of each utterance.
        blank: index of blank.
        durations: as in :func:`~transducer_toolkit.tdt_loss`.
        big_blank_durations: as in :func:`~transducer_toolkit.multi_blank_loss`; one of the two.
        sigma: as there.
        delay_penalty: as there.
        reduction: "none", "mean" or "sum".
        enumerate_paths: enumerate all paths instead of the recursion.

    Returns:
        The loss in nats, (B,) for "none" and a scalar otherwise.

    Example:
        >>> one = torch.tensor([1])
        >>> reference_duration_loss(
        ...     torch.zeros(1, 3, 2, 7), torch.tensor([[0]]), 3 * one, one, 3, durations=(0, 1, 2)
        ... )
        tensor(4.0452)
    """
    losses = []
    for b in range(targets.size(0)):
        num_frames, num_targets = int(logit_lengths[b]), int(target_lengths[b])
        cells = logits[b, :num_frames, : num_targets + 1]
        num_symbols = cells.size(-1) - len(durations)
        log_probs = cells[..., :num_symbols].log_softmax(-1) - sigma
        index = targets[b, :num_targets].long().expand(num_frames, -1).unsqueeze(-1)
        label = log_probs[:, :num_targets].gather(2, index)
        label = torch.cat([label, label.new_zeros(num_frames, 1, 1)], 1)
        frames = torch.arange(num_frames, dtype=cells.dtype, device=cells.device)
        label = label + delay_penalty * ((num_frames - 1) / 2 - frames)[:, None, None]
        if durations:
            topology = tdt_topology(tuple(durations))
            of_duration = cells[..., num_symbols:].log_softmax(-1)
            num_zero = len(durations) - len(topology.blank_durations)
            blank_scores = log_probs[..., blank, None] + of_duration[..., num_zero:]
            label = label + of_duration
        else:
            topology = multi_blank_topology(tuple(big_blank_durations))
            blanks = [blank, *(blank - 1 - i for i in range(len(big_blank_durations)))]
            blank_scores = log_probs[..., blanks]
        losses.append(duration_loss(blank_scores, label, topology, enumerate_paths=enumerate_paths))
    return reduce_losses(torch.stack(losses), reduction)


def hat_log_probs(logits: Tensor, blank: int) -> Tensor:
    """Returns the log-probabilities (..., V) of a hybrid autoregressive transducer (HAT).

    Blank has ``sigmoid(logits[blank])``; the labels share the rest by the softmax of their logits.

    Args:
        logits: (..., V).
        blank: index of blank.

    Example:
        >>> hat_log_probs(torch.zeros(3), blank=0).exp()
        tensor([0.5000, 0.2500, 0.2500])
    """
    is_blank = torch.arange(logits.size(-1), device=logits.device) == blank
    labels = logits.masked_fill(is_blank, -torch.inf).log_softmax(-1)
    of_blank = logits[..., blank, None]
    log_sigmoid = torch.nn.functional.logsigmoid
    return torch.where(is_blank, log_sigmoid(of_blank), log_sigmoid(-of_blank) + labels)
