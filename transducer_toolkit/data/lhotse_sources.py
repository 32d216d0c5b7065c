# SPDX-License-Identifier: Apache-2.0
"""Where the audio of a cut may come from: a manifest is data, and Lhotse would run what it says."""

from __future__ import annotations

import dataclasses
import os
import shlex
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from lhotse.audio import AudioSource
from lhotse.cut import Cut

__all__ = ["LOCAL_SOURCES", "SOURCE_TYPES", "check_audio_sources"]

SOURCE_TYPES = ("file", "memory", "url", "command")
LOCAL_SOURCES = ("file", "memory")
_ARCHIVE = ".tar/"  # Lhotse reads members of archives by such paths


def check_audio_sources(cut: Cut, allowed: Collection[str] = LOCAL_SOURCES) -> None:
    """Refuse a cut whose audio does not come from where it may.

    Lhotse gives a source of type ``command`` to a shell and fetches one of type ``url``, and to
    decode SPHERE files, or Opus with ``LHOTSE_LEGACY_OPUS_LOADING``, it gives their names to a
    shell. Sources that hide in transforms (a room's impulse response) and in tracks are looked at
    too.

    Args:
        cut: before its audio is loaded.
        allowed: of :data:`SOURCE_TYPES`.

    Raises:
        ValueError: a source is of another type, or is called a file and is none, or its name would
            be more to a shell than a name.

    Example:
        >>> check_audio_sources(CutSet.from_file("cuts.jsonl.gz")[0])  # doctest: +SKIP
    """
    for type_, source in _sources(cut):
        if type_ == "shar":
            continue  # a place that no shard has filled: Lhotse says so
        if type_ not in allowed:
            raise ValueError(
                f"its audio is of type {type_!r} ({_shortened(source)}) and only "
                f"{', '.join(allowed)} are allowed: a url is fetched, a command is run by a shell; "
                "if you trust the manifest, add the type to data.audio_sources"
            )
        if type_ == "file":
            _check_file(str(source))


def _check_file(path: str) -> None:
    archive = path.partition(_ARCHIVE)[0] + _ARCHIVE[:-1] if _ARCHIVE in path else path
    # Also what other backends take for an address: "pipe:...", "https://...", "concat:...".
    if not os.path.isfile(archive):
        raise ValueError(f"no audio file at {path!r}")
    kind = path.lower()
    if (kind.endswith(".sph") and shlex.quote(path) != path) or (
        kind.endswith(".opus") and "'" in path
    ):
        raise ValueError(f"rename {_shortened(path)}: Lhotse gives such names to a shell")


def _sources(value: Any) -> Iterator[tuple[str, Any]]:
    """Type and source of all audio sources within a cut."""
    if isinstance(value, AudioSource):
        yield value.type, value.source
    elif isinstance(value, Mapping):
        # A recording within a transform stays a dictionary until it is needed.
        if value.get("type") in SOURCE_TYPES and "source" in value:
            yield value["type"], value["source"]
        for part in value.values():
            yield from _sources(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _sources(part)
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from _sources(getattr(value, field.name))


def _shortened(source: Any) -> str:
    text = repr(source)
    return text if len(text) <= 80 else text[:77] + "..."
