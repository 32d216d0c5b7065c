# SPDX-License-Identifier: Apache-2.0
"""A callback that explains errors which the end of another process has caused."""

from __future__ import annotations

import logging
import re

from lightning import Callback, LightningModule, Trainer

__all__ = ["NameLostProcess"]

logger = logging.getLogger(__name__)

# Messages of gloo and NCCL when a connection is lost. They name a socket and a source file only.
_LOST = re.compile(
    r"connection (was )?(closed|reset|refused)|broken pipe|closed by peer|remote process|"
    r"socket|nccl (communicator was )?abort",
    re.IGNORECASE,
)


class NameLostProcess(Callback):
    """Logs an explanation if this process fails because another process of the training has ended.

    The error itself is raised unchanged.

    Example:
        >>> callback = NameLostProcess()
    """

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        reason = str(exception).partition("\n")[0]
        if trainer.world_size > 1 and isinstance(exception, RuntimeError) and _LOST.search(reason):
            logger.error(
                "process %d of %d: another process of this training has ended, so this process "
                "ends too (%s). Look for the cause in the output of that process. If it names no "
                "cause, it was killed, for example because memory ran out. ckpt_path=last resumes "
                "from the last checkpoint",
                trainer.global_rank,
                trainer.world_size,
                reason,
            )
