# SPDX-License-Identifier: Apache-2.0
"""Options that several commands share."""

from __future__ import annotations

import argparse


def add_trust_package(parser: argparse.ArgumentParser) -> None:
    """Add ``--trust-package``, for ``Recognizer.from_checkpoint(trusted_packages=...)``."""
    parser.add_argument(
        "--trust-package",
        action="append",
        default=[],
        metavar="PACKAGE",
        help="also instantiate what the checkpoint names of this Python package, for models of "
        "your own: it runs the package's code with the checkpoint's arguments; may be repeated",
    )
