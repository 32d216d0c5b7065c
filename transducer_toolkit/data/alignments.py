# SPDX-License-Identifier: Apache-2.0
"""Alignments of training texts: the times of their symbols, from files of ``transducer-align``."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transducer_toolkit.data.byte_pieces import shown_symbols
from transducer_toolkit.data.manifest import MAX_TIME_S

__all__ = ["Alignments", "file_stem"]

HOW_TO_MAKE = (
    "make them with: transducer-align --checkpoint CHECKPOINT --manifest MANIFEST --format json "
    "--output-dir DIR"
)


def file_stem(utterance_id: str) -> str:
    """Return the name of an utterance's alignment without its suffix: the id, with ``_`` for
    special characters.

    Example:
        >>> file_stem("set/a 2")
        'set_a_2'
    """
    return re.sub(r"[^\w.+-]", "_", utterance_id)


class Alignments:
    """The times at which the symbols of utterances are emitted, read from a folder.

    The folder has a file ``ID.json`` for each utterance, as ``transducer-align --output-dir``
    writes it. Of the file, ``tokens`` alone is read: a list with ``time_s``, in seconds from the
    start of the utterance, of each symbol of the text. Files of another aligner may leave out
    ``symbol``; if it is there, it must be that of the tokenizer.

    Args:
        folder: the folder.

    Raises:
        FileNotFoundError: there is no such folder.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise FileNotFoundError(f"no folder of alignments at {self.folder}; {HOW_TO_MAKE}")

    def require(self, utterance_ids: Sequence[str]) -> None:
        """Raise a ValueError that names an utterance without a file."""
        names = set(os.listdir(self.folder))
        missing = [id_ for id_ in utterance_ids if f"{file_stem(id_)}.json" not in names]
        if missing:
            raise ValueError(
                f"{self.folder}: no alignments of {len(missing)} of {len(utterance_ids)} "
                f"utterances, e.g. {file_stem(missing[0])}.json of {missing[0]!r}; {HOW_TO_MAKE}"
            )

    def times_s(self, utterance_id: str, symbols: Sequence[str], duration_s: float) -> list[float]:
        """Return the time of each symbol of an utterance, in seconds.

        Args:
            utterance_id: the utterance.
            symbols: those of its text, as the tokenizer has them.
            duration_s: of the utterance.

        Raises:
            ValueError: there is no file, or it does not fit to the symbols and the utterance; the
                message names the file.
        """
        path = self.folder / f"{file_stem(utterance_id)}.json"
        try:
            tokens = json.loads(path.read_bytes())["tokens"]
            times = [_time_s(token) for token in tokens]
            found = [token.get("symbol") for token in tokens]
        except FileNotFoundError:
            raise ValueError(f"no alignment at {path}; {HOW_TO_MAKE}") from None
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(
                f"{path}: expected an object with 'tokens', a list of objects with 'time_s', a "
                f"number of seconds: {type(error).__name__}: {error}"
            ) from error
        expected = shown_symbols(symbols)
        if len(found) != len(expected) or any(
            mine is not None and mine != wanted
            for mine, wanted in zip(found, expected, strict=False)
        ):
            raise ValueError(
                f"{path}: expected the {len(expected)} symbols {expected} of the text, got "
                f"{len(found)}: {found}; align with the tokenizer and the data.text of this "
                "training"
            )
        if times and not max(times) <= duration_s:
            raise ValueError(
                f"{path}: expected times within {duration_s:g} s, the utterance, got {max(times)}"
            )
        return times


def _time_s(token: Any) -> float:
    time_s = token["time_s"]
    if isinstance(time_s, bool) or not isinstance(time_s, int | float):
        raise TypeError(f"time_s is {time_s!r}")
    if not 0 <= time_s <= MAX_TIME_S:
        raise ValueError(f"time_s is {time_s!r}")
    return float(time_s)
