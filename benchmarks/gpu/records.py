# SPDX-License-Identifier: Apache-2.0
"""The JSON files of the GPU benchmarks: what was run where, and rows."""

from __future__ import annotations

import json
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.commands import driver_version, output_of
from transducer_toolkit import build_info

Row = dict[str, Any]


class Record:
    """A JSON document that is written anew with each row, so that a killed run leaves the others.

    Args:
        path: the file; None: nothing is written.
        device: "cuda" or "cpu".
        details: further entries of the document.
    """

    def __init__(self, path: Path | None, device: str, **details: Any) -> None:
        self.path = path
        self.document: dict[str, Any] = {
            "device": torch.cuda.get_device_name() if device == "cuda" else "CPU, a dry run",
            "driver": driver_version(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "transducer_toolkit": build_info()["version"],
            "commit": commit(),
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "command": " ".join(["python", "-m", *module_and_arguments()]),
            **details,
            "rows": [],
        }

    @property
    def rows(self) -> list[Row]:
        rows: list[Row] = self.document["rows"]
        return rows

    def add(self, row: Row) -> None:
        self.rows.append(row)
        if self.path is not None:
            self.path.write_text(json.dumps(self.document, indent=1) + "\n")


def module_and_arguments() -> list[str]:
    """Returns the running module and its arguments, with folders cut off the paths."""
    module = getattr(sys.modules["__main__"], "__spec__", None)
    name = module.name if module is not None else Path(sys.argv[0]).name
    return [name, *(Path(part).name if part.startswith("/") else part for part in sys.argv[1:])]


def commit() -> str | None:
    """Returns the abbreviated commit, with "+" behind it if the files differ from it."""
    found = output_of("git", "rev-parse", "--short=12", "HEAD")
    return found and found + ("+" if output_of("git", "status", "--porcelain") else "")
