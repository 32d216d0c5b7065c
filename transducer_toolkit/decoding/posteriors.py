# SPDX-License-Identifier: Apache-2.0
"""Posterior probabilities of lattice cells and labels, summed over all paths."""

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
    """Posterior probabilities in the lattices of a batch, given the target symbols.

    Attributes:
        log_likelihood: (B,) log-probability of the target symbols in nats, summed over all paths.
        occupancy: (B, T, U + 1) expected number of scores that a path uses in each cell; 0 in
            padding. It is the probability that a path visits the cell, except that
            ``constrained`` also counts the blank that follows each label. The sum over the cells of
            an utterance is T + U in ``regular`` and ``constrained``, and T in the others without
            durations. With durations it is the expected number of symbols, blanks included.
        labels: (B, T, U) probability that frame t emits symbol u; 0 in padding. The sum over the
            frames is 1 for each symbol.
    """

    log_likelihood: Tensor
    occupancy: Tensor
    labels: Tensor

    def expected_frames(self) -> Tensor:
        """Returns the mean frame ``sum_t t * labels(t, u)`` of each symbol, (B, U); padding: 0."""
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
    """Computes the posterior probabilities of the cells and of the label arcs of each lattice.

    Args:
        logits: (num_cells, V) float16, bfloat16, float32 or float64, packed, unnormalized.
        targets: (B, U) integer. Padding may hold any value.
        shape: the lattices of the batch.
        blank: id of blank.
        topology: topology of the loss that trained the model, one of
            :data:`~transducer_toolkit.decoding.TOPOLOGIES`.

    Returns:
        The posteriors, on the device of ``logits``.

    Raises:
        TypeError: if an argument has the wrong type or dtype.
        ValueError: if ``logits``, ``targets`` and ``shape`` do not match, if a label is blank or
            not in [0, V), if the topology is unknown, or if an utterance has no path in it.

    Example:
        >>> shape = LatticeShape.from_lengths([3], [2])
        >>> logits, targets = torch.randn(9, 5), torch.tensor([[1, 4]])
        >>> posteriors = lattice_posteriors(logits, targets, shape, blank=0)
        >>> posteriors.labels.shape, round(float(posteriors.labels.sum()), 4)
        (torch.Size([1, 3, 2]), 2.0)
    """
    options = LossOptions(blank, topology)
    check_lattice(logits, targets, shape, blank, options.arcs)
    inputs = LogitsInputs(logits.detach(), targets, *shape.lengths)
    result = logits_loss(inputs, options, with_uses=True)
    use_blank, use_label = (
        shape.unpack(uses.to(logits.dtype)) for uses in (result.use_blank, result.use_label)
    )  # (B, T, U + 1)
    occupancy = use_blank + use_label
    if options.arcs.num_big_blanks:
        occupancy += shape.unpack(result.use_extra.sum(1).to(logits.dtype))
    return LatticePosteriors(
        log_likelihood=-result.losses,
        occupancy=occupancy,
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
    """Computes the posterior probability that a path visits each cell.

    The arguments and the errors are those of :func:`lattice_posteriors`.

    Returns:
        (B, T, U + 1), as :attr:`LatticePosteriors.occupancy`.

    Example:
        >>> shape = LatticeShape.from_lengths([3], [2])
        >>> occupancy = lattice_occupancy(torch.randn(9, 5), torch.tensor([[1, 4]]), shape, blank=0)
        >>> round(float(occupancy.sum()), 4)
        5.0
    """
    return lattice_posteriors(logits, targets, shape, blank, topology=topology).occupancy
