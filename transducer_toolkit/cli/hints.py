# SPDX-License-Identifier: Apache-2.0
"""Suggestions for misspelled overrides."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence

from hydra import compose, initialize_config_module
from hydra.core.config_loader import ConfigLoader
from hydra.core.global_hydra import GlobalHydra
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from transducer_toolkit.cli.component_arguments import (
    CONFIG_MODULE,
    argument_names,
    groups,
    target_of,
)
from transducer_toolkit.cli.removed_keys import REMOVED_KEYS


def find_hints(config_name: str, arguments: Sequence[str]) -> list[str]:
    """Return suggestions for overrides of keys, groups and options that do not exist.

    Args:
        config_name: the primary config.
        arguments: arguments of the command line.

    Returns:
        A sentence for each such override for which there is a similar name.

    Example:
        >>> find_hints("train", ["optimzer.lr=1e-3", "loss=packd", "lr=1"])
        ['loss=packd: did you mean loss=packed?', 'optimzer.lr: did you mean optimizer.lr?', \
'lr: did you mean optimizer.lr?']
    """
    texts = [
        text for text in arguments if not text.startswith("-") and ("=" in text or "~" in text)
    ]
    try:
        overrides = OverridesParser.create().parse_overrides(texts)
        GlobalHydra.instance().clear()
        with initialize_config_module(CONFIG_MODULE, version_base="1.3"):
            return _compare(config_name, overrides)
    except (HydraException, OmegaConfBaseException):
        return []  # the error has another cause


def _compare(config_name: str, overrides: Sequence[Override]) -> list[str]:
    loader = GlobalHydra.instance().config_loader()
    options = {group: _options(loader, group) for group in groups(loader)}
    hints, chosen, others = [], [], []
    for override in overrides:
        name, values = override.key_or_group, _values(override)
        if name not in options:
            others.append(override)
            continue
        for value in values:
            if value in options[name]:
                chosen.append(f"{name}={value}")
            elif near := _most_like(value, {option: option for option in options[name]}):
                hints.append(_hint(f"{name}={value}", [f"{name}={option}" for option in near]))
    cfg = compose(config_name, overrides=chosen, return_hydra_config=True)
    keys = [key for key in dict.fromkeys([*_keys(cfg), *options]) if not key.endswith("_")]
    for override in others:
        name = override.key_or_group
        if name in REMOVED_KEYS:
            hints.append(f"{name} is no option any more: {REMOVED_KEYS[name]}")
            continue
        # An added key (+, ++) need not exist.
        if name not in keys and not override.is_add() and not override.is_force_add():
            if homes := _options_with(config_name, chosen, name, options):
                hints.append(f"{name} is a key of {', '.join(homes)}")
            elif near := _nearest(name, [*keys, *_arguments_beside(cfg, name)]):
                hints.append(_hint(name, near))
    return hints


def _options_with(
    config_name: str, chosen: Sequence[str], key: str, options: Mapping[str, Sequence[str]]
) -> list[str]:
    """Return the choices ``GROUP=OPTION`` of other options whose configs have a key."""
    group = key.partition(".")[0]
    others = [text for text in chosen if text.partition("=")[0] != group]
    found = []
    for option in options.get(group, []):
        try:
            cfg = compose(config_name, overrides=[*others, f"{group}={option}"])
        except (HydraException, OmegaConfBaseException):
            continue
        if key in _keys(cfg):
            found.append(f"{group}={option}")
    return found


def _arguments_beside(cfg: DictConfig, key: str) -> list[str]:
    """Return the keys of all arguments of the component that a key belongs to."""
    target = target_of(cfg, key)
    parent = key.rpartition(".")[0]
    return [f"{parent}.{name}" for name in argument_names(target)] if target else []


def _nearest(name: str, keys: Sequence[str]) -> list[str]:
    """Return keys that end in ``name``, else the most similar keys or ends of keys."""
    same_leaf = [key for key in keys if key.endswith("." + name)]
    if same_leaf:
        return sorted(same_leaf, key=len)[:3]
    leaf = name.rpartition(".")[2]
    return _most_like(name, {key: key for key in keys}) or _most_like(
        leaf, {key.rpartition(".")[2]: key for key in reversed(keys)}
    )


def _most_like(name: str, key_of: Mapping[str, str]) -> list[str]:
    found = difflib.get_close_matches(name, key_of, n=3, cutoff=0.75)
    likeness = [difflib.SequenceMatcher(None, text, name).ratio() for text in found]
    return [key_of[text] for text, ratio in zip(found, likeness, strict=True)
            if ratio > likeness[0] - 0.05]  # fmt: skip


def _hint(what: str, near: Sequence[str]) -> str:
    return f"{what}: did you mean {' or '.join(near)}?"


def _options(loader: ConfigLoader, group: str) -> list[str]:
    options = loader.get_group_options(group, ObjectType.CONFIG)
    return [option for option in options if not option.startswith("_")]


def _values(override: Override) -> list[str]:
    """Return the options of an override: several of a sweep, none of a deletion."""
    text = (override.input_line or "").partition("=")[2]
    return [value.strip() for value in text.split(",") if value.strip() not in ("", "null")]


def _keys(cfg: DictConfig, prefix: str = "") -> Iterator[str]:
    for name in map(str, cfg):
        yield f"{prefix}{name}"
        child = cfg._get_node(name)
        if isinstance(child, DictConfig) and not OmegaConf.is_missing(cfg, name):
            if child._is_none() or child._is_interpolation():
                continue
            yield from _keys(child, f"{prefix}{name}.")
