# SPDX-License-Identifier: Apache-2.0
"""Joins the symbols that overlapping windows of a recording have in common."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

SAME_SYMBOL_S = 0.1  # maximum distance of the times that two windows give the same symbol
MAX_RUN = 4  # symbols that agree on each side of a joint; more make it no better


class TimedSymbol(NamedTuple):
    """A recognized symbol: token, start of its frame in seconds, log-probability."""

    token: int
    start_s: float
    log_prob: float


Span = tuple[float, float]  # start and end, seconds


def join_symbols(
    earlier: Sequence[TimedSymbol],
    later: Sequence[TimedSymbol],
    *,
    cut_s: float,
    reach_s: float,
    frame_s: float,
    word_times: Callable[[Sequence[TimedSymbol]], Iterable[Span]],
) -> tuple[list[TimedSymbol], list[TimedSymbol], bool]:
    """Join the symbols of two overlapping windows without losing or doubling any.

    The joint is a symbol that both windows have, with times at most 0.1 s apart and within
    ``reach_s`` of ``cut_s``: symbols up to it come from the earlier window, symbols after it from
    the later one. Of several, the one is used around which most symbols agree, up to four on each
    side, then the one whose times agree best, then the one nearest to ``cut_s``. Symbols, not
    words, are compared, because a script without spaces has no words in this sense.

    If there is no such symbol (in a pause, or where the windows disagree), the symbols are cut at
    the time nearest to ``cut_s`` that lies in no word of either window or, if that is farther away
    than ``reach_s``, in no symbol.

    Args:
        earlier: symbols of the earlier windows.
        later: symbols of the later window, times on the same clock.
        cut_s: middle of the overlap, seconds.
        reach_s: maximum distance of the joint from the middle, seconds.
        frame_s: duration of an encoder frame, seconds.
        word_times: start and end of the words of symbols.

    Returns:
        The symbols to keep of the earlier and of the later window, and whether they are joined at a
        common symbol.

    Example:
        >>> def symbols(text, start_s):
        ...     return [TimedSymbol(ord(c), start_s + 0.2 * k, 0.0) for k, c in enumerate(text)]
        >>> earlier, later, _ = join_symbols(
        ...     symbols("abcdex", 0.0), symbols("ycdefgh", 0.22), cut_s=0.6, reach_s=0.5,
        ...     frame_s=0.04, word_times=lambda symbols: [],
        ... )
        >>> "".join(chr(symbol.token) for symbol in earlier + later)
        'abcdefgh'
    """
    pairs = {
        (i, j): abs(one.start_s - other.start_s)
        for i, one in enumerate(earlier)
        for j, other in enumerate(later)
        if one.token == other.token and abs(one.start_s - other.start_s) <= SAME_SYMBOL_S
    }

    def agreeing(i: int, j: int, step: int) -> int:
        count = 1
        while count < MAX_RUN and (i + count * step, j + count * step) in pairs:
            count += 1
        return count

    joints = []
    for (i, j), apart_s in pairs.items():
        distance_s = abs((earlier[i].start_s + later[j].start_s) / 2 - cut_s)
        if distance_s <= reach_s:
            run = min(agreeing(i, j, -1), agreeing(i, j, 1))
            joints.append((-run, round(apart_s, 3), distance_s, i, j))
    if joints:
        *_, i, j = min(joints)
        return [*earlier[: i + 1]], [*later[j + 1 :]], True
    free_s = _nearest_free([*word_times(earlier), *word_times(later)], cut_s)
    if abs(free_s - cut_s) > reach_s:
        starts_s = [symbol.start_s for symbol in (*earlier, *later)]
        free_s = _nearest_free([(start_s, start_s + frame_s) for start_s in starts_s], cut_s)
    return (
        [symbol for symbol in earlier if symbol.start_s < free_s],
        [symbol for symbol in later if symbol.start_s >= free_s],
        False,
    )


def _nearest_free(spans: Sequence[Span], time_s: float) -> float:
    """Return the time nearest to ``time_s`` that lies in no span.

    Example:
        >>> _nearest_free([(1.0, 2.0), (1.5, 3.0)], 2.25)
        3.0
    """
    before = after = time_s
    for start_s, end_s in sorted(spans):
        if start_s < after < end_s:
            after = end_s
    for start_s, end_s in sorted(spans, key=lambda span: -span[1]):
        if start_s < before < end_s:
            before = start_s
    return before if time_s - before <= after - time_s else after
