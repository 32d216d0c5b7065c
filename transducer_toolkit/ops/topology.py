# SPDX-License-Identifier: Apache-2.0
"""The table of topologies: which arcs a lattice has, and where a path may end.

Every rule about topologies is read from this table: feasibility, validation, alignment, searches,
batching and the choices of the command line. The compiled stages hold the same table
(``csrc/topology.h``); a test compares the two.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Topology:
    """One row of the table.

    A path starts in cell (0, 0). A blank arc leads from (t, u) to (t + d, u) for one of
    `blank_durations`, a label arc to (t + d, u + 1) for one of `label_durations`. The path ends
    when it leaves the last frame with all labels emitted.

    Attributes:
        name: the name that users write.
        blank_durations: frames that a blank arc may advance, ascending, each at least 1.
        label_durations: frames that a label arc may advance, ascending, each at least 0.
        label_takes_blank: a label arc from (t, u) also takes the blank of cell (t, u + 1), so that
            a blank follows every label.
        ends_with_label: a label arc may leave the last frame; otherwise a path ends with a blank.
        is_k2: k2 has this topology, as an ``rnnt_type``.
    """

    name: str
    blank_durations: tuple[int, ...] = (1,)
    label_durations: tuple[int, ...] = (1,)
    label_takes_blank: bool = False
    ends_with_label: bool = True
    is_k2: bool = True

    @property
    def labels_share_frames(self) -> bool:
        """Whether a frame may emit more than one label."""
        return self.label_durations[0] == 0

    @property
    def may_label_last_frame(self) -> bool:
        """Whether the last frame may emit a label."""
        return self.labels_share_frames or self.ends_with_label

    def min_frames(self, num_targets: int) -> int:
        """Return the smallest number of frames on which a path can emit `num_targets` labels.

        Example:
            >>> [TOPOLOGIES[name].min_frames(3) for name in ("regular", "modified")]
            [1, 3]
            >>> TOPOLOGIES["one_sym_per_frame"].min_frames(3)
            4
        """
        last = 0 if self.ends_with_label else self.blank_durations[0]
        return max(1, num_targets * self.label_durations[0] + last)


TOPOLOGIES = {
    topology.name: topology
    for topology in (
        Topology("regular", label_durations=(0,), ends_with_label=False),
        Topology("modified"),
        Topology("constrained", label_takes_blank=True),
        Topology("one_sym_per_frame", ends_with_label=False, is_k2=False),
    )
}
K2_TOPOLOGIES = {name: topology for name, topology in TOPOLOGIES.items() if topology.is_k2}


def get_topology(name: object, argument: str = "topology", *, k2: bool = False) -> Topology:
    """Return the topology of this name.

    Args:
        name: one of :data:`TOPOLOGIES`.
        argument: how the caller's argument is called, for the message.
        k2: accept :data:`K2_TOPOLOGIES` only.

    Raises:
        ValueError: there is no such topology.

    Example:
        >>> get_topology("modified").label_durations
        (1,)
    """
    table = K2_TOPOLOGIES if k2 else TOPOLOGIES
    if not isinstance(name, str) or name not in table:
        remedy = ""
        if k2 and isinstance(name, bool):  # "modified", of older k2 and fast_rnnt
            remedy = f"; pass {'modified' if name else 'regular'!r} for modified={name}"
        raise ValueError(f"{argument}: expected one of {tuple(table)}, got {name!r}{remedy}")
    return table[name]


def is_feasible(num_frames: int, num_targets: int, *, topology: str = "regular") -> bool:
    """Return whether any path explains the targets.

    Args:
        num_frames: encoder frames, after subsampling.
        num_targets: labels.
        topology: one of :data:`TOPOLOGIES`.

    Raises:
        ValueError: there is no such topology.

    Example:
        >>> is_feasible(3, 5), is_feasible(3, 5, topology="modified")
        (True, False)
    """
    return num_frames >= get_topology(topology).min_frames(num_targets)
