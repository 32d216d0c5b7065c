# SPDX-License-Identifier: Apache-2.0
"""The manifest: one utterance per JSON line, audio paths relative to the manifest's folder."""

from __future__ import annotations

import codecs
import dataclasses
import itertools
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transducer_toolkit.data.audio import check_channel, open_audio
from transducer_toolkit.data.durations import Durations
from transducer_toolkit.ops.checks import shortened

__all__ = ["Utterance", "read_manifest", "write_manifest"]

MAX_TIME_S = 1e9  # thirty years; an int64 holds its samples and lattice cells


@dataclass(frozen=True, slots=True)
class Utterance:
    """One row of a manifest.

    Args:
        id: unique within the manifest; also keys the utterance's augmentation.
        audio: path of an audio file that soundfile reads (wav, flac, ogg, mp3, ...).
        duration_s: length of the utterance in seconds, > 0.
        text: transcript; may be empty.
        offset_s: start of the utterance in the file, seconds.
        speaker: speaker or voice, if known.
        word_starts_s: start of each word of ``text``, in seconds from the start of the utterance,
            if known; with it, tests measure how late the model emits (symbol delay).
        extra: other JSON values; the package keeps but does not use them.
        channel: number of the channel of ``audio`` that holds the utterance, from 0, or "mix" for
            the average of the channels.

    Raises:
        TypeError: a field has the wrong type.
        ValueError: ``id`` or ``audio`` is empty, a time is negative, not finite or above 1e9,
            ``channel`` is unknown, or ``word_starts_s`` is not one time a word, in order, within
            the utterance.

    Example:
        >>> Utterance(id="a", audio="a.wav", duration_s=1.5, text="three seven")
        Utterance(id='a', audio='a.wav', duration_s=1.5, text='three seven', offset_s=0.0, \
speaker=None, word_starts_s=None, extra={}, channel='mix')
    """

    id: str
    audio: str
    duration_s: float
    text: str
    offset_s: float = 0.0
    speaker: str | None = None
    word_starts_s: Sequence[float] | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)
    channel: int | str = "mix"

    def __post_init__(self) -> None:
        for name in ("id", "audio", "text"):
            value = getattr(self, name)
            if not isinstance(value, str):
                raise TypeError(f"{name} must be str, got {type(value).__name__}: {value!r}")
        for name in ("id", "audio"):
            if not getattr(self, name):
                raise ValueError(f"{name} must not be empty")
        if self.speaker is not None and not isinstance(self.speaker, str):
            raise TypeError(f"speaker must be str or None, got {type(self.speaker).__name__}")
        if not isinstance(self.extra, Mapping):
            raise TypeError(f"extra must be a mapping, got {type(self.extra).__name__}")
        check_channel(self.channel)
        if self.channel == "each":
            raise ValueError("channel: expected 'mix' or a number for an utterance, got 'each'")
        for name in ("duration_s", "offset_s"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise TypeError(f"{name} must be a number, got {type(value).__name__}: {value!r}")
            # Compared, not given to math.isfinite: an int may be too large for a float.
            if MAX_TIME_S < value < math.inf:
                raise ValueError(f"{name} must be at most {MAX_TIME_S:g}, got {value}")
            if not 0 <= value < math.inf:
                raise ValueError(f"{name} must be finite and not negative, got {value}")
        if self.duration_s == 0:
            raise ValueError("duration_s must be positive, got 0")
        if self.word_starts_s is not None:
            self._check_word_starts(self.word_starts_s)

    def _check_word_starts(self, starts: Any) -> None:
        if not isinstance(starts, list | tuple) or not all(
            isinstance(start, int | float) and not isinstance(start, bool) for start in starts
        ):
            raise TypeError(f"word_starts_s must be a list of numbers or None, got {starts!r}")
        num_words = len(self.text.split())
        if len(starts) != num_words:
            raise ValueError(
                f"word_starts_s must hold one time a word of text, {num_words}, got {len(starts)}"
            )
        bounds = [0.0, *starts, self.duration_s]
        # A chain of comparisons: NaN fails it.
        if not all(before <= after for before, after in itertools.pairwise(bounds)):
            raise ValueError(
                f"word_starts_s must rise within [0, {self.duration_s}], the utterance, "
                f"got {list(starts)}"
            )


_FIELDS = tuple(f.name for f in dataclasses.fields(Utterance))
_NEMO_FIELDS = {"audio_filepath": "audio", "duration": "duration_s", "offset": "offset_s"}


def read_manifest(path: str | os.PathLike[str], *, channel: int | str = "mix") -> list[Utterance]:
    """Read a manifest; relative audio paths are resolved against its folder and stay within it.

    Audio elsewhere needs an absolute path, which :func:`write_manifest` writes. So a manifest that
    comes with a corpus cannot refer to other files by a path that looks harmless.

    ``id`` and ``duration_s`` may be missing. The id is then the audio path of the line without its
    suffix, and the utterance ends with the file. Computed durations stay in the user's cache until
    the audio file changes.

    A line of a NeMo manifest (``audio_filepath``, ``duration``, ``offset``, ``text``) is read too;
    its other fields become ``extra``.

    Args:
        path: JSON-lines file in UTF-8, one :class:`Utterance` per line; blank lines are skipped.
        channel: channel of lines that name none: "mix", a number from 0, or "each", which makes an
            utterance of each channel of the file, with ``#`` and the number added to its id.

    Returns:
        The utterances in file order.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line is not a valid utterance, repeats an id or leaves the folder by ``..``,
            or its duration is missing and the audio cannot be read; the message names file and
            line.

    Example:
        >>> utterances = read_manifest("data/train.jsonl")  # doctest: +SKIP
    """
    check_channel(channel)
    path = Path(path)
    utterances: list[Utterance] = []
    line_of_id: dict[str, int] = {}
    if path.exists() and not path.is_file() and not path.is_dir():
        raise ValueError(f"{path} is no regular file")  # to open a pipe would wait for a writer
    # Decoded line by line, to know which cannot be.
    with path.open("rb") as file, Durations(path) as durations:
        for number, line in enumerate(file, start=1):
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            if not line.strip():
                continue
            try:
                row = _own_fields(json.loads(line.decode()))
                has_id = "id" in row
                if "channel" not in row and channel != "each":
                    row = {**row, "channel": channel}
                utterance = _utterance(row, path.parent, durations)
                found = _channels(utterance) if "channel" not in row else [utterance]
            except (TypeError, ValueError, OSError, RecursionError) as error:
                raise ValueError(f"{path}, line {number}: {shortened(str(error))}") from error
            for utterance in found:
                if utterance.id in line_of_id:
                    first = line_of_id[utterance.id]
                    advice = "" if has_id else ", made of the audio path: give both lines an id"
                    raise ValueError(
                        f"{path}, line {number}: id {shortened(repr(utterance.id))} already stands "
                        f"in line {first}{advice}"
                    )
                line_of_id[utterance.id] = number
            utterances += found
    return utterances


def _channels(utterance: Utterance) -> list[Utterance]:
    """Return an utterance for each channel of the file."""
    with open_audio(utterance.audio) as file:
        num_channels = file.channels
    if num_channels == 1:
        return [utterance]
    return [
        dataclasses.replace(utterance, id=f"{utterance.id}#{number}", channel=number)
        for number in range(num_channels)
    ]


def _own_fields(row: Any) -> dict[str, Any]:
    """Return the fields of a line under the names of :class:`Utterance`."""
    if not isinstance(row, dict):
        raise TypeError(f"expected a JSON object, got {type(row).__name__}")
    if "audio_filepath" not in row:
        unknown = sorted(set(row) - set(_FIELDS))
        if unknown:
            raise ValueError(f"unknown fields {unknown}; put them into 'extra'")
        return row
    named: dict[str, Any] = {}
    extra = dict(row.get("extra") or {})
    for name, value in row.items():
        own = _NEMO_FIELDS.get(name, name)
        if own != name and own in row:
            raise ValueError(f"both {name!r} and {own!r} are given; remove one")
        if own == "extra":
            continue
        if own in _FIELDS:
            named[own] = value
        else:
            extra[name] = value
    if isinstance(named.get("speaker"), int):
        named["speaker"] = str(named["speaker"])
    return {**named, "extra": extra}


def _utterance(row: dict[str, Any], folder: Path, durations: Durations) -> Utterance:
    """Return the utterance of a line with what is missing, and its audio path resolved."""
    missing = [name for name in ("audio", "text") if name not in row]
    if missing:
        raise ValueError(f"{' and '.join(missing)} missing")
    audio = row["audio"]
    if isinstance(audio, str) and _climbs(audio):
        raise ValueError(
            f"audio {audio!r} lies outside of the manifest's folder: give its absolute path"
        )
    filled = dict(row)
    if isinstance(audio, str) and audio:  # otherwise Utterance raises
        filled.setdefault("id", os.path.splitext(os.path.normpath(audio))[0])
        filled["audio"] = str(folder / audio)
    else:
        filled.setdefault("id", "-")
    if "duration_s" not in row:
        # Any duration will do to check the other fields before the audio is read.
        checked = Utterance(**{**filled, "duration_s": MAX_TIME_S})
        file_s = durations(checked.audio)
        if checked.offset_s >= file_s:
            raise ValueError(f"offset_s={checked.offset_s}, but {audio} ends after {file_s:.2f} s")
        filled["duration_s"] = file_s - checked.offset_s
    return Utterance(**filled)


def _climbs(audio: str) -> bool:
    """Whether a relative path leads out of where it starts."""
    return not os.path.isabs(audio) and os.path.normpath(audio).split(os.sep)[0] == os.pardir


def write_manifest(path: str | os.PathLike[str], utterances: Iterable[Utterance]) -> None:
    """Write a manifest atomically; audio below its folder is stored relative to it.

    Args:
        path: file to write; its folder must exist. A reader sees the old file or the whole new
            one, never a part.
        utterances: rows, in order.

    Example:
        >>> write_manifest("train.jsonl", utterances)  # doctest: +SKIP
    """
    path = Path(path)
    folder = path.parent.absolute()
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            for utterance in utterances:
                row = {name: getattr(utterance, name) for name in _FIELDS}
                row["extra"] = dict(utterance.extra)
                if utterance.channel == "mix":
                    del row["channel"]
                audio = Path(utterance.audio).absolute()
                if audio.is_relative_to(folder):
                    row["audio"] = audio.relative_to(folder).as_posix()
                else:
                    row["audio"] = str(audio)
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
