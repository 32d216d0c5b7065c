# SPDX-License-Identifier: Apache-2.0
"""Alignments of training texts: the times of their symbols, from files of ``transducer-align``."""

from __future__ import annotations

import itertools
import json
import os
import re
import reprlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transducer_toolkit.data.byte_pieces import shown_symbols
from transducer_toolkit.data.manifest import MAX_TIME_S

__all__ = ["Alignments", "file_names", "file_stem"]

HOW_TO_MAKE = (
    "make them with: transducer-align --checkpoint CHECKPOINT --manifest MANIFEST --format json "
    "--output-dir DIR"
)
# A hostile file holds values of any length, and a message is one line of a terminal.
_SHOWN = reprlib.Repr()
_SHOWN.maxlist = 12


def file_stem(utterance_id: str) -> str:
    """Return the name of an utterance's alignment without its suffix: the id, with ``_`` for
    special characters.

    Example:
        >>> file_stem("set/a 2")
        'set_a_2'
    """
    return re.sub(r"[^\w.+-]", "_", utterance_id)


def file_names(ids: Sequence[str]) -> list[str]:
    """Return names of files, without suffix, for the ids of a manifest.

    Raises:
        ValueError: two ids get the same name.

    Example:
        >>> file_names(["a1", "set/a 2"])
        ['a1', 'set_a_2']
    """
    names = [file_stem(id_) for id_ in ids]
    id_of: dict[str, str] = {}
    for name, id_ in zip(names, ids, strict=True):
        if id_of.setdefault(name, id_) != id_:
            raise ValueError(f"the ids {id_of[name]!r} and {id_!r} would share the file {name!r}")
    return names


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
        """Raise a ValueError that names an utterance without a file of its own."""
        try:
            file_names(utterance_ids)
        except ValueError as error:
            raise ValueError(f"{self.folder}: {error}; rename one of them") from error
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
            ValueError: there is no file, or it does not fit to the symbols and the utterance, or
                its times fall; the message names the file.
        """
        path = self.folder / f"{file_stem(utterance_id)}.json"
        if not path.is_file():  # to open a pipe would wait for a writer
            raise ValueError(f"no alignment at {path}; {HOW_TO_MAKE}")
        try:
            tokens = json.loads(path.read_bytes())["tokens"]
            times = [_time_s(token) for token in tokens]
            found = [token.get("symbol") for token in tokens]
        except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
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
                f"{path}: expected the {len(expected)} symbols {_SHOWN.repr(expected)} of the "
                f"text, got {len(found)}: {_SHOWN.repr(found)}; align with the tokenizer and the "
                "data.text of this training"
            )
        if times and not max(times) <= duration_s:
            raise ValueError(
                f"{path}: expected times within {duration_s:g} s, the utterance, got {max(times)}"
            )
        if any(after < before for before, after in itertools.pairwise(times)):
            raise ValueError(f"{path}: expected times that do not fall, got {_SHOWN.repr(times)}")
        return times


def _time_s(token: Any) -> float:
    time_s = token["time_s"]
    if isinstance(time_s, bool) or not isinstance(time_s, int | float):
        raise TypeError(f"time_s is {_SHOWN.repr(time_s)}")
    if not 0 <= time_s <= MAX_TIME_S:
        raise ValueError(f"time_s is {_SHOWN.repr(time_s)}")
    return float(time_s)
