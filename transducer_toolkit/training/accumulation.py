# SPDX-License-Identifier: Apache-2.0
"""Accumulated batches that count by their frames, as one large batch of them would."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


class FrameWeights:
    """Turns Lightning's mean over accumulated batches into the mean over all of their frames.

    With S_i the summed loss and F_i the frames of batch i, the gradient wanted of a step is that
    of ``sum_i S_i / sum_i F_i``. Lightning divides the loss of each of N batches by N, also where
    an epoch ends before the N-th. So batch i gives the loss ``S_i / F_1``, and before the step
    the gradients are multiplied by ``N F_1 / sum_i F_i``. A step of one batch is left alone.

    Example:
        >>> weights, x = FrameWeights(), torch.ones(1, requires_grad=True)
        >>> for first, sum_of_loss, frames in ((True, 6 * x, 2.0), (False, 30 * x, 4.0)):
        ...     frames = torch.tensor(frames)
        ...     loss = weights.weigh(sum_of_loss / frames, frames, starts_step=first)
        ...     (loss / 2).backward()
        >>> weights.finish([x], 2)
        >>> x.grad  # 36 / 6
        tensor([6.])
    """

    def __init__(self) -> None:
        self._first: Tensor | None = None
        self._sum: Tensor | None = None

    def weigh(self, loss: Tensor, num_frames: Tensor, *, starts_step: bool) -> Tensor:
        """The loss that a batch has to give.

        Args:
            loss: () the batch's mean over its frames.
            num_frames: () float, its frames; under DDP the mean over the processes.
            starts_step: whether it is the first batch of an optimizer step.

        Returns:
            () ``loss`` times its frames over those of the first batch.
        """
        if starts_step or self._first is None or self._sum is None:
            self._first = self._sum = num_frames
            return loss
        self._sum = self._sum + num_frames
        return loss * (num_frames / self._first)

    @torch.no_grad()
    def finish(self, parameters: Iterable[Tensor], num_batches: int) -> None:
        """Bring the accumulated gradients to the mean over all frames, in place.

        Args:
            parameters: whose ``grad`` to scale.
            num_batches: N, what Lightning divided the loss of each batch by.
        """
        if num_batches > 1 and self._first is not None and self._sum is not None:
            factor = num_batches * self._first / self._sum
            grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
            if grads:  # a skipped step may have dropped them all
                torch._foreach_mul_(grads, factor)
        self._first = self._sum = None
