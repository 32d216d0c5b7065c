# SPDX-License-Identifier: Apache-2.0
"""Checkpoints named by a path or by an address, which are downloaded once and checked."""

from __future__ import annotations

import hashlib
import os
import re
import urllib.error
from pathlib import Path
from urllib.parse import unquote, urldefrag, urlsplit

import torch

from transducer_toolkit.data.cache import default_cache_dir

SCHEMES = ("https", "http", "file")


def is_address(name: str | os.PathLike[str]) -> bool:
    """Return whether the name is an address such as ``https://...``, and not a path."""
    return isinstance(name, str) and re.match(r"[a-z][a-z0-9+.-]*://", name) is not None


def local_checkpoint(
    name: str | os.PathLike[str], *, sha256: str | None = None, show_progress: bool = False
) -> Path:
    """Return the path of a checkpoint; download it if it is named by an address.

    A download is kept in the user's cache folder, in ``transducer_toolkit/checkpoints``, under its
    SHA-256. This sum is required, as an argument or at the end of the address, so that a file that
    was changed on its way or on its server is not used.

    Args:
        name: a path, or an address ``https://host/file.ckpt#sha256=...``; ``http`` and ``file``
            work too.
        sha256: the file's SHA-256, 64 hexadecimal digits. With a path it is checked too.
        show_progress: draw a progress bar while downloading.

    Raises:
        ValueError: if an address has no SHA-256, or the file has another one.
        ConnectionError: if the file cannot be downloaded.

    Example:
        >>> local_checkpoint("best.ckpt")
        PosixPath('best.ckpt')
    """
    address = ""
    if is_address(name):
        address, fragment = urldefrag(str(name))
        if urlsplit(address).scheme not in SCHEMES:
            raise ValueError(f"{name}: expected an address of {', '.join(SCHEMES)}")
        given = re.fullmatch(r"sha256=(\w+)", fragment)
        if given is not None and sha256 is None:
            sha256 = given[1]
        if sha256 is None:
            raise ValueError(
                f"{name}: an address needs the SHA-256 of its file: write {address}#sha256=..., "
                "with the sum that sha256sum prints"
            )
    if sha256 is not None and re.fullmatch(r"[0-9a-fA-F]{64}", sha256) is None:
        raise ValueError(f"{name}: sha256: expected 64 hexadecimal digits, got {sha256!r}")
    if not address:
        path = Path(name)
        if sha256 is not None and path.is_file():
            _check_sum(path, sha256.lower(), name)
        return path
    assert sha256 is not None
    path = default_cache_dir() / "checkpoints" / f"{sha256.lower()}{_suffix(address)}"
    if path.is_file():
        _check_sum(path, sha256.lower(), path)
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        _download(address, path, sha256.lower(), show_progress)
    return path


def _suffix(address: str) -> str:
    return Path(unquote(urlsplit(address).path)).suffix


def _download(address: str, path: Path, sha256: str, show_progress: bool) -> None:
    """Write the file, or nothing if its sum is another."""
    try:
        torch.hub.download_url_to_file(address, str(path), sha256, progress=show_progress)
    except RuntimeError as error:  # torch has compared the sums
        raise ValueError(
            f"{address}: the file has another SHA-256 than {sha256}: a wrong sum, or the file has "
            f"changed ({error})"
        ) from error
    except (urllib.error.URLError, OSError) as error:
        reason = getattr(error, "reason", None) or error
        raise ConnectionError(f"{address}: cannot be downloaded: {reason}") from error


def _check_sum(path: Path, sha256: str, name: object) -> None:
    with open(path, "rb") as file:
        found = hashlib.sha256()
        while block := file.read(2**20):
            found.update(block)
    if found.hexdigest() != sha256:
        raise ValueError(f"{name} has the SHA-256 {found.hexdigest()}, expected {sha256}")
