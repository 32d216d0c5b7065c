# SPDX-License-Identifier: Apache-2.0
"""Checks the audio sources of a cut: some of them make Lhotse fetch urls or run commands."""

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
_ARCHIVE = ".tar/"  # part of the path of a member of an archive


def check_audio_sources(cut: Cut, allowed: Collection[str] = LOCAL_SOURCES) -> None:
    """Raise an error if a source of a cut's audio is not allowed.

    Lhotse passes a source of type ``command`` to a shell and fetches a source of type ``url``. To
    decode SPHERE files, or Opus with ``LHOTSE_LEGACY_OPUS_LOADING``, it passes their names to a
    shell. Sources in transforms (a room's impulse response) and in tracks are checked too.

    Args:
        cut: a cut whose audio was not loaded yet.
        allowed: some of :data:`SOURCE_TYPES`.

    Raises:
        ValueError: a source is of another type, is called a file and is none, or has a name that
            a shell would not take literally.

    Example:
        >>> check_audio_sources(CutSet.from_file("cuts.jsonl.gz")[0])  # doctest: +SKIP
    """
    for type_, source in _sources(cut):
        if type_ == "shar":
            continue  # a placeholder for the shard's audio; if it is missing, Lhotse raises
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
    # This also refuses addresses of other backends: "pipe:...", "https://...", "concat:...".
    if not os.path.isfile(archive):
        raise ValueError(f"no audio file at {path!r}")
    kind = path.lower()
    if (kind.endswith(".sph") and shlex.quote(path) != path) or (
        kind.endswith(".opus") and "'" in path
    ):
        raise ValueError(f"rename {_shortened(path)}: Lhotse gives such names to a shell")


def _sources(value: Any) -> Iterator[tuple[str, Any]]:
    """Yield type and source of each audio source within a cut."""
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
