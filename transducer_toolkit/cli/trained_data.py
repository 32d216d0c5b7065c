# SPDX-License-Identifier: Apache-2.0
"""``data=checkpoint``: the corpus that a checkpoint was trained on."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from transducer_toolkit.cli.changes import CONFIG_KEY

OPTION = "checkpoint"
TRUSTED_DATA = "transducer_toolkit.data"
ADVICE = (
    "give data=OPTION, for example: data=manifest data.corpus.test=test.jsonl (transducer-evaluate "
    "--help lists the options)"
)
# Only training uses these.
_OF_TRAINING = ("tokenizer", "waveform_perturbation", "spec_augment")
_PATHS = ("root", "cache_dir", "train", "val", "test")


def select(arguments: Sequence[str]) -> list[str]:
    """Make ``data=checkpoint`` an option, and select it if the arguments name a checkpoint only.

    Args:
        arguments: arguments of ``transducer-evaluate``.

    Returns:
        The arguments, with ``data=checkpoint`` if they name a checkpoint and no ``data``.

    Raises:
        ValueError: the checkpoint does not say which corpus it was trained on, or a manifest of it
            is not where it was.
    """
    path = _value(arguments, "checkpoint")
    if path is None or _value(arguments, "data") not in (None, OPTION):
        return list(arguments)
    node = trained_data(path)
    if node is None:
        return list(arguments)
    ConfigStore.instance().store(group="data", name=OPTION, node=node)
    return list(dict.fromkeys([*arguments, f"data={OPTION}"]))


def trained_data(path: str) -> dict[str, Any] | None:
    """Return the data config of the training of a checkpoint; None if it cannot be read.

    Augmentation and tokenizer are left out, and relative paths start at the working directory of
    the training.

    Args:
        path: path of the checkpoint.

    Raises:
        ValueError: as for :func:`select`.
    """
    from transducer_toolkit.inference.recognizer import load_checkpoint

    try:
        config = load_checkpoint(path).get(CONFIG_KEY)
    except (OSError, ValueError):
        return None  # the command reports it
    data = config.get("data") if isinstance(config, Mapping) else None
    if not isinstance(data, dict) or any("${" in text for text in _texts(data)):
        raise ValueError(f"{path} does not say which corpus it was trained on: {ADVICE}")
    data = copy.deepcopy(data)
    for name in _OF_TRAINING:
        if name in data:
            data[name] = None
    corpus = data.get("corpus")
    if isinstance(corpus, dict):
        is_manifest = str(corpus.get("_target_")).endswith(".ManifestCorpus")
        for name in _PATHS if is_manifest else _PATHS[:2]:
            if name in corpus:
                corpus[name] = _located(corpus[name], Path(path))
    return data


def check_trusted(config: Any, packages: Sequence[str], path: str) -> None:
    """Raise a ValueError if the data of a checkpoint could run code of an untrusted package.

    Args:
        config: data config in plain values.
        packages: trusted packages, besides that of the data modules.
        path: path of the checkpoint.
    """
    from transducer_toolkit.inference.trust import check_model_config

    trusted = [TRUSTED_DATA, *packages]
    check_model_config(config, trusted, path)
    text = config.get("text") if isinstance(config, Mapping) else None
    function = text.get("function") if isinstance(text, Mapping) else None
    if function is not None:
        check_model_config({"_target_": function}, trusted, path)


def _value(arguments: Sequence[str], key: str) -> str | None:
    """Return the value of the last override of a key; None if there is none, or several values."""
    texts = [text for text in arguments if text.startswith(f"{key}=")]
    if not texts:
        return None
    value = texts[-1].partition("=")[2]
    if os.path.exists(value):
        return value
    try:
        parsed = OverridesParser.create().parse_override(texts[-1]).value()
    except (HydraException, OmegaConfBaseException, ValueError):
        return value
    return parsed if isinstance(parsed, str) else value


def _located(value: Any, checkpoint: Path) -> Any:
    """Return a path, or paths by name, with relative ones below the folder of the training."""
    if isinstance(value, Mapping):
        return {name: _located(part, checkpoint) for name, part in value.items()}
    if not isinstance(value, str) or os.path.isabs(value):
        return value
    for folder in _folders(checkpoint.absolute()):
        if (folder / value).exists():
            return str(folder / value)
    raise ValueError(
        f"{checkpoint} was trained on {value!r}, a relative path that leads to no file from the "
        f"folder of the training: {ADVICE}"
    )


def _folders(checkpoint: Path) -> Iterator[Path]:
    """Yield the working directory of the training, or else all folders above the checkpoint."""
    hydra = checkpoint.parent.parent / ".hydra" / "hydra.yaml"
    try:
        folder = OmegaConf.select(OmegaConf.load(hydra), "hydra.runtime.cwd")
    except (OSError, OmegaConfBaseException, ValueError):
        folder = None
    if isinstance(folder, str) and Path(folder).is_dir():
        yield Path(folder)
    else:
        yield from checkpoint.parents


def _texts(config: Any) -> Iterator[str]:
    if isinstance(config, str):
        yield config
    elif isinstance(config, Mapping):
        for key, value in config.items():
            yield str(key)
            yield from _texts(value)
    elif isinstance(config, list | tuple):
        for value in config:
            yield from _texts(value)
