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
        help="also instantiate model classes of this Python package; may be repeated",
    )
