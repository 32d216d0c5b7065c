# SPDX-License-Identifier: Apache-2.0
"""Rows by index, with a gradient that is the same bits each time."""

from __future__ import annotations

import torch
from torch import Tensor


def pick_rows(rows: Tensor, index: Tensor) -> Tensor:
    """``out[b, i] = rows[b, index[b, i]]``; an index may come several times.

    On CUDA the backward of ``gather`` adds with atomics, in whatever order they arrive; that of
    indexing sorts first.

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
    return rows.gather(1, index[:, :, None].expand(-1, -1, rows.size(2)))
