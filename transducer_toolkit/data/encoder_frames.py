# SPDX-License-Identifier: Apache-2.0
"""The number of encoder frames of an utterance, known without the encoder."""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable
from typing import Any

import numpy as np

__all__ = ["EncoderFrames", "min_samples", "too_short"]

MAX_SAMPLES = 60 * 16000  # an encoder makes a frame of a minute of audio


class EncoderFrames:
    """Tabulates an encoder's ``num_output_frames``.

    Data workers need the counts, but must not get a copy of the encoder, whose weights may be on a
    GPU. The counts of up to 2,048 feature frames are tabulated. They continue exactly: the output
    of strided layers grows by the same number of frames with every further period of input frames.

    Args:
        num_output_frames: feature frames to encoder frames, such as
            :meth:`transducer_toolkit.modules.Encoder.num_output_frames`.

    Raises:
        ValueError: the counts do not grow evenly.
        TypeError: ``num_output_frames`` cannot be called, or returns no int.

    Example:
        >>> num_frames = EncoderFrames(lambda num_frames: -(-num_frames // 8))
        >>> num_frames(9), num_frames(100_001)
        (2, 12501)
    """

    TABLE_FRAMES = 2048
    MAX_PERIOD = 512

    def __init__(self, num_output_frames: Callable[[int], int]) -> None:
        if not callable(num_output_frames):
            raise TypeError(
                "num_output_frames: expected the encoder's method of this name, got "
                f"{type(num_output_frames).__name__} {num_output_frames!r}"
            )
        counts = [num_output_frames(num_frames) for num_frames in range(1, self.TABLE_FRAMES)]
        for count in counts:
            if not isinstance(count, int) or isinstance(count, bool):
                raise TypeError(
                    f"num_output_frames: expected a function to int, got {type(count).__name__}"
                )
        self._counts = np.array([0, *counts], dtype=np.int64)
        self._period, self._growth = self._find_period()

    def __call__(self, num_frames: int) -> int:
        """Return the number of encoder frames of ``num_frames`` feature frames."""
        beyond = num_frames - (self.TABLE_FRAMES - 1)
        periods = max(0, -(-beyond // self._period))
        return int(self._counts[num_frames - periods * self._period]) + periods * self._growth

    def _find_period(self) -> tuple[int, int]:
        """The shortest period, in feature frames, and the encoder frames of one."""
        late = self._counts[self.TABLE_FRAMES // 2 :]
        for period in range(1, self.MAX_PERIOD + 1):
            growth = np.unique(late[period:] - late[:-period])
            if len(growth) == 1:
                return period, int(growth[0])
        raise ValueError(
            "num_output_frames: expected counts that grow evenly, as those of strided "
            f"convolutions do; up to {self.TABLE_FRAMES} feature frames they have no period of up "
            f"to {self.MAX_PERIOD}"
        )


def min_samples(features: Any, num_output_frames: Callable[[int], int]) -> int:
    """Return the fewest samples of which an encoder makes a frame.

    Args:
        features: computes the features of a waveform, as
            :class:`~transducer_toolkit.data.features.Fbank` does.
        num_output_frames: feature frames to encoder frames.

    Example:
        >>> from transducer_toolkit.data.features import Fbank
        >>> min_samples(Fbank(), lambda num_frames: num_frames // 4)
        560
    """

    def makes_a_frame(num_samples: int) -> bool:
        num_frames = features.num_frames(num_samples)
        return num_frames > 0 and num_output_frames(num_frames) > 0

    return bisect.bisect_left(range(MAX_SAMPLES), True, key=makes_a_frame)


def too_short(least: float, sample_rate: int) -> str:
    """Return what is wrong with audio of fewer samples, for a message.

    Example:
        >>> too_short(399, 16000)
        'too short for the encoder, which needs at least 0.025 s'
    """
    least_s = math.ceil(1e4 * least / sample_rate) / 1e4
    return f"too short for the encoder, which needs at least {least_s:g} s"
