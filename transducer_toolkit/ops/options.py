# SPDX-License-Identifier: Apache-2.0
"""The options of a loss, checked when they are made."""

from __future__ import annotations

from dataclasses import dataclass

from transducer_toolkit.ops import checks, native
from transducer_toolkit.ops.topology import (
    Topology,
    get_topology,
    multi_blank_topology,
    tdt_topology,
)

PRECISIONS = ("auto", "full")


@dataclass(frozen=True)
class LossOptions:
    """What every transducer loss can be told, from the public function down to stage 3.

    Attributes:
        blank: index of the blank.
        topology: a name of :data:`~transducer_toolkit.ops.topology.TOPOLOGIES`.
        from_log_softmax: the logits are log-probabilities already.
        fastemit_lambda: label posteriors count ``1 + fastemit_lambda`` times in the gradient.
        delay_penalty: is added to label scores times ``(T - 1) / 2 - t``.
        clamp: bound of the magnitude of d loss_b / d logit; 0 or less is off.
        validate: read labels and lengths to check them; None does so where they are on the CPU.
        blank_may_be_target: accept labels equal to blank, as k2 does.
        durations: of a token-and-duration transducer: the frames that an arc may advance. The
            logits have one more column for each. Otherwise empty.
        big_blank_durations: of a multi-blank transducer: the frames that the symbols blank - 1,
            blank - 2, ... advance. Otherwise empty.
        sigma: is subtracted from the log-probability of every symbol, in these two.

    Raises:
        TypeError: a value has the wrong type.
        ValueError: a value is out of range; names it.

    Example:
        >>> LossOptions(blank=0, topology="modified").fastemit_lambda
        0.0
    """

    blank: int
    topology: str = "regular"
    from_log_softmax: bool = False
    fastemit_lambda: float = 0.0
    delay_penalty: float = 0.0
    clamp: float = 0.0
    validate: bool | None = None
    blank_may_be_target: bool = False
    durations: tuple[int, ...] = ()
    big_blank_durations: tuple[int, ...] = ()
    sigma: float = 0.0

    def __post_init__(self) -> None:
        get_topology(self.topology)
        checks.check_flag(self.from_log_softmax, "from_log_softmax")
        checks.check_not_negative("fastemit_lambda", self.fastemit_lambda)
        checks.check_not_negative("delay_penalty", self.delay_penalty)
        checks.check_number(self.clamp, "clamp")
        if self.clamp != self.clamp:  # NaN; torch.compile traces this, but not math.isnan
            raise ValueError("clamp: expected a number, got nan")
        if self.validate is not None:
            checks.check_flag(self.validate, "validate")
        self._check_durations()
        # An operator takes floats only, and gives lists.
        for name in ("fastemit_lambda", "delay_penalty", "clamp", "sigma"):
            object.__setattr__(self, name, float(getattr(self, name)))
        for name in ("durations", "big_blank_durations"):
            object.__setattr__(self, name, tuple(getattr(self, name)))

    def _check_durations(self) -> None:
        checks.check_int(self.blank, "blank")
        checks.check_not_negative("sigma", self.sigma)
        checks.check_durations(self.durations)
        checks.check_big_blank_durations(self.big_blank_durations)
        if self.num_extra == 0:
            if self.sigma != 0:
                raise ValueError(
                    f"sigma: expected 0 without durations or big_blank_durations, got {self.sigma}"
                )
            return
        name = "durations" if self.durations else "big_blank_durations"
        if self.durations and self.big_blank_durations:
            raise ValueError("big_blank_durations: expected none beside durations")
        if self.topology != "regular":
            raise ValueError(f"topology: expected 'regular' with {name}, got {self.topology!r}")
        if self.from_log_softmax:
            raise ValueError(f"from_log_softmax: expected False with {name}, got True")
        if len(self.big_blank_durations) > self.blank:
            raise ValueError(
                f"big_blank_durations: expected at most {self.blank}, since big blanks are the "
                f"symbols before blank = {self.blank}, got {len(self.big_blank_durations)}"
            )

    @property
    def num_extra(self) -> int:
        """Scores of a cell beside those of blank and label: of durations, or of big blanks."""
        return len(self.durations) + len(self.big_blank_durations)

    @property
    def arcs(self) -> Topology:
        """The arcs of the lattice."""
        if self.durations:
            return tdt_topology(self.durations)
        if self.big_blank_durations:
            return multi_blank_topology(self.big_blank_durations)
        return get_topology(self.topology)

    def vocab_size(self, num_columns: int) -> int:
        """Returns the number of symbols, blank included, of logits with so many columns."""
        return num_columns - len(self.durations)

    @property
    def blanks(self) -> range:
        """The symbols that no target may be: blank and big blanks, or none."""
        if self.blank_may_be_target:
            return range(0)
        return range(self.blank - len(self.big_blank_durations), self.blank + 1)


@dataclass(frozen=True)
class FusedOptions(LossOptions):
    """The options of a loss whose joiner is part of it.

    Attributes:
        activation: one of native.ACTIVATIONS.
        dropped_mass: the occupancy that backward may leave out, relative to ``T_b + U_b``.
        tile_cells: cells of a tile; None chooses.
        precision: one of PRECISIONS. "auto" computes cells that hardly matter in low precision
            where that is faster; "full" never does.
    """

    activation: str = "tanh"
    dropped_mass: float = 1e-7
    tile_cells: int | None = None
    precision: str = "auto"

    def __post_init__(self) -> None:
        LossOptions.__post_init__(self)
        checks.check_choice(self.activation, "activation", native.ACTIVATIONS)
        checks.check_choice(self.precision, "precision", PRECISIONS)
        checks.check_number(self.dropped_mass, "dropped_mass")
        if not 0 <= self.dropped_mass < 1:
            raise ValueError(
                f"dropped_mass: expected 0 <= dropped_mass < 1, got {self.dropped_mass}"
            )
        cells = self.tile_cells
        is_int = isinstance(cells, int) and not isinstance(cells, bool)
        if cells is not None and (not is_int or cells < 1):
            raise ValueError(f"tile_cells: expected None or an int of at least 1, got {cells}")
        object.__setattr__(self, "dropped_mass", float(self.dropped_mass))
