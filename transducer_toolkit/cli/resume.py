# SPDX-License-Identifier: Apache-2.0
"""Finds the checkpoint that a training resumes from."""

from __future__ import annotations

import os
from pathlib import Path

LAST = Path("checkpoints", "last.ckpt")


def find_checkpoint(wanted: str | None, run_dir: Path, *, name: str) -> str | None:
    """Return the checkpoint that ``ckpt_path`` means.

    Args:
        wanted: the option. A path; ``"auto"`` for ``last.ckpt`` of this run folder, if it exists (a
            job that Slurm requeues gets the same folder); ``"last"`` for the newest ``last.ckpt``
            of all runs of this name; or None.
        run_dir: folder of this run, below the folder of all runs of its name.
        name: name of the run.

    Returns:
        The path of a checkpoint, or None for a new training.

    Raises:
        FileNotFoundError: the checkpoint does not exist.
        ValueError: the run folder contains checkpoints of another training.
    """
    found = _find_checkpoint(wanted, run_dir, name=name)
    own = run_dir / LAST.parent
    if any(own.glob("*.ckpt")) and (found is None or Path(found).resolve().parent != own.resolve()):
        raise ValueError(
            f"ckpt_path={'null' if wanted is None else wanted}: {run_dir} contains the checkpoints "
            "of an earlier training, which this training would overwrite; choose another run "
            f"folder (name, hydra.run.dir or the variable TRANSDUCER_TOOLKIT_RUN_ID), or go on "
            f"with ckpt_path={own / LAST.name}"
        )
    return found


def _find_checkpoint(wanted: str | None, run_dir: Path, *, name: str) -> str | None:
    if wanted is None:
        return None
    if wanted == "auto":
        # Without last.ckpt: the training was killed between the two files of its first validation.
        own = [run_dir / LAST, *sorted((run_dir / LAST.parent).glob("*.ckpt"), key=_age)]
        return next((str(path) for path in own if path.is_file()), None)
    if wanted == "last":
        # outputs/NAME/RUN, or outputs/NAME/SWEEP/JOB
        folders = [folder for folder in run_dir.parents if folder.name == name][:1]
        found = [path for folder in folders for path in folder.rglob(str(LAST)) if path.is_file()]
        if not found:
            raise FileNotFoundError(
                f"ckpt_path=last: no run of the name {name!r} has a {LAST} beside {run_dir}; "
                "give the path of a checkpoint, or ckpt_path=null for a new training"
            )
        return str(min(found, key=_age))
    if not Path(wanted).is_file() and "://" not in wanted:
        raise FileNotFoundError(
            f"ckpt_path must be auto, last, null or the path of a checkpoint; no file at {wanted}"
        )
    return wanted


def _age(path: Path) -> float:
    return -path.stat().st_mtime


def keep_metrics(run_dir: Path) -> None:
    """Rename the metrics of a run that resumes in its folder, because its logger overwrites them.

    ``metrics.csv`` becomes ``metrics.1.csv``, or the next number that is free.
    """
    path = run_dir / "metrics" / "metrics.csv"
    is_main = all(os.environ.get(rank, "0") == "0" for rank in ("RANK", "SLURM_PROCID"))
    if path.is_file() and is_main and os.environ.get("LOCAL_RANK", "0") == "0":
        number = 1 + len(list(path.parent.glob("metrics.*.csv")))
        path.rename(path.with_name(f"metrics.{number}.csv"))
