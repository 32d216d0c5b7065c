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
    """
    if wanted is None:
        return None
    if wanted == "auto":
        return str(run_dir / LAST) if (run_dir / LAST).is_file() else None
    if wanted == "last":
        # outputs/NAME/RUN, or outputs/NAME/SWEEP/JOB
        folders = [folder for folder in run_dir.parents if folder.name == name][:1]
        found = [path for folder in folders for path in folder.rglob(str(LAST)) if path.is_file()]
        if not found:
            raise FileNotFoundError(
                f"ckpt_path=last: no run of the name {name!r} has a {LAST} beside {run_dir}; "
                "give the path of a checkpoint, or ckpt_path=null for a new training"
            )
        return str(max(found, key=lambda path: path.stat().st_mtime))
    if not Path(wanted).is_file() and "://" not in wanted:
        raise FileNotFoundError(
            f"ckpt_path must be auto, last, null or the path of a checkpoint; no file at {wanted}"
        )
    return wanted


def keep_metrics(run_dir: Path) -> None:
    """Rename the metrics of a run that resumes in its folder, because its logger overwrites them.

    ``metrics.csv`` becomes ``metrics.1.csv``, or the next number that is free.
    """
    path = run_dir / "metrics" / "metrics.csv"
    is_main = all(os.environ.get(rank, "0") == "0" for rank in ("RANK", "SLURM_PROCID"))
    if path.is_file() and is_main and os.environ.get("LOCAL_RANK", "0") == "0":
        number = 1 + len(list(path.parent.glob("metrics.*.csv")))
        path.rename(path.with_name(f"metrics.{number}.csv"))
