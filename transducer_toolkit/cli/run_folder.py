# SPDX-License-Identifier: Apache-2.0
"""The name of a run, the same in all of its processes."""

from __future__ import annotations

import hashlib
import os
import sys
from datetime import datetime

from omegaconf import OmegaConf

RUN_ID_VARIABLE = "TRANSDUCER_TOOLKIT_RUN_ID"


def run_id() -> str:
    """Return the name of this run's folder: its starting time or the id of its launcher.

    Hydra makes the folder in every process. Processes that Lightning starts inherit the time from
    the environment; processes of torchrun and Slurm share an id of their launcher. As a Slurm job
    or an address of torchrun may start several trainings, the id is followed by a checksum of the
    arguments: another config gets another folder.

    Example:
        >>> run_id() == run_id()
        True
    """
    if RUN_ID_VARIABLE not in os.environ:
        os.environ[RUN_ID_VARIABLE] = (
            _launcher_id("TORCHELASTIC_RUN_ID", "torchrun")
            or _launcher_id("SLURM_JOB_ID", "slurm")
            or f"{datetime.now():%Y-%m-%d_%H-%M-%S.%f}"[
                :-3
            ]  # with milliseconds, as two runs may start at once
        )
    return os.environ[RUN_ID_VARIABLE]


def _launcher_id(variable: str, prefix: str) -> str | None:
    value = os.environ.get(variable, "none")
    # Without --rdzv-id, torchrun's id is "none": take the address of the rendezvous instead.
    if value == "none" and prefix == "torchrun" and variable in os.environ:
        value = f"{os.environ.get('MASTER_ADDR', '')}-{os.environ.get('MASTER_PORT', '')}"
    if value == "none":
        return None
    arguments = "\0".join(sorted(sys.argv[1:]))
    return f"{prefix}-{value}-{hashlib.sha256(arguments.encode(errors='replace')).hexdigest()[:6]}"


def register() -> None:
    """Make the name available in Hydra's configs as ``${transducer_run_id:}``."""
    OmegaConf.register_new_resolver("transducer_run_id", run_id, replace=True)
