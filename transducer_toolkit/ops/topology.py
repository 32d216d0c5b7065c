# SPDX-License-Identifier: Apache-2.0
"""The table of topologies: which arcs a lattice has, and where a path may end.

Every rule about topologies is read from this table: feasibility, validation, alignment, searches,
batching and the choices of the command line. The compiled stages hold the same table
(``csrc/topology.h``); a test compares the two.
"""

from __future__ import annotations

import functools
import itertools
import numbers
from collections.abc import Sequence
from dataclasses import dataclass

# Limits of csrc/logits.h.
MAX_DURATIONS = 32
MAX_BIG_BLANKS = 30
MAX_DURATION = 10_000  # frames of an arc


@dataclass(frozen=True)
class Topology:
    """One row of the table.

    A path starts in cell (0, 0). A blank arc leads from (t, u) to (t + d, u) for one of
    `blank_durations`, a label arc to (t + d, u + 1) for one of `label_durations`. The path ends
    when it leaves the last frame with all labels emitted.

    ``csrc/topology.h`` calls the only duration of a row without durations `blank_frames` and
    `label_frames`.

    Attributes:
        name: the name that users write.
        blank_durations: frames that a blank arc may advance, each at least 1, the smallest first.
        label_durations: frames that a label arc may advance, ascending, each at least 0.
        label_takes_blank: a label arc from (t, u) also takes the blank of cell (t, u + 1), so that
            a blank follows every label. Only where every label advances 1 frame.
        ends_with_label: a label arc may leave the last frame; otherwise a path ends with a blank.
            Only where every label advances 1 frame.
        is_k2: k2 has this topology, as an ``rnnt_type``. The functions with k2's names accept it.
        predicts_durations: a cell has a score for each of `label_durations`, which is added to that
            of the symbol. Otherwise an arc has the score of its symbol alone, and there is a blank
            symbol for each of `blank_durations`.

    Raises:
        ValueError: no stage implements this combination.

    Example:
        >>> Topology("mine", label_takes_blank=True).min_frames(3)
        3
    """

    name: str
    blank_durations: tuple[int, ...] = (1,)
    label_durations: tuple[int, ...] = (1,)
    label_takes_blank: bool = False
    ends_with_label: bool = True
    is_k2: bool = False
    predicts_durations: bool = False

    def __post_init__(self) -> None:
        for column in ("label_takes_blank", "ends_with_label"):
            if getattr(self, column) and self.label_durations != (1,):
                raise ValueError(
                    f"{column}: expected False with label_durations {self.label_durations}, got "
                    "True: only a label that advances 1 frame can do so"
                )

    @property
    def num_durations(self) -> int:
        """Durations that have a score in each cell, 0 if they are not predicted."""
        return len(self.label_durations) if self.predicts_durations else 0

    @property
    def num_big_blanks(self) -> int:
        """Blank symbols beside the blank of one frame."""
        return 0 if self.predicts_durations else len(self.blank_durations) - 1

    @property
    def num_extra(self) -> int:
        """Logits of a cell beside those of the symbols and blank: of durations or big blanks."""
        return self.num_durations + self.num_big_blanks

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

    def has_path(self, num_frames: int, windows: Sequence[tuple[int, int]]) -> bool:
        """Return whether a path can emit each label on one of the frames allowed for it.

        Of topologies whose paths end with a blank.

        Args:
            num_frames: encoder frames.
            windows: for each label, its first and its last frame. Neither may fall from one label
                to the next.

        Example:
            >>> two_or_four = tdt_topology((2, 4))
            >>> [two_or_four.has_path(8, [(first, first)]) for first in (2, 3)]
            [True, False]
        """
        if num_frames < 1:
            return False
        reached = 1  # bit t: the path can be at frame t
        for first, last in windows:
            reached = self._after_blanks(reached, min(last, num_frames - 1))
            emitting = reached >> max(0, first) << max(0, first)
            reached = _advanced(emitting, self.label_durations) & ((1 << num_frames) - 1)
        end = _advanced(self._after_blanks(reached, num_frames - 1), self.blank_durations)
        return bool(end >> num_frames & 1)

    def _after_blanks(self, reached: int, last: int) -> int:
        """Return the frames, up to the last, that any number of blanks leads to."""
        frames = (1 << max(0, last + 1)) - 1
        new = reached = reached & frames
        while new:
            new = _advanced(new, self.blank_durations) & frames & ~reached
            reached |= new
        return reached


@functools.lru_cache(maxsize=4096)
def _durations_fill(topology: Topology, num_frames: int, num_targets: int) -> bool:
    """Whether some durations of that many labels and of at least one blank add up to the frames."""
    return topology.has_path(num_frames, [(0, num_frames - 1)] * num_targets)


def _advanced(reached: int, durations: tuple[int, ...]) -> int:
    return functools.reduce(int.__or__, (reached << frames for frames in durations))


def tdt_topology(durations: Sequence[int]) -> Topology:
    """Return the topology of a token-and-duration transducer (TDT).

    Args:
        durations: frames that an arc may advance, distinct and ascending, at least 0, the last at
            least 1 and at most 10000. Those of 0 are for labels only.

    Raises:
        ValueError: these are no such durations.

    Example:
        >>> tdt_topology((0, 1, 2)).name, tdt_topology((0, 1, 2)).blank_durations
        ('tdt-0-1-2', (1, 2))
    """
    durations = tuple(durations)
    _check_durations(durations, "durations")
    ascending = all(left < right for left, right in itertools.pairwise(durations))
    if not durations or not ascending or durations[0] < 0 or durations[-1] < 1:
        raise ValueError(
            "durations: expected distinct integers of at least 0 in ascending order, one of them "
            f"at least 1, got {durations}"
        )
    if len(durations) > MAX_DURATIONS:
        raise ValueError(f"durations: expected at most {MAX_DURATIONS}, got {len(durations)}")
    return Topology(
        _name_of("tdt", durations),
        blank_durations=tuple(frames for frames in durations if frames > 0),
        label_durations=durations,
        ends_with_label=False,
        predicts_durations=True,
    )


def multi_blank_topology(big_blank_durations: Sequence[int]) -> Topology:
    """Return the topology of a multi-blank transducer.

    Args:
        big_blank_durations: frames that the big blanks advance, distinct, each at least 2 and at
            most 10000.

    Raises:
        ValueError: these are no such durations.

    Example:
        >>> multi_blank_topology((2, 4)).name, multi_blank_topology((2, 4)).blank_durations
        ('multi_blank-2-4', (1, 2, 4))
    """
    durations = tuple(big_blank_durations)
    _check_durations(durations, "big_blank_durations")
    too_short = any(frames < 2 for frames in durations)
    if not durations or too_short or len(set(durations)) < len(durations):
        raise ValueError(
            f"big_blank_durations: expected distinct integers of at least 2, got {durations}"
        )
    if len(durations) > MAX_BIG_BLANKS:
        raise ValueError(
            f"big_blank_durations: expected at most {MAX_BIG_BLANKS}, got {len(durations)}"
        )
    return Topology(
        _name_of("multi_blank", durations),
        blank_durations=(1, *durations),
        label_durations=(0,),
        ends_with_label=False,
    )


def _check_durations(durations: tuple[int, ...], name: str) -> None:
    for frames in durations:
        is_int = isinstance(frames, numbers.Integral) and not isinstance(frames, bool)
        if not is_int or frames > MAX_DURATION:
            raise ValueError(
                f"{name}: expected integers of at most {MAX_DURATION}, got {repr(frames)[:50]}"
            )


def _name_of(kind: str, durations: tuple[int, ...]) -> str:
    return "-".join([kind, *(str(frames) for frames in durations)])


# Topologies that a name and durations make: "tdt-0-1-2-3-4", "multi_blank-2-4-8".
_FAMILIES = {"tdt": tdt_topology, "multi_blank": multi_blank_topology}

TOPOLOGIES = {
    topology.name: topology
    for topology in (
        Topology("regular", label_durations=(0,), ends_with_label=False, is_k2=True),
        Topology("modified", is_k2=True),
        Topology("constrained", label_takes_blank=True, is_k2=True),
        Topology("one_sym_per_frame", ends_with_label=False),
    )
}
K2_TOPOLOGIES = {name: topology for name, topology in TOPOLOGIES.items() if topology.is_k2}


def get_topology(name: object, argument: str = "topology", *, k2: bool = False) -> Topology:
    """Return the topology of this name.

    Args:
        name: one of :data:`TOPOLOGIES`, or that of :func:`tdt_topology` or
            :func:`multi_blank_topology`, such as "tdt-0-1-2-3-4".
        argument: how the caller's argument is called, for the message.
        k2: accept :data:`K2_TOPOLOGIES` only.

    Raises:
        ValueError: there is no such topology, or its durations are wrong.

    Example:
        >>> get_topology("modified").label_durations
        (1,)
    """
    table = K2_TOPOLOGIES if k2 else TOPOLOGIES
    if isinstance(name, str) and not k2 and "-" in name:
        kind, *durations = name.split("-")
        if kind in _FAMILIES and all(
            part.isascii() and part.isdecimal() and len(part) < 10 for part in durations
        ):
            return _FAMILIES[kind](tuple(int(part) for part in durations))
    if not isinstance(name, str) or name not in table:
        remedy = ""
        if k2 and isinstance(name, bool):  # "modified", of older k2 and fast_rnnt
            remedy = f"; pass {'modified' if name else 'regular'!r} for modified={name}"
        families = "" if k2 else ', or with durations as in "tdt-0-1-2" and "multi_blank-2-4"'
        expected = f"expected one of {tuple(table)}{families}"
        raise ValueError(f"{argument}: {expected}, got {name!r}{remedy}")
    return table[name]


def is_feasible(num_frames: int, num_targets: int, *, topology: str = "regular") -> bool:
    """Return whether any path explains the targets.

    Args:
        num_frames: encoder frames, after subsampling.
        num_targets: labels.
        topology: a name that :func:`get_topology` knows.

    Raises:
        ValueError: there is no such topology.

    Example:
        >>> is_feasible(3, 5), is_feasible(3, 5, topology="modified")
        (True, False)
    """
    return get_topology(topology).is_feasible(num_frames, num_targets)
