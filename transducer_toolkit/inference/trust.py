# SPDX-License-Identifier: Apache-2.0
"""Checks of untrusted checkpoints: undamaged, plain values, classes of trusted packages."""

from __future__ import annotations

import os
import pkgutil
import zipfile
from collections.abc import Mapping, Sequence
from typing import IO, Any

import torch

__all__ = [
    "TRUSTED_PACKAGES",
    "UntrustedClassError",
    "all_trusted",
    "check_archive",
    "check_model_config",
    "load_plain",
    "needed_packages",
]

TRUSTED_PACKAGES = ("transducer_toolkit.modules",)


class UntrustedClassError(ValueError):
    """A checkpoint names a class of a package that is not trusted.

    Args:
        text: what the checkpoint names.
        packages: the packages to trust, besides :data:`TRUSTED_PACKAGES`, if the class is trusted.

    Attributes:
        text: as given.
        packages: as given.
    """

    def __init__(self, text: str, packages: Sequence[str]) -> None:
        self.text, self.packages = text, list(packages)
        super().__init__(f"{text}, pass trusted_packages={self.packages}")


def all_trusted(more: Sequence[str]) -> tuple[str, ...]:
    """Return the packages that are always trusted, and more.

    Args:
        more: names of packages.

    Raises:
        TypeError: if it is a single text or holds something else than texts.

    Example:
        >>> all_trusted(["my_encoders"])
        ('transducer_toolkit.modules', 'my_encoders')
    """
    is_list = isinstance(more, Sequence) and not isinstance(more, str)
    if not is_list or not all(isinstance(name, str) for name in more):
        raise TypeError(f"trusted_packages: expected a list of names of packages, got {more!r}")
    return (*TRUSTED_PACKAGES, *(name for name in more if name not in TRUSTED_PACKAGES))


def check_archive(file: IO[bytes], path: str | os.PathLike[str]) -> None:
    """Raise an error if a file of ``torch.save`` is damaged, which torch does not check.

    Args:
        file: open for reading; afterwards it is at its beginning again.
        path: path of the checkpoint, for the message.

    Raises:
        ValueError: it is no archive, or an entry differs from its checksum.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            # torch compresses nothing; unpacking a forged compressed entry could take very long.
            names = [entry.filename for entry in archive.infolist() if entry.compress_type]
            damaged = names[0] if names else archive.testzip()
    except OSError:
        raise
    except Exception as error:  # a damaged directory can raise any error in zipfile
        raise ValueError(f"{path} is not a checkpoint of transducer-train: {error}") from error
    if damaged is not None:
        raise ValueError(
            f"{path} is damaged: its entry {damaged!r} differs from its checksum (or it was "
            "written with torch.serialization.set_crc32_options(False))"
        )
    file.seek(0)


def load_plain(file: IO[bytes], path: str | os.PathLike[str], map_location: Any = "cpu") -> Any:
    """Read a file of ``torch.save`` that holds tensors and plain values; run no code from it.

    Args:
        file: open for reading.
        path: path of the checkpoint, for the message.
        map_location: as for :func:`torch.load`.

    Raises:
        ValueError: it is damaged, or holds other objects.
    """
    check_archive(file, path)
    try:
        return torch.load(file, map_location=map_location, weights_only=True)
    except OSError:
        raise
    except Exception as error:  # a forged file can raise any error in the unpickler
        reason = str(error).partition("\n")[0][:300] or type(error).__name__
        raise ValueError(f"{path} is not a checkpoint of transducer-train: {reason}") from error


def check_model_config(
    config: Any, trusted_packages: Sequence[str], path: str | os.PathLike[str]
) -> None:
    """Raise an error if ``hydra.utils.instantiate`` could run untrusted code for a config.

    The name of a target must begin with a trusted package, and the target must be defined in one.
    All other values must be plain: ``instantiate`` also looks into tuples, and an interpolation can
    become a config with a target of its own (``${oc.create:...}``) or read the environment
    (``${oc.env:...}``).

    Args:
        config: model config of a checkpoint.
        trusted_packages: names of packages.
        path: path of the checkpoint, for the message.

    Raises:
        UntrustedClassError: the config has an untrusted target.
        ValueError: the config has an interpolation or a value that is not plain.

    Example:
        >>> target = "transducer_toolkit.modules.encoder.ConvLstmEncoder"
        >>> check_model_config({"_target_": target, "hidden_dim": 8}, TRUSTED_PACKAGES, "a.ckpt")
        >>> check_model_config({"_target_": "os.system"}, TRUSTED_PACKAGES, "a.ckpt")
        Traceback (most recent call last):
        ...
        transducer_toolkit.inference.trust.UntrustedClassError: a.ckpt wants to instantiate ...
    """
    # Exact types: a subclass could behave in any way.
    if type(config) is dict:
        for key, value in config.items():
            if type(key) is not str:
                raise ValueError(f"{path}: a key of the model config must be str, got {key!r}")
            check_model_config(value, trusted_packages, path)
            if key == "_target_":
                _check_target(value, trusted_packages, path)
    elif type(config) is list:
        for value in config:
            check_model_config(value, trusted_packages, path)
    elif type(config) is str:
        if "${" in config:
            raise ValueError(f"{path}: the model config must not interpolate, got {config!r}")
    elif config is not None and type(config) not in (bool, int, float):
        raise ValueError(
            f"{path}: the model config must consist of dict, list, str, numbers and None, got "
            f"{type(config).__name__}: {config!r}"
        )


def _check_target(
    target: Any, trusted_packages: Sequence[str], path: str | os.PathLike[str]
) -> None:
    def is_trusted(name: Any) -> bool:
        return isinstance(name, str) and any(
            name == package or name.startswith(package + ".") for package in trusted_packages
        )

    defined_in = None
    # Check the name first, because looking a target up imports it. Then check where it is defined,
    # because a trusted module may import untrusted functions (trusted.module.os.system).
    if is_trusted(target):
        try:
            defined_in = getattr(pkgutil.resolve_name(target), "__module__", None)
        except (ImportError, AttributeError, ValueError) as error:
            raise ValueError(f"{path} wants to instantiate {target}: {error}") from error
    if not isinstance(target, str):
        raise ValueError(f"{path} wants to instantiate {target}: expected the name of a class")
    if not is_trusted(target) or not is_trusted(defined_in):
        own = [name for name in trusted_packages if not name.startswith("transducer_toolkit.")]
        source = defined_in if is_trusted(target) else target
        package = str(source).partition(".")[0]
        raise UntrustedClassError(
            f"{path} wants to instantiate {target}, which is not of the trusted packages "
            f"{list(trusted_packages)}; if you trust the file and the class",
            [*own, package],
        )


def needed_packages(config: Any) -> list[str]:
    """Return the packages that must be trusted, besides this one's, to restore a model.

    Args:
        config: model config in plain values.

    Example:
        >>> needed_packages({"_target_": "my_models.Model", "encoder": {"_target_": "my_models.E"}})
        ['my_models']
    """
    if isinstance(config, Mapping):
        target = config.get("_target_")
        is_own = str(target).startswith(tuple(f"{name}." for name in TRUSTED_PACKAGES))
        own = [] if target is None or is_own else [str(target).partition(".")[0]]
        found = [*own, *(name for value in config.values() for name in needed_packages(value))]
    elif isinstance(config, list | tuple):
        found = [name for value in config for name in needed_packages(value)]
    else:
        found = []
    return list(dict.fromkeys(found))
