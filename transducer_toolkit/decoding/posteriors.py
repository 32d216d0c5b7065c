# SPDX-License-Identifier: Apache-2.0
"""Where the target symbols lie in time, all paths together: posteriors of cells and labels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from transducer_toolkit.decoding.alignment import check_lattice
from transducer_toolkit.ops.lattice import LatticeShape
from transducer_toolkit.ops.logits_loss import LogitsInputs, logits_loss
from transducer_toolkit.ops.options import LossOptions


@dataclass(frozen=True)
class LatticePosteriors:
    """Posterior probabilities in the lattices of a batch, given the reference.

    Attributes:
        log_likelihood: (B,) log-probability of the reference, the sum over all paths.
        occupancy: (B, T, U + 1) expected number of scores used in each cell, which is the
            probability that a path passes it; zero in padding. An utterance sums to T + U
            (regular) or T (others; ``constrained`` T + U, its forced blanks counted).
        labels: (B, T, U) probability that frame t emits symbol u; zero in padding. A symbol sums
            to 1 over the frames.
    """

    log_likelihood: Tensor
    occupancy: Tensor
    labels: Tensor

    def expected_frames(self) -> Tensor:
        """Mean frame of each symbol, (B, U): ``sum_t t * labels(t, u)``; 0 in padding."""
        frames = torch.arange(self.labels.size(1), device=self.labels.device)
        return torch.einsum("btu,t->bu", self.labels, frames.to(self.labels))


def lattice_posteriors(
    logits: Tensor,
    targets: Tensor,
    shape: LatticeShape,
    blank: int,
    *,
    topology: str = "regular",
) -> LatticePosteriors:
    """Posterior probabilities of the cells and of the label arcs of each lattice.

    Args:
        logits: (cells, V) float32 or float64, packed, not normalised.
        targets: (B, U) integer; padding may hold any value.
        shape: the batch's lattices.
        blank: id of blank.
        topology: one of :data:`~transducer_toolkit.decoding.TOPOLOGIES`, that of the loss which
            trained the model.

    Returns:
        The posteriors, of the dtype and on the device of ``logits``.

    Raises:
        ValueError: if logits, targets and shape do not fit each other, a label is blank or not in
            [0, V), the topology is unknown, or it leaves an utterance without a path.
        TypeError: if an argument is of another type.

    Example:
        >>> shape = LatticeShape.from_lengths([3], [2])
        >>> logits, targets = torch.randn(9, 5), torch.tensor([[1, 4]])
        >>> posteriors = lattice_posteriors(logits, targets, shape, blank=0)
        >>> posteriors.labels.shape, round(float(posteriors.labels.sum()), 4)
        (torch.Size([1, 3, 2]), 2.0)
    """
    check_lattice(logits, targets, shape, blank)
    inputs = LogitsInputs(logits.detach(), targets, *shape.lengths)
    result = logits_loss(inputs, LossOptions(blank, topology), with_uses=True)
    use_blank, use_label = (
        shape.unpack(uses.to(logits.dtype)) for uses in (result.use_blank, result.use_label)
    )  # (B, T, U + 1)
    return LatticePosteriors(
        log_likelihood=-result.losses,
        occupancy=use_blank + use_label,
        labels=use_label[:, :, :-1],
    )


def lattice_occupancy(
    logits: Tensor,
    targets: Tensor,
    shape: LatticeShape,
    blank: int,
    *,
    topology: str = "regular",
) -> Tensor:
    """Posterior probability that a path of the reference passes each cell.

    Args and Raises: those of :func:`lattice_posteriors`.

    Returns:
        (B, T, U + 1), zero in padding: :attr:`LatticePosteriors.occupancy`.

    Example:
        >>> shape = LatticeShape.from_lengths([3], [2])
        >>> occupancy = lattice_occupancy(torch.randn(9, 5), torch.tensor([[1, 4]]), shape, blank=0)
        >>> round(float(occupancy.sum()), 4)
        5.0
    """
    return lattice_posteriors(logits, targets, shape, blank, topology=topology).occupancy
