# SPDX-License-Identifier: Apache-2.0
"""Files of a model folder of Hugging Face, read without running code from it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from transducer_toolkit.modules.weight_checks import check_kind, check_weight
from transducer_toolkit.ops.checks import one_line

CONFIG, WEIGHTS = "config.json", "model.safetensors"
INDEX = "model.safetensors.index.json"


def local_file(folder: str | os.PathLike[str], name: str) -> Path:
    """Return the path of a file of a model folder.

    Links are followed within the folder, and into the ``blobs`` of the Hub's cache if the folder is
    one of its ``snapshots``.

    Raises:
        ValueError: the file is a link that leads elsewhere.
    """
    path, root = Path(folder) / name, Path(os.path.realpath(folder))
    roots = [root, *([root.parent.parent / "blobs"] if root.parent.name == "snapshots" else [])]
    target = Path(os.path.realpath(path))
    if not any(target.is_relative_to(root) for root in roots):
        raise ValueError(
            f"{path} is a link to {target}, outside of the folder; copy the file into the folder"
        )
    return path


def read_json(
    folder: str | os.PathLike[str], name: str, *, required: bool = True
) -> dict[str, Any] | None:
    """Return the content of a JSON file with an object.

    Args:
        folder: the model folder.
        name: name of the file.
        required: False returns None for a missing file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged.
    """
    path = local_file(folder, name)
    if not path.is_file():
        if not required:
            return None
        raise FileNotFoundError(f"no {name} in the folder {os.fspath(folder)}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: expected JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


def read_config(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Return ``config.json`` of a model folder.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it names no ``model_type``, or code of its own (``auto_map``).
    """
    config = read_json(folder, CONFIG)
    assert config is not None
    if "auto_map" in config:
        raise ValueError(
            f"{os.fspath(folder)}/{CONFIG}: the model needs code from its folder (auto_map), which "
            "is never run"
        )
    if not isinstance(config.get("model_type"), str):
        raise ValueError(f"{os.fspath(folder)}/{CONFIG}: expected a model_type")
    return config


def read_weights(folder: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Return the weights of ``model.safetensors``, or of the files that its index names.

    Raises:
        FileNotFoundError: there are none.
        ValueError: a file is damaged, a weight is NaN or of a type that is not supported, or the
            index names a file outside of the folder.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    index = read_json(folder, INDEX, required=False)
    names = [WEIGHTS] if index is None else _shards(folder, index)
    weights: dict[str, Tensor] = {}
    for name in names:
        path = local_file(folder, name)
        if not path.is_file():
            raise FileNotFoundError(
                f"no {name} in the folder {os.fspath(folder)}; other formats of weights are not "
                "read: save the model with save_pretrained"
            )
        try:
            weights |= load_file(path)
        except (SafetensorError, RuntimeError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is not a file of safetensors: {one_line(error)}") from error
    for name, value in weights.items():
        check_weight(value, f"{os.fspath(folder)}: its weight {name[:100]}")
    return weights


def _shards(folder: str | os.PathLike[str], index: Mapping[str, Any]) -> list[str]:
    """Return the names of the files of an index, which lie beside it."""
    files = index.get("weight_map")
    names = list(files.values()) if isinstance(files, dict) else []
    for name in names:
        is_name = isinstance(name, str) and len(name) < 256 and Path(name).name == name
        if not is_name or "\0" in name or not name.endswith(".safetensors"):
            raise ValueError(
                f"{os.fspath(folder)}/{INDEX}: expected names of files of safetensors, got "
                f"{repr(name)[:100]}"
            )
    if not names:
        raise ValueError(f"{os.fspath(folder)}/{INDEX}: expected a weight_map with names of files")
    return sorted(set(names))


def check_shapes(
    weights: dict[str, Tensor], expected: dict[str, Tensor], folder: str | os.PathLike[str]
) -> None:
    """Raise a ValueError that names the first weight that is missing, unknown or of another shape
    or kind of numbers.

    Args:
        weights: those of a file.
        expected: those of the model that ``config.json`` describes.
        folder: the model folder, for the message.
    """
    where = os.fspath(folder)
    for name, value in expected.items():
        if name not in weights:
            raise ValueError(f"{where}: its weights lack {name}, which its {CONFIG} asks for")
        if weights[name].shape != value.shape:
            raise ValueError(
                f"{where}: its weight {name} has shape {tuple(weights[name].shape)}, and its "
                f"{CONFIG} asks for {tuple(value.shape)}"
            )
        check_kind(weights[name], value, f"{where}: its weight {name}")
    unknown = sorted(weights.keys() - expected.keys())
    if unknown:
        raise ValueError(
            f"{where}: its weight {unknown[0][:100]} is not of the model in its {CONFIG}"
        )
