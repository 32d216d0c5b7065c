# SPDX-License-Identifier: Apache-2.0
"""Rules that say where an utterance of a stream ends."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields


@dataclass(frozen=True)
class EndpointRules:
    """The three rules by which Kaldi and sherpa-onnx end an utterance; one of them is enough.

    Silence is the time since the last symbol. A model emits a symbol some time after its sound.

    Attributes:
        silence_s: seconds of silence at the start of an utterance, before any symbol.
        silence_after_text_s: seconds of silence after a symbol.
        duration_s: seconds since the start of the utterance.

    ``math.inf`` switches a rule off.

    Raises:
        TypeError: if a value is not a number.
        ValueError: if a value is not positive.

    Example:
        >>> rules = EndpointRules(silence_after_text_s=0.8)
        >>> rules.are_met(duration_s=3.0, silence_s=1.0, has_text=True)
        True
        >>> rules.are_met(duration_s=1.0, silence_s=1.0, has_text=False)
        False

    Source: Kaldi's ``online-endpoint.h``, rules 1, 2 and 5.
    """

    silence_s: float = 2.4
    silence_after_text_s: float = 1.2
    duration_s: float = 20.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise TypeError(f"{field.name}: expected seconds, got {value!r}")
            if math.isnan(value) or value <= 0:
                raise ValueError(
                    f"{field.name}: expected more than 0 seconds, got {value}; math.inf switches "
                    "the rule off"
                )

    def are_met(self, *, duration_s: float, silence_s: float, has_text: bool) -> bool:
        """Return whether the utterance ends here.

        Args:
            duration_s: seconds since the start of the utterance.
            silence_s: seconds since its last symbol, or since its start without one.
            has_text: whether it has a symbol.
        """
        bound_s = self.silence_after_text_s if has_text else self.silence_s
        return silence_s >= bound_s or duration_s >= self.duration_s
