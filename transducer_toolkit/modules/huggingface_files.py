# SPDX-License-Identifier: Apache-2.0
"""Files of a model folder of Hugging Face, read without running code from it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from torch import Tensor

CONFIG, WEIGHTS = "config.json", "model.safetensors"
INDEX = "model.safetensors.index.json"


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
    path = Path(folder) / name
    if not path.is_file():
        if not required:
            return None
        raise FileNotFoundError(f"no {name} in the folder {os.fspath(folder)}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
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
        ValueError: a file is damaged, or the index names a file outside of the folder.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    index = read_json(folder, INDEX, required=False)
    names = [WEIGHTS] if index is None else sorted(set(index.get("weight_map", {}).values()))
    weights: dict[str, Tensor] = {}
    for name in names:
        path = Path(folder) / name
        if Path(name).name != name:
            raise ValueError(f"{os.fspath(folder)}/{INDEX}: expected names of files, got {name!r}")
        if not path.is_file():
            raise FileNotFoundError(
                f"no {name} in the folder {os.fspath(folder)}; other formats of weights are not "
                "read: save the model with save_pretrained"
            )
        try:
            weights |= load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path} is not a file of safetensors: {error}") from error
    return weights


def check_shapes(
    weights: dict[str, Tensor], expected: dict[str, Tensor], folder: str | os.PathLike[str]
) -> None:
    """Raise a ValueError that names the first weight that is missing, unknown or of another shape.

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
    unknown = sorted(weights.keys() - expected.keys())
    if unknown:
        raise ValueError(f"{where}: its weight {unknown[0]} is not of the model in its {CONFIG}")
