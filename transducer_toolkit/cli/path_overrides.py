# SPDX-License-Identifier: Apache-2.0
"""Overrides whose values are paths: taken literally, whatever characters they have."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.errors import HydraException

# Keys of paths and names. Their values are texts, even if they look like numbers.
PATH_KEYS = re.compile(
    r"checkpoint|ckpt_path|init_from|name|run_dir"
    r"|data\.corpus\.(train|val|root|test\.[^.]+)"
    r"|search\.(hotwords|lm|internal_lm)"
    r"|(.+\.)?(\w+_)?(path|dir|dirpath)"
)


def quoted(arguments: Sequence[str]) -> list[str]:
    """Quote the values of overrides that are paths, so that Hydra takes them literally.

    A value is taken literally if a file of this name exists, or if its key is one of a path and
    Hydra's grammar cannot read it as a text.

    Args:
        arguments: arguments of the command line.

    Returns:
        The arguments, with values in quotes.

    Raises:
        ValueError: an override is not of Hydra's grammar and its key is not one of a path; or
            a path is empty.

    Example:
        >>> quoted(["checkpoint=step=8.ckpt", "name=2024", "seed=3", "ckpt_path=null"])
        ["checkpoint='step=8.ckpt'", "name='2024'", 'seed=3', 'ckpt_path=null']
    """
    is_sweep = any(argument in ("-m", "--multirun") for argument in arguments)
    return [
        argument if argument.startswith("-") else _quoted(argument, is_sweep)
        for argument in arguments
    ]


def _quoted(argument: str, is_sweep: bool) -> str:
    key, equals, value = argument.partition("=")
    if not equals or key.startswith("~") or value == "null":
        return argument
    override = _parse(argument)
    is_path = PATH_KEYS.fullmatch(key.lstrip("+").partition("@")[0]) is not None
    if is_path and not value:
        raise ValueError(
            f"{argument} has no value: expected a path or a name; remove the argument, or set the "
            "variable of the shell that it comes from"
        )
    is_same = override is not None and override.value() == value
    if is_same and not ("${" in value and os.path.exists(value)):
        return argument
    is_number = override is not None and isinstance(override.value(), (bool, int, float))
    if os.path.exists(value) and (is_path or not is_number):
        return f"{key}={literal(value)}"
    if is_path and is_sweep and (override is None or override.is_sweep_override()):
        parts = value.split(",")
        if override is None and all(map(os.path.exists, parts)):
            return f"{key}={','.join(map(literal, parts))}"
    elif is_path and (override is None or is_number or override.is_sweep_override()):
        return f"{key}={literal(value)}"
    if override is None:
        raise ValueError(
            f"{argument}: {value!r} is no value of Hydra's grammar; write a text in quotes, "
            f"{key}={literal(value)} (and all of it in quotes for the shell)"
        )
    return argument


def _parse(argument: str) -> Override | None:
    try:
        return OverridesParser.create().parse_override(argument)
    except (HydraException, ValueError):
        return None


def literal(text: str) -> str:
    """Return a text in quotes, without interpolations."""
    escaped = re.sub(r"(\\*)\$\{", lambda found: 2 * found[1] + r"\${", text)
    return QuotedString(text=escaped, quote=Quote.single).with_quotes()
