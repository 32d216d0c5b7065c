# SPDX-License-Identifier: Apache-2.0
"""A DataLoader that can resume within an epoch."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader

from transducer_toolkit.data.batching import LatticeBatchSampler

__all__ = ["ResumableLoader"]

logger = logging.getLogger(__name__)


class ResumableLoader(DataLoader[Any]):
    """A DataLoader that continues after the last batch before a checkpoint.

    Batches and augmentation are functions of (seed, epoch). The state is therefore the epoch and
    the number of batches given; skipped batches are never read. Lightning saves and restores the
    state through ``state_dict`` and ``load_state_dict``.

    An epoch begins with the request for its first batch, not with ``iter()``: when a training is
    resumed, Lightning makes the iterator before it sets the epoch.

    Args:
        dataset, batch_sampler, ...: as for :class:`torch.utils.data.DataLoader`; ``batch_sampler``
            is a :class:`~transducer_toolkit.data.batching.LatticeBatchSampler`.

    Example:
        >>> loader = ResumableLoader(dataset, batch_sampler=sampler)  # doctest: +SKIP
        >>> loader.load_state_dict(checkpointed)  # doctest: +SKIP
        >>> remaining = list(loader)  # doctest: +SKIP
    """

    batch_sampler: LatticeBatchSampler
    _given = (0, 0)  # epoch, batches given in it
    _resume = (0, 0)  # the same two numbers, from a checkpoint

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        epoch = self.batch_sampler.epoch
        start = self._resume[1] if self._resume[0] == epoch else 0
        self._resume = (0, 0)
        self.batch_sampler.start = start
        self._given = (epoch, start)
        for number, batch in enumerate(super().__iter__(), start=start + 1):
            self._given = (epoch, number)
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Return the position of the iteration and the options that the batches depend on."""
        epoch, num_batches = self._given
        return {"epoch": epoch, "num_batches": num_batches, "made_by": self.batch_sampler.options}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Make the next iteration of the checkpoint's epoch skip the batches before the checkpoint.

        If an option has changed since (the number of processes, for example), the batches differ
        and the rest of the epoch is another one; a warning names the options.
        """
        self._resume = (state_dict["epoch"], state_dict["num_batches"])
        now, then = self.batch_sampler.options, state_dict["made_by"]
        changed = [f"{name} {then.get(name)} -> {now[name]}" for name in now
                   if now[name] != then.get(name)]  # fmt: skip
        if changed and self._resume[1] > 0:
            logger.warning(
                "the batches differ from those before the checkpoint (%s): the rest of epoch %d "
                "repeats some utterances and leaves out others",
                ", ".join(changed),
                self._resume[0],
            )
