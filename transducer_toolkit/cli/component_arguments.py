# SPDX-License-Identifier: Apache-2.0
"""Overrides of arguments that a component takes and its config does not list."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from hydra import compose, initialize_config_module
from hydra.core.config_loader import ConfigLoader
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from transducer_toolkit.cli import hydra_help, path_overrides

CONFIG_MODULE = "transducer_toolkit.conf"
FREE_NAMES = ("data.corpus.test",)  # mappings whose keys are names of the user's choice


def with_signs(config_name: str, arguments: Sequence[str]) -> list[str]:
    """Let ``KEY=VALUE`` set every argument of a component, with or without ``+``.

    Hydra wants ``+KEY=VALUE`` for a key that the config does not list, and refuses ``+`` for one
    that it lists. ``++KEY=VALUE`` is right for both.

    Args:
        config_name: the primary config.
        arguments: arguments of the command line.

    Returns:
        The arguments, with ``++`` before those that set an argument of a component.

    Example:
        >>> with_signs("train", ["trainer.max_steps=5", "+trainer.max_epochs=2", "seed=3"])
        ['++trainer.max_steps=5', '++trainer.max_epochs=2', 'seed=3']
    """
    found = {text: override for text in arguments if (override := _dotted(text)) is not None}
    if not found:
        return list(arguments)
    cfg = composed(config_name, arguments)
    if cfg is None:  # Hydra reports why
        return list(arguments)
    return [
        "++" + text.lstrip("+") if text in found and _needs_sign(cfg, found[text]) else text
        for text in arguments
    ]


def composed(config_name: str, arguments: Sequence[str]) -> DictConfig | None:
    """Return the config with the groups that arguments choose; None if they choose unknown ones.

    Args:
        config_name: the primary config.
        arguments: arguments of the command line. Of several options of a sweep, the first counts.
    """
    if has_own_config(arguments):
        return None
    folders = [path_overrides.literal(f"file://{folder.absolute()}")
               for folder in hydra_help.config_dirs(arguments)]  # fmt: skip
    search = [f"hydra.searchpath=[{','.join(folders)}]"] if folders else []
    GlobalHydra.instance().clear()
    try:
        with initialize_config_module(CONFIG_MODULE, version_base="1.3"):
            # Hydra reads all places of configs for each list.
            groups_of = functools.cache(GlobalHydra.instance().config_loader().list_groups)
            chosen = [text for text in arguments if _chooses_group(groups_of, text)]
            return compose(config_name, [*search, *map(_first, chosen)])
    except (HydraException, OmegaConfBaseException):
        return None
    finally:
        GlobalHydra.instance().clear()


def groups(loader: ConfigLoader, parent: str = "") -> Iterator[str]:
    """Yield the names of all config groups below a group."""
    for name in loader.list_groups(parent):
        group = f"{parent}/{name}" if parent else name
        yield group
        yield from groups(loader, group)


def _chooses_group(groups_of: Callable[[str], list[str]], text: str) -> bool:
    """Return whether an override is one of a config group, given the groups below each group."""
    group = text.lstrip("+~").partition("=")[0]
    if text.startswith("-") or group.startswith("/"):  # an option of Hydra, or its value
        return False
    parent, _, name = group.rpartition("/")
    return name in groups_of(parent)  # faster than to list all groups


def argument_names(target: str) -> list[str]:
    """Return the names of the arguments of a class or a function; none if it cannot be imported.

    A class whose ``__init__`` takes ``**options`` passes them on to its base class.

    Args:
        target: its full name, as in ``_target_``.

    Example:
        >>> "eps" in argument_names("torch.optim.AdamW")
        True
    """
    return _arguments_of(target)[0]


def _arguments_of(target: str) -> tuple[list[str], bool]:
    """Return the names of the arguments, and whether there may be others (``**options``)."""
    try:
        made = get_object(target)
    except Exception:  # importing a module of the user may raise any error
        return [], True
    names: list[str] = []
    takes_more = True
    for function in made.__mro__ if inspect.isclass(made) else [made]:
        if inspect.isclass(function) and "__init__" not in vars(function):
            continue
        parameters = inspect.signature(function).parameters.values()
        names += [
            it.name for it in parameters if it.kind in (it.POSITIONAL_OR_KEYWORD, it.KEYWORD_ONLY)
        ]
        takes_more = any(it.kind == it.VAR_KEYWORD for it in parameters)
        if not takes_more:
            break
    return names, takes_more


def check_arguments(cfg: DictConfig) -> None:
    """Raise an error if a component gets an argument that it does not take.

    An experiment sets keys of the options that it chooses, and the command line may choose others.

    Args:
        cfg: the composed config of a command.

    Raises:
        ValueError: there is such a key; the message says how to remove it.
    """
    choices = HydraConfig.get().runtime.choices if HydraConfig.initialized() else {}
    experiment = choices.get("experiment")
    for key, target, name in _superfluous(cfg):
        group = key.partition(".")[0]
        chosen = f" of {group}={choices[group]}" if group in choices else ""
        origin = f", which experiment={experiment} may set" if experiment else ""
        raise ValueError(
            f"{key}: {target}{chosen} takes no argument {name}{origin}; ~{key} removes it"
        )


def _superfluous(cfg: DictConfig, prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """Yield the key of each argument that a component does not take, its target and its name."""
    target = cfg.get("_target_")
    names, takes_more = _arguments_of(target) if isinstance(target, str) else ([], True)
    for name in map(str, cfg):
        has_value = not (OmegaConf.is_interpolation(cfg, name) or OmegaConf.is_missing(cfg, name))
        child = cfg[name] if has_value else None
        if not (takes_more or name in names or name.startswith("_")):
            yield f"{prefix}{name}", str(target), name
        # The keys of a search are also those of the scores that it adds.
        elif isinstance(child, DictConfig) and f"{prefix}{name}" not in ("hydra", "search"):
            yield from _superfluous(child, f"{prefix}{name}.")


def target_of(cfg: DictConfig, key: str) -> str | None:
    """Return ``_target_`` of the component that a key belongs to, or None."""
    parent = OmegaConf.select(cfg, key.rpartition(".")[0])
    target = parent.get("_target_") if isinstance(parent, DictConfig) else None
    return target if isinstance(target, str) else None


def has_own_config(arguments: Sequence[str]) -> bool:
    """Return whether arguments of the command line choose another primary config."""
    names = ("--config-name", "-cn", "--config-path", "-cp")
    return any(text.partition("=")[0] in names for text in arguments)


def _first(choice: str) -> str:
    """Return a choice of the first option that an override of a group lists."""
    return choice if "[" in choice else choice.partition(",")[0]


def _dotted(text: str) -> Override | None:
    """Return the override that sets a key below another one, or None."""
    key = text.partition("=")[0]
    if text.startswith(("-", "~", "++")) or "." not in key or "@" in key:
        return None
    try:
        return OverridesParser.create().parse_override(text)
    except (HydraException, ValueError):
        return None


def _needs_sign(cfg: DictConfig, override: Override) -> bool:
    parent, _, name = override.key_or_group.rpartition(".")
    node: Any = OmegaConf.select(cfg, parent)
    if parent in FREE_NAMES:
        return isinstance(node, DictConfig)
    if parent.partition(".")[0] == "model" and "checkpoint" in (cfg.get("model") or {}):
        return True  # model=checkpoint: the keys are in the checkpoint
    target = target_of(cfg, override.key_or_group)
    if target is None:
        return False
    if isinstance(node, Mapping) and name in node:
        return override.is_add()
    return not override.is_add() and name in argument_names(target)
