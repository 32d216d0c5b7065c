# SPDX-License-Identifier: Apache-2.0
"""The table of topologies: which arcs a lattice has, and where a path may end.

Every rule about topologies is read from this table: feasibility, validation, alignment, searches,
batching and the choices of the command line. The compiled stages hold the same table
(``csrc/topology.h``); a test compares the two.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass


@dataclass(frozen=True)
class Topology:
    """One row of the table.

    A path starts in cell (0, 0). A blank arc leads from (t, u) to (t + d, u) for one of
    `blank_durations`, a label arc to (t + d, u + 1) for one of `label_durations`. The path ends
    when it leaves the last frame with all labels emitted.

    Attributes:
        name: the name that users write.
        blank_durations: frames that a blank arc may advance, each at least 1, the smallest first.
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

    def is_feasible(self, num_frames: int, num_targets: int) -> bool:
        """Return whether any path emits `num_targets` labels on `num_frames` frames."""
        if num_frames < self.min_frames(num_targets):
            return False
        if self.blank_durations[0] == 1:  # blanks can fill any number of frames
            return True
        return _durations_fill(self, num_frames, num_targets)


@functools.lru_cache(maxsize=4096)
def _durations_fill(topology: Topology, num_frames: int, num_targets: int) -> bool:
    """Whether some durations of that many labels and of at least one blank add up to the frames."""
    # Bit t: the frames that can be reached. Labels may come first: blanks do not need an order.
    frames = (1 << (num_frames + 1)) - 1
    reached = 1
    for _ in range(num_targets):
        reached = _advanced(reached, topology.label_durations) & frames
    end = 0
    while reached:
        reached = _advanced(reached, topology.blank_durations) & frames & ~end
        end |= reached
    return bool(end >> num_frames)


def _advanced(reached: int, durations: tuple[int, ...]) -> int:
    return functools.reduce(int.__or__, (reached << frames for frames in durations))


def tdt_topology(durations: tuple[int, ...]) -> Topology:
    """Return the topology of a token-and-duration transducer (TDT).

    Args:
        durations: frames that an arc may advance, ascending; those of 0 are for labels only.

    Example:
        >>> tdt_topology((0, 1, 2)).blank_durations
        (1, 2)
    """
    blanks = tuple(frames for frames in durations if frames > 0)
    return Topology(
        "tdt",
        blank_durations=blanks,
        label_durations=durations,
        ends_with_label=False,
        is_k2=False,
    )


def multi_blank_topology(big_blank_durations: tuple[int, ...]) -> Topology:
    """Return the topology of a multi-blank transducer.

    Args:
        big_blank_durations: frames that the big blanks advance, each at least 2, in any order.
    """
    return Topology(
        "multi_blank",
        blank_durations=(1, *big_blank_durations),
        label_durations=(0,),
        ends_with_label=False,
        is_k2=False,
    )


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
    return get_topology(topology).is_feasible(num_frames, num_targets)
