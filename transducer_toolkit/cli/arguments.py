# SPDX-License-Identifier: Apache-2.0
"""Options that several commands share."""

from __future__ import annotations

import argparse

from transducer_toolkit._version import __version__


def make_parser(name: str, description: str) -> argparse.ArgumentParser:
    """Return a parser with the options of all commands.

    Args:
        name: name of the command.
        description: what it does.
    """
    parser = argparse.ArgumentParser(prog=name, description=description)
    version = f"transducer_toolkit {__version__}"
    parser.add_argument("--version", action="version", version=version)
    parser.add_argument("--debug", action="store_true", help="show the trace of an error")
    return parser


def at_least_1(text: str) -> int:
    """An integer of at least 1, as the ``type`` of an option."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def channel(text: str) -> int | str:
    """A channel of audio files: "mix", "each" or a number from 0, as the ``type`` of an option."""
    if text in ("mix", "each"):
        return text
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected mix, each or a number from 0, got {text!r}")
    return int(text)


def add_device(parser: argparse.ArgumentParser) -> None:
    """Add ``--device`` and ``--num-threads``."""
    parser.add_argument("--device", default="cpu", help="torch device, such as cpu or cuda:0")
    parser.add_argument("--num-threads", type=at_least_1, metavar="N", help="CPU threads of torch")


def add_trust_package(parser: argparse.ArgumentParser) -> None:
    """Add ``--trust-package``, for ``Recognizer.from_checkpoint(trusted_packages=...)``."""
    parser.add_argument(
        "--trust-package",
        action="append",
        default=[],
        metavar="PACKAGE",
        help="also instantiate classes of this Python package, for models of "
        "your own: it runs the package's code with the checkpoint's arguments; may be repeated",
    )
