# SPDX-License-Identifier: Apache-2.0
"""Durations of audio files, remembered between runs."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from transducer_toolkit.data.audio import audio_duration_s
from transducer_toolkit.data.cache import default_cache_dir, fingerprint

__all__ = ["Durations"]


class Durations:
    """Computes durations of audio files; a file in the user's cache keeps them.

    A duration is computed again when the size or the modification time of the audio file changes.

    Args:
        manifest: the manifest whose audio it is; each manifest has its own file in the cache.

    Example:
        >>> with Durations("train.jsonl") as durations:  # doctest: +SKIP
        ...     durations("speech.flac")
        3.25
    """

    def __init__(self, manifest: str | os.PathLike[str]) -> None:
        name = fingerprint(os.path.abspath(manifest))
        self._path = default_cache_dir() / "durations" / f"{name}.json"
        self._known: dict[str, list[float]] | None = None  # audio: size, mtime_ns, duration_s
        self._is_changed = False

    def __call__(self, audio: str) -> float:
        """Return the duration of an audio file, in seconds.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is not complete audio.
        """
        if self._known is None:
            self._known = self._read()
        try:
            stat = os.stat(audio)
        except OSError:
            return audio_duration_s(audio)  # its error names the file
        key = os.path.abspath(audio)
        known = self._known.get(key)
        if known is not None and known[:2] == [stat.st_size, stat.st_mtime_ns]:
            return known[2]
        duration_s = audio_duration_s(audio)
        self._known[key] = [stat.st_size, stat.st_mtime_ns, duration_s]
        self._is_changed = True
        return duration_s

    def __enter__(self) -> Durations:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._is_changed:
            self._write()

    def _read(self) -> dict[str, list[float]]:
        try:
            known = json.loads(self._path.read_text(encoding="utf-8"))
        except (OSError, ValueError):  # none yet, or damaged: compute them again
            return {}
        return known if isinstance(known, dict) else {}

    def _write(self) -> None:
        partial = Path(f"{self._path}.{os.getpid()}.partial")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            partial.write_text(json.dumps(self._known), encoding="utf-8")
            partial.replace(self._path)
        except OSError:  # a cache that cannot be written only costs time
            with suppress(OSError):
                partial.unlink()
