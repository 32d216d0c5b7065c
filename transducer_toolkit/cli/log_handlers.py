# SPDX-License-Identifier: Apache-2.0
"""Log messages on a terminal that also shows a progress bar, from one of several processes."""

from __future__ import annotations

import logging
import os
import sys
from typing import TYPE_CHECKING, TextIO

# Their messages, also the warnings, are the same in all processes.
SAME_IN_ALL_PROCESSES = (
    "transducer_toolkit.cli",
    "transducer_toolkit.data.datamodule",
    "transducer_toolkit.data.lhotse_datamodule",
    "transducer_toolkit.training.best_checkpoint",
    "transducer_toolkit.training.checkpoints",
    "transducer_toolkit.training.warm_start",
)
# Lightning's line "Initializing distributed: GLOBAL_RANK: 1, MEMBER: 2/2", one a process.
ONE_A_PROCESS = "lightning.fabric.utilities.distributed"


if TYPE_CHECKING:
    _StreamHandler = logging.StreamHandler[TextIO]
else:  # Python 3.10 cannot subscript it
    _StreamHandler = logging.StreamHandler


class ConsoleHandler(_StreamHandler):
    """Writes to the ``sys.stdout`` of the moment.

    A ``StreamHandler`` keeps the stream that it was made with. While a progress bar is shown, rich
    replaces ``sys.stdout``, and prints what it receives there above the bar.

    Args:
        stream: ignored; Hydra passes one.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        super().__init__()

    @property
    def stream(self) -> TextIO:
        return sys.stdout

    @stream.setter
    def stream(self, stream: TextIO) -> None:
        pass


class OneProcess(logging.Filter):
    """Drops the messages of all processes but the first, unless they concern that process."""

    def filter(self, record: logging.LogRecord) -> bool:
        if _rank() == 0 or record.levelno >= logging.ERROR:
            return True
        if record.levelno < logging.WARNING:
            return record.name == ONE_A_PROCESS
        return not record.name.startswith(SAME_IN_ALL_PROCESSES)


def _rank() -> int:
    """Returns the number of this process among those of a training."""
    lightning = sys.modules.get("lightning.fabric.utilities.rank_zero")
    rank = getattr(getattr(lightning, "rank_zero_only", None), "rank", None)
    if rank is not None:
        return int(rank)
    names = ("RANK", "LOCAL_RANK", "SLURM_PROCID")
    return next((int(os.environ[name]) for name in names if name in os.environ), 0)
