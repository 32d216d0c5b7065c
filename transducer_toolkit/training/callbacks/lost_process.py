# SPDX-License-Identifier: Apache-2.0
"""What to say when another process of a group has ended."""

from __future__ import annotations

import logging
import re

from lightning import Callback, LightningModule, Trainer

__all__ = ["NameLostProcess"]

logger = logging.getLogger(__name__)

# Of gloo and of NCCL, whose errors name a socket and a source file.
_LOST = re.compile(
    r"connection (was )?(closed|reset|refused)|broken pipe|closed by peer|remote process|"
    r"socket|nccl (communicator was )?abort",
    re.IGNORECASE,
)


class NameLostProcess(Callback):
    """Say in plain words that this process ends because another of the training has ended.

    The error itself is left as it is, and ends the process.

    Example:
        >>> callback = NameLostProcess()
    """

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        reason = str(exception).partition("\n")[0]
        if trainer.world_size > 1 and isinstance(exception, RuntimeError) and _LOST.search(reason):
            logger.error(
                "process %d of %d: a process of this training has ended, so this one ends too "
                "(%s). Why that one did is in its own output, or it was killed: by hand, or by the "
                "system for want of memory. ckpt_path=last goes on from the last checkpoint",
                trainer.global_rank,
                trainer.world_size,
                reason,
            )
