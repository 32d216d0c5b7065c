# SPDX-License-Identifier: Apache-2.0
"""One more frame, also where there are no symbols."""

from __future__ import annotations

import torch
from torch import Tensor


def append_one(tensor: Tensor, dim: int, value: float = 0.0) -> Tensor:
    """Append one slice of ``value`` along ``dim``.

    torch 2.4's ``torch.nn.functional.pad`` refuses tensors that are empty along another axis.

    Args:
        tensor: any.
        dim: the axis that grows.
        value: of all new elements.

    Example:
        >>> append_one(torch.ones(2, 1), 1), append_one(torch.ones(2, 0), 0).shape
        (tensor([[1., 0.],
                [1., 0.]]), torch.Size([3, 0]))
    """
    shape = list(tensor.shape)
    shape[dim] = 1
    return torch.cat((tensor, tensor.new_full(shape, value)), dim)
