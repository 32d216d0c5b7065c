# SPDX-License-Identifier: Apache-2.0
"""Rows by index, with a gradient that is the same bits each time."""

from __future__ import annotations

import torch
from torch import Tensor


def pick_rows(rows: Tensor, index: Tensor) -> Tensor:
    """``out[b, i] = rows[b, index[b, i]]``; an index may come several times.

    On CUDA the backwards of ``gather`` and ``index_select`` add with atomics, in whatever order
    they arrive; that of indexing sorts first. On the CPU ``index_select`` copies whole rows, where
    there are such: several times as fast as ``gather``.

    Args:
        rows: (B, N, D).
        index: (B, M) int64 in [0, N).

    Returns:
        (B, M, D).

    Example:
        >>> pick_rows(torch.tensor([[[1.0], [2.0]]]), torch.tensor([[1, 0, 1]])).flatten()
        tensor([2., 1., 2.])
    """
    if rows.is_cuda:
        utterances = torch.arange(rows.size(0), device=rows.device)[:, None]
        return rows[utterances, index]
    if rows.is_contiguous():
        first = torch.arange(rows.size(0), device=rows.device)[:, None] * rows.size(1)
        picked = rows.flatten(0, 1).index_select(0, (first + index).flatten())
        return picked.view(*index.shape, rows.size(2))
    return rows.gather(1, index[:, :, None].expand(-1, -1, rows.size(2)))
