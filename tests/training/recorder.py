# SPDX-License-Identifier: Apache-2.0
"""A callback that writes down the batches of a training, and kills it where a test wants."""

import json
import os
import signal

from lightning import Callback


class RecordBatches(Callback):
    """Append epoch, batch and utterances of each finished step to ``path``.

    Args:
        path: JSON-lines file; each process appends its rank.
        kill_after: optimizer steps, of this process, before ``signal_name`` is sent to it; None
            for none.
        signal_name: such as "SIGKILL".
        rank: of the process that gets the signal.
        raise_in: hook that raises a RuntimeError after ``kill_after`` steps, instead of a signal.
    """

    def __init__(self, path, kill_after=None, signal_name="SIGKILL", rank=0, raise_in=None):
        self.path = path
        self.kill_after = kill_after
        self.signal = getattr(signal, signal_name)
        self.rank = rank
        self.steps = 0
        if raise_in is not None:
            setattr(self, raise_in, self.fail)
            self.signal = None

    def fail(self, *args, **kwargs):
        if self.steps == self.kill_after:
            raise RuntimeError("a fault of the test")

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.steps += 1
        row = [trainer.current_epoch, batch_idx, batch.utterance_ids]
        with open(f"{self.path}.{trainer.global_rank}", "a") as file:
            file.write(json.dumps(row) + "\n")
        is_now = self.steps == self.kill_after and trainer.global_rank == self.rank
        if self.signal is not None and is_now:
            os.kill(os.getpid(), self.signal)


def recorded(path, rank=0):
    """Rows of a process, in order."""
    with open(f"{path}.{rank}") as file:
        return [json.loads(line) for line in file]
