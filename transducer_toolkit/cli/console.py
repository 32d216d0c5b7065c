# SPDX-License-Identifier: Apache-2.0
"""Shared by all commands: ``--debug``, errors of one sentence, output to any terminal or pipe."""

from __future__ import annotations

import functools
import io
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

DEBUG_VARIABLE = "HYDRA_FULL_ERROR"  # Hydra's, which its sweeps and Lightning's processes know too
INTERRUPTED = 130  # the exit status of a shell's command that Ctrl-C ends

# The extra and the distribution of each optional module that a command imports.
EXTRAS = {
    **{
        name: ("train", distribution)
        for name, distribution in {
            "filelock": "filelock",
            "hydra": "hydra-core",
            "jiwer": "jiwer",
            "lightning": "lightning",
            "matplotlib": "matplotlib",
            "omegaconf": "hydra-core",
            "rich": "rich",
            "sentencepiece": "sentencepiece",
            "soundfile": "soundfile",
            "tensorboard": "tensorboard",
            "tqdm": "tqdm",
            "yaml": "pyyaml",
        }.items()
    },
    "espeakng_loader": ("demo", "espeakng-loader"),
    "lhotse": ("lhotse", "lhotse"),
    "onnx": ("export", "onnx"),
    "onnxruntime": ("export", "onnxruntime"),
    "peft": ("lora", "peft"),
    "silero_vad": ("vad", "silero-vad"),
    "torchaudio": ("torchaudio", "torchaudio"),
}
# The same for options of Hydra's groups that plugins bring along.
PLUGINS = {
    "hydra/launcher/submitit_": ("slurm", "hydra-submitit-launcher"),
    "hydra/sweeper/optuna": ("sweep", "hydra-optuna-sweeper"),
    "hydra/sweeper/sampler": ("sweep", "hydra-optuna-sweeper"),
}
# Errors that users cause and whose messages are sentences. Others are shown with their type.
PLAIN = ("ValueError", "TypeError", "RuntimeError", "ImportError", "MisconfigurationException")


def command(name: str) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """Return a decorator for ``main(argv)`` that ends every error with one sentence.

    Args:
        name: name of the command.
    """

    def decorate(main: Callable[..., int]) -> Callable[..., int]:
        @functools.wraps(main)
        def wrapper(argv: Sequence[str] | None = None) -> int:
            try:
                arguments = sys.argv[1:] if argv is None else argv
                with errors(name, arguments):
                    check_filled(arguments)
                    return main(argv)
            except Failure:
                return 1

        return wrapper

    return decorate


def check_filled(arguments: Sequence[str]) -> None:
    """Raise a ValueError if an argument of the command line is empty.

    Args:
        arguments: the arguments; only that of ``--text`` may be empty.
    """
    for position, argument in enumerate(arguments):
        before = arguments[position - 1] if position else None
        if not argument.strip() and before != "--text":
            place = f"argument {position + 1}" + ("" if before is None else f" after {before!r}")
            raise ValueError(
                f"{place} is empty; remove it, or set the variable of the shell that it comes from"
            )


class Failure(SystemExit):
    """The end of a command whose error has been printed."""


@contextmanager
def errors(name: str, arguments: Sequence[str], *, survives_pipe: bool = False) -> Iterator[None]:
    """Print any error of a command as one sentence and raise Failure, unless debugging is asked.

    Args:
        name: name of the command.
        arguments: its arguments; ``--debug`` among them, or HYDRA_FULL_ERROR in the environment,
            lets errors through with their traces.
        survives_pipe: whether the command goes on when the reader of its output has gone. A
            training does; its results are files.
    """
    former = os.environ.get(DEBUG_VARIABLE)
    if "--debug" in arguments:
        set_debugging("1")
    shows_traces = is_debugging()
    logging.raiseExceptions = shows_traces
    _suit_terminal(survives_pipe)
    try:
        yield
        sys.stdout.flush()
    except KeyboardInterrupt:
        say(name, "interrupted")
        raise SystemExit(INTERRUPTED) from None
    except BrokenPipeError:  # the reader of the output, such as head, has gone
        if shows_traces:
            raise
        _discard_output()
        raise Failure(1) from None
    except Exception as error:
        if shows_traces:
            raise
        say(name, sentence(error, name))
        raise Failure(1) from None
    finally:
        set_debugging(former)


def set_debugging(value: str | None) -> None:
    """Set the environment variable that asks for traces, or remove it."""
    if value is None:
        os.environ.pop(DEBUG_VARIABLE, None)
    else:
        os.environ[DEBUG_VARIABLE] = value


def is_debugging() -> bool:
    """Return whether errors are to be shown with their traces."""
    return os.environ.get(DEBUG_VARIABLE, "0") not in ("", "0")


def say(name: str, text: str) -> None:
    """Print a message of a command on standard error."""
    print(f"{name}: {text}", file=sys.stderr, flush=True)


def sentence(error: BaseException, command: str = "") -> str:
    """Return the message of an error on one line, with the option or the extra that it is about.

    Args:
        error: any error.
        command: name of the command.

    Example:
        >>> sentence(ValueError("beam:\\n  expected at least 1, got 0"))
        'beam: expected at least 1, got 0'
        >>> sentence(ModuleNotFoundError("No module named 'onnx'", name="onnx"))
        "onnx is not installed: pip install 'transducer_toolkit[export]'"
        >>> sentence(KeyError("tail"))
        "KeyError: 'tail' (--debug shows where)"
    """
    key = re.search(r"full_key: (\S+)", str(error))
    cause = error
    if type(error).__name__ == "InstantiationException":
        while cause.__cause__ is not None:
            cause = cause.__cause__
    extra = None
    if isinstance(cause, ModuleNotFoundError) and cause.name:
        extra = EXTRAS.get(cause.name.partition(".")[0])
    if missing := getattr(error, "missing_cfg_file", None):
        extra = next((PLUGINS[name] for name in PLUGINS if str(missing).startswith(name)), None)
    if extra is not None:
        return f"{extra[1]} is not installed: pip install 'transducer_toolkit[{extra[0]}]'"
    if type(error).__name__ == "UntrustedClassError":
        return f"{error.text}, add {trust_option(command, error.packages)}"  # type: ignore[attr-defined]
    if type(error).__name__ == "MissingMandatoryValue" and key:
        is_optional = key[1] == "data.corpus.val"
        more = ", or null for a training without validation" if is_optional else ""
        return f"{key[1]}: no value given; add {key[1]}=VALUE{more}"
    if isinstance(cause, OSError) and cause.filename is not None and cause.strerror:
        text = f"{os.fsdecode(cause.filename)}: {cause.strerror}"
    elif "in DataLoader worker process" in str(cause):
        # The message is the trace of the worker's error, which ends with its type and message.
        text = re.split(r"\n(?:\w+\.)*\w+: ", str(cause))[-1]
        text = " ".join(text.split())
    else:
        # Hydra's and OmegaConf's messages end in lines "    full_key: ...", "    object_type=..."
        text = re.split(r"\n\s*(?:full_key: |object_type=|Config search path:)", str(cause))[0]
        text = " ".join(text.split()) or type(cause).__name__
    if key and key[1] not in text:
        text = f"{key[1]}: {text}"
    kinds = {base.__name__ for base in type(cause).__mro__}
    is_plain = isinstance(cause, OSError) or not kinds.isdisjoint(PLAIN)
    if not is_plain and "HydraException" not in kinds and "OmegaConfBaseException" not in kinds:
        text = f"{type(cause).__name__}: {text} (--debug shows where)"
    return text


def trust_option(command: str, packages: Sequence[str]) -> str:
    """Return the option of a command that trusts packages, as a shell takes it.

    Args:
        command: name of the command.
        packages: names of the packages.

    Example:
        >>> trust_option("transducer-evaluate", ["my_models", "more"])
        "'trusted_packages=[my_models,more]'"
        >>> trust_option("transducer-align", ["my_models"])
        '--trust-package my_models'
    """
    if command in ("transducer-evaluate", "transducer-train"):
        return f"'trusted_packages=[{','.join(packages)}]'"
    return " ".join(f"--trust-package {name}" for name in packages)


class _LossyOutput(io.TextIOWrapper):
    """A standard output that discards its text when the reader has gone."""

    def write(self, text: str) -> int:
        try:
            return super().write(text)
        except BrokenPipeError:
            _discard_output()
            return len(text)

    def flush(self) -> None:
        try:
            super().flush()
        except BrokenPipeError:
            _discard_output()


def _suit_terminal(survives_pipe: bool) -> None:
    """Let every text be printed, whatever the encoding of standard output is.

    Names of files that are not UTF-8 are printed as they are. An encoding that lacks a character
    gets its number, such as ``\\u03b1``.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        is_utf8 = sys.stdout.encoding.lower().replace("-", "") == "utf8"
        sys.stdout.reconfigure(errors="surrogateescape" if is_utf8 else "backslashreplace")
        if survives_pipe and sys.stdout is sys.__stdout__:
            sys.stdout = _LossyOutput(
                sys.stdout.buffer,
                encoding=sys.stdout.encoding,
                errors=sys.stdout.errors,
                line_buffering=sys.stdout.line_buffering,
            )


def _discard_output() -> None:
    """Point standard output to nothing, or Python fails again when it flushes it at its end."""
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, sys.__stdout__.fileno())  # type: ignore[union-attr]
    os.close(nothing)
