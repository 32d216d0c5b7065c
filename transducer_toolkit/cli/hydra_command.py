# SPDX-License-Identifier: Apache-2.0
"""Runs the commands that Hydra configures, with errors of one sentence."""

from __future__ import annotations

import functools
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from transducer_toolkit._version import __version__
from transducer_toolkit.cli import console

if TYPE_CHECKING:
    from omegaconf import DictConfig

# Hydra's options whose value may be the next argument.
OPTIONS_WITH_VALUES = (
    *("--cfg", "-c", "--package", "-p", "--info", "-i", "--config-path", "-cp"),
    *("--config-name", "-cn", "--config-dir", "-cd", "--experimental-rerun"),
)


def run(
    config_name: str,
    function: Callable[[DictConfig], Any],
    *,
    prepare: Callable[[list[str]], list[str]] = list,
) -> None:
    """Run ``transducer-CONFIG_NAME`` with the arguments of the command line.

    Args:
        config_name: the primary config, and the end of the command's name.
        function: called with the composed config; its result is for Hydra's sweepers.
        prepare: called with the arguments before Hydra reads them; returns those to use.
    """
    name = f"transducer-{config_name}"
    arguments = sys.argv[1:]
    with console.errors(name, arguments, survives_pipe=True):
        if "--version" in arguments:
            print(f"transducer_toolkit {__version__}")
            return
        if "--help" in arguments or "-h" in arguments:
            from transducer_toolkit.cli import hydra_help

            print(hydra_help.text(config_name, arguments))
            return
        # Imported here, because a missing Hydra is an error of one sentence, too.
        import hydra

        from transducer_toolkit.cli import component_arguments, path_overrides, run_folder

        run_folder.register()

        arguments = [argument for argument in arguments if argument != "--debug"]
        console.check_filled(arguments)
        arguments = prepare(path_overrides.quoted(_overrides_first(arguments)))
        sys.argv[1:] = _overrides_first(component_arguments.with_signs(config_name, arguments))
        job = _Job(name, config_name, function)
        main = hydra.main(
            version_base="1.3",
            config_path="pkg://transducer_toolkit.conf",
            config_name=config_name,
        )(job.task)
        try:
            with job.composing():
                main()
        except Exception as error:
            if job.shows_traces or job.has_started:
                raise
            from transducer_toolkit.cli.hints import find_hints

            hints = find_hints(config_name, sys.argv[1:])
            text = console.sentence(error, name)
            if text.startswith("hydra.") and (value := _interpolated_name(sys.argv[1:])):
                text = (
                    f"{value}: {text.partition(': ')[2]}; the name of a run can have no ${{ but "
                    "that of an interpolation of Hydra, such as ${seed}"
                )
            # Hydra advises to add the key, also where no component would take it.
            if hints and not re.search(r"'(callbacks|logger)\.", text):
                text = text.partition(" To append to your config")[0]
            console.say(name, text)
            for hint in hints:
                print(hint, file=sys.stderr)
            raise console.Failure(1) from None


def _interpolated_name(arguments: list[str]) -> str | None:
    """Return the argument that sets the name of the run, if it has an interpolation."""
    given = [text for text in arguments if text.startswith("name=") and "${" in text]
    return given[-1] if given else None


def _overrides_first(arguments: list[str]) -> list[str]:
    """Return arguments with Hydra's options at the end: its parser takes one block of overrides.

    Raises:
        ValueError: an argument is neither an override nor an option.

    Example:
        >>> _overrides_first(["a=1", "--cfg", "job", "-m", "b=2"])
        ['a=1', 'b=2', '--cfg', 'job', '-m']
    """
    overrides: list[str] = []
    options: list[str] = []
    for argument in arguments:
        is_value = bool(options) and options[-1] in OPTIONS_WITH_VALUES
        if argument.startswith("-") or (is_value and "=" not in argument):
            options.append(argument)
        elif "=" not in argument and not argument.startswith("~"):
            raise ValueError(
                f"{argument!r} is no option: expected KEY=VALUE, such as checkpoint=PATH or seed=1"
            )
        else:
            overrides.append(argument)
    return [*overrides, *options]


class _Job:
    """The function that Hydra calls, once or for each job of a sweep."""

    def __init__(self, name: str, config_name: str, function: Callable[[Any], Any]) -> None:
        self.has_started = False
        self.shows_traces = console.is_debugging()

        @functools.wraps(function)
        def task(cfg: DictConfig) -> Any:
            self.has_started = True
            console.set_debugging(self.former)
            try:
                return function(cfg)
            except Exception as error:
                if self.shows_traces or isinstance(error, BrokenPipeError):
                    raise
                _fail(name, console.sentence(error, name))

        # Hydra names the job and its log after this module, which is __main__ with python -m.
        task.__module__ = f"transducer_toolkit.cli.{config_name}"
        self.task = task

    @contextmanager
    def composing(self) -> Iterator[None]:
        """Let Hydra raise its errors until the task starts, where it would print and exit."""
        self.former = os.environ.get(console.DEBUG_VARIABLE)
        console.set_debugging("1")
        try:
            yield
        finally:
            console.set_debugging(self.former)


def _fail(name: str, text: str) -> None:
    """End the command with a sentence; in a sweep, let Hydra go on with the other jobs."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.errors import CompactHydraException
    from hydra.types import RunMode

    if HydraConfig.get().mode == RunMode.MULTIRUN:
        raise CompactHydraException(f"{name}: {text}")
    console.say(name, text)
    raise console.Failure(1)
