# SPDX-License-Identifier: Apache-2.0
"""Packages that only some classes need, imported when one of these is made."""

from __future__ import annotations

import importlib
import shlex
from typing import Any

OLDEST_TRANSFORMERS = "5.24"  # that of the extra; pip installs an older one on Python 3.10


def import_torchaudio(module: str, needed_by: str) -> Any:
    """Import a module of torchaudio.

    Args:
        module: its name behind ``torchaudio.``, such as ``"models"``.
        needed_by: what the user asked for, as in ``loss=torchaudio``.

    Raises:
        ImportError: torchaudio is missing or does not load beside the installed torch; says what to
            install.
    """
    return _import("torchaudio", f"torchaudio.{module}", needed_by)


def import_transformers(needed_by: str) -> Any:
    """Import the package transformers of Hugging Face.

    Args:
        needed_by: as in :func:`import_torchaudio`.

    Raises:
        ImportError: transformers is missing or too old; says what to install.
    """
    wanted = f"transformers>={OLDEST_TRANSFORMERS}"
    package = _import(wanted, "transformers", needed_by)
    from packaging.version import Version  # which transformers needs itself

    if Version(package.__version__).release < Version(OLDEST_TRANSFORMERS).release:
        raise ImportError(
            f"{needed_by} needs {wanted}, got {package.__version__}: "
            f"pip install {shlex.quote(wanted)} (Python 3.11 or newer)"
        )
    return package


def import_peft(needed_by: str) -> Any:
    """Import the package peft of Hugging Face.

    Args:
        needed_by: as in :func:`import_torchaudio`.

    Raises:
        ImportError: peft is missing; says what to install.
    """
    return _import("peft", "peft", needed_by)


def import_tensorflow(needed_by: str) -> Any:
    """Import the package tensorflow.

    Args:
        needed_by: as in :func:`import_torchaudio`.

    Raises:
        ImportError: TensorFlow is missing; says what to install.
    """
    return _import("tensorflow", "tensorflow", needed_by)


def import_nemo(module: str, needed_by: str) -> Any:
    """Import a module of NeMo.

    Args:
        module: its name behind ``nemo.``.
        needed_by: as in :func:`import_torchaudio`.

    Raises:
        ImportError: NeMo is missing; says what to install.
    """
    return _import("nemo-toolkit[asr]", f"nemo.{module}", needed_by)


def import_espnet(module: str, needed_by: str) -> Any:
    """Import a module of ESPnet 2.

    Args:
        module: its name behind ``espnet2.``.
        needed_by: as in :func:`import_torchaudio`.

    Raises:
        ImportError: ESPnet is missing; says what to install.
    """
    return _import("espnet", f"espnet2.{module}", needed_by)


def _import(package: str, module: str, needed_by: str) -> Any:
    try:
        return importlib.import_module(module)
    except (ImportError, OSError) as error:
        raise ImportError(
            f"{needed_by} needs {package}: pip install {shlex.quote(package)} ({error})"
        ) from error
