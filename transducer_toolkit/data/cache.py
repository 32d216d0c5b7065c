# SPDX-License-Identifier: Apache-2.0
"""Folders that are made once: complete or absent, even if a process is killed meanwhile."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from filelock import FileLock

__all__ = ["build_once", "default_cache_dir", "fingerprint"]


def default_cache_dir() -> Path:
    """Return ``$XDG_CACHE_HOME/transducer_toolkit``, else ``~/.cache/transducer_toolkit``."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "transducer_toolkit"


def fingerprint(recipe: Any) -> str:
    """Return 12 hexadecimal digits that identify a JSON-serializable recipe.

    Example:
        >>> fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1})
        True
    """
    text = json.dumps(recipe, sort_keys=True, ensure_ascii=False)
    return hashlib.blake2b(text.encode(), digest_size=6).hexdigest()


def build_once(folder: str | os.PathLike[str], build: Callable[[Path], None]) -> Path:
    """Make ``folder`` by calling ``build``, unless it exists.

    ``build`` fills a temporary folder next to it, which is renamed when it is complete. Other
    processes wait for it. The lock of a killed process is released, and the next process removes
    the incomplete folder that the killed one left.

    Args:
        folder: the folder to make.
        build: called with an empty folder to fill; its exceptions are passed on.

    Returns:
        ``folder``.

    Example:
        >>> build_once("cache/corpus-1f0c", lambda path: (path / "a").touch())  # doctest: +SKIP
    """
    folder = Path(folder)
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{folder.name}.partial-"
    with FileLock(folder.with_name(f".{folder.name}.lock")):
        if folder.is_dir():  # made while we waited
            return folder
        for abandoned in folder.parent.glob(f"{prefix}*"):
            shutil.rmtree(abandoned, ignore_errors=True)
        partial = folder.with_name(prefix + uuid.uuid4().hex[:8])
        partial.mkdir()
        try:
            build(partial)
            partial.rename(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return folder
