# SPDX-License-Identifier: Apache-2.0
"""Gradient accumulation in which every encoder frame has the same weight."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


class FrameWeights:
    """Turns Lightning's mean over accumulated batches into the mean over all of their frames.

    Let S_i be the summed loss and F_i the number of frames of batch i. A step needs the gradient
    of ``sum_i S_i / sum_i F_i``. Lightning divides the loss of each of N batches by N, even if an
    epoch ends before the N-th. Therefore :meth:`weigh` turns the loss of batch i into
    ``S_i / F_1``, and :meth:`finish` multiplies the gradients by ``N F_1 / sum_i F_i`` before the
    step. If a step has a single batch, neither changes anything.

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
        """Returns the loss of a batch, weighted by the frames of the batch.

        Args:
            loss: () mean loss over the frames of the batch.
            num_frames: () float, frames of the batch; under DDP the mean over the processes.
            starts_step: whether the batch is the first of an optimizer step.

        Returns:
            () ``loss`` times the frames of this batch over the frames of the first batch.
        """
        if starts_step or self._first is None or self._sum is None:
            self._first = self._sum = num_frames
            return loss
        self._sum = self._sum + num_frames
        return loss * (num_frames / self._first)

    @torch.no_grad()
    def finish(self, parameters: Iterable[Tensor], num_batches: int) -> None:
        """Scales the accumulated gradients in place, so that they are the mean over all frames.

        Args:
            parameters: the parameters whose ``grad`` is scaled.
            num_batches: N, by which Lightning divided the loss of each batch.
        """
        if num_batches > 1 and self._first is not None and self._sum is not None:
            factor = num_batches * self._first / self._sum
            grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
            if grads:  # empty if SkipNonFiniteSteps has dropped all gradients
                torch._foreach_mul_(grads, factor)
        self._first = self._sum = None
