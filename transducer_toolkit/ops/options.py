# SPDX-License-Identifier: Apache-2.0
"""The options of a loss, checked when they are made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from transducer_toolkit.ops import checks, native
from transducer_toolkit.ops.topology import Topology, get_topology

PRECISIONS = ("auto", "full")
NORMALIZATIONS = ("softmax", "hat")


@dataclass(frozen=True)
class LossOptions:
    """The options of a transducer loss, from the public function down to stage 3.

    Attributes:
        blank: index of the blank.
        topology: a name that :func:`~transducer_toolkit.ops.topology.get_topology` knows. With a
            token-and-duration topology, the last columns of the logits are those of durations;
            with a multi-blank topology, some of the symbols are big blanks.
        from_log_softmax: the logits are log-probabilities already.
        fastemit_lambda: label posteriors count ``1 + fastemit_lambda`` times in the gradient.
        delay_penalty: is added to label scores times ``(T - 1) / 2 - t``.
        clamp: bound on the magnitude of d loss_b / d logit; 0 or less is off.
        validate: read labels and lengths to check them; None does so where they are on the CPU.
        blank_may_be_target: accept labels equal to blank, as k2 does.
        sigma: is subtracted from the log-probability of every symbol; 0 unless the topology has
            durations or big blanks.
        normalization: "softmax" of all symbols, or "hat": blank has a sigmoid of its own, and the
            labels share the rest by their softmax.

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
    sigma: float = 0.0
    normalization: str = "softmax"

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
        checks.check_int(self.blank, "blank")
        checks.check_not_negative("sigma", self.sigma)
        if self.num_extra and self.from_log_softmax:
            raise ValueError(
                f"from_log_softmax: expected False with topology {self.topology!r}, got True"
            )
        if self.sigma != 0 and not self.num_extra:
            raise ValueError(
                "sigma: expected 0 without durations (TDT) or big blanks (multi-blank), got "
                f"{self.sigma}"
            )
        checks.check_choice(self.normalization, "normalization", NORMALIZATIONS)
        if self.is_hat and (self.from_log_softmax or self.arcs.num_big_blanks):
            other = "from_log_softmax" if self.from_log_softmax else "big blanks"
            raise ValueError(f"normalization: expected 'softmax' with {other}, got 'hat'")
        for name in ("fastemit_lambda", "delay_penalty", "clamp", "sigma"):
            object.__setattr__(self, name, float(getattr(self, name)))  # operators want floats

    @classmethod
    def check(cls, arguments: Mapping[str, Any]) -> None:
        """Checks those of the arguments that are options; raises the same errors."""
        names = cls.__dataclass_fields__  # torch.compile traces this, but not dataclasses.fields
        cls(**{name: value for name, value in arguments.items() if name in names})

    @property
    def is_hat(self) -> bool:
        return self.normalization == "hat"

    @property
    def arcs(self) -> Topology:
        """The arcs of the lattice."""
        return get_topology(self.topology)

    @property
    def num_extra(self) -> int:
        """Scores of a cell beside those of blank and label: of durations, or of big blanks."""
        return self.arcs.num_extra

    def vocab_size(self, num_columns: int) -> int:
        """Returns the number of symbols, blanks included, of logits with so many columns."""
        return num_columns - self.arcs.num_durations


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

    def arguments(self) -> dict[str, Any]:
        """Returns the keyword arguments of :func:`~transducer_toolkit.fused_joiner_loss`."""
        options = asdict(self)
        del options["from_log_softmax"], options["blank_may_be_target"]  # it computes the logits
        return options
