# SPDX-License-Identifier: Apache-2.0
"""Scores of a joiner from products of 8-bit integers, on the CPU.

Each row of the hidden layer and of the weight is divided by its own scale, so that its largest
element becomes 127, and rounded. One large row does not make the others less accurate.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from transducer_toolkit.ops import native, stages
from transducer_toolkit.ops.joint_tiles import JointWeights
from transducer_toolkit.ops.lattice import CellScores, LatticeBatch, RowTile
from transducer_toolkit.ops.options import LossOptions
from transducer_toolkit.ops.stages import Joint

# Hidden layer and integer logits of a tile. Products of fewer rows are slower.
TILE_BYTES = 3 * 2**20
MIN_TILE_ROWS = 256
WEIGHT_ROWS_AT_ONCE = 64
# Read once, because torch.compile cannot trace it. Not in every torch from 2.4 on.
_HAS_INT8_PRODUCTS = hasattr(torch, "_int_mm") and bool(
    getattr(torch.cpu, "_is_vnni_supported", lambda: False)()
)


def can_score(enc: Tensor) -> bool:
    """Returns whether the processor has instructions for such products."""
    is_narrow = enc.size(-1) <= native.extension.MAX_QUANTIZED_WIDTH
    return enc.device.type == "cpu" and is_narrow and _HAS_INT8_PRODUCTS


class _Weight(NamedTuple):
    rows: Tensor  # (D, V) int8
    scales: Tensor  # (V,) float32


def _quantize(weight: Tensor) -> _Weight:
    """Quantizes a weight (V, D). The scale of a row with a value that is not finite is NaN."""
    rows = native.mapped(weight.numel(), like=weight.new_empty(0, dtype=torch.int8)).view_as(weight)
    scales = weight.new_empty(weight.size(0))
    parts = zip(*(side.split(WEIGHT_ROWS_AT_ONCE) for side in (weight, rows, scales)), strict=True)
    buffer = torch.empty_like(weight[:WEIGHT_ROWS_AT_ONCE])
    for part, rounded, scale in parts:
        scaled = torch.abs(part, out=buffer[: part.size(0)])
        largest = scaled.amax(1)
        torch.div(largest, 127, out=scale).masked_fill_(~largest.isfinite(), torch.nan)
        inverse = (127 / largest).masked_fill_(~(largest > 1e-30), 0.0)
        torch.mul(part, inverse[:, None], out=scaled).round_().nan_to_num_(0.0, 0.0, 0.0)
        rounded.copy_(scaled)
    return _Weight(rows.t(), scales)


class Scorer:
    """Writes the scores of rows of a batch.

    Args:
        joint: float32.
        weights: float32.
        batch: the lattices.
        options: of the loss.
        out: the scores of the batch.
        tile_cells: rows of a tile; None chooses.
    """

    def __init__(
        self,
        joint: Joint,
        weights: JointWeights,
        batch: LatticeBatch,
        options: LossOptions,
        out: CellScores,
        tile_cells: int | None = None,
    ) -> None:
        self._joint, self._batch, self._options, self._out = joint, batch, options, out
        width, vocab_size = joint.enc.size(-1), weights.weight.size(0)
        self._weight = _quantize(weights.weight)
        self._bias = None if weights.bias is None else weights.bias.contiguous()
        if tile_cells is None:
            tile_cells = max(MIN_TILE_ROWS, TILE_BYTES // (width + 4 * vocab_size))
        count = max(1, -(-batch.num_rows // tile_cells))
        self._tile_rows = size = -(-batch.num_rows // count)
        self._hidden = joint.enc.new_empty(size, width, dtype=torch.int8)
        self._scales = joint.enc.new_empty(size)
        logits = native.mapped(size * vocab_size, like=joint.enc).view(torch.int32)
        self._logits = logits.view(size, vocab_size)

    def __call__(self, rows: Tensor | None = None) -> None:
        """Writes the scores of rows (N,) int64, ascending; None for all rows."""
        total = self._batch.num_rows if rows is None else rows.numel()
        count = -(-total // max(1, self._tile_rows))
        for index in range(count):
            begin, end = index * total // count, (index + 1) * total // count
            tile = RowTile(begin, end - begin, rows)
            hidden, scales, logits = (
                part[: tile.size] for part in (self._hidden, self._scales, self._logits)
            )
            stages.join_quantized(self._joint, self._batch, tile, hidden, scales)
            torch._int_mm(hidden, self._weight.rows, out=logits)
            quantized = stages.QuantizedLogits(logits, scales, self._weight.scales, self._bias)
            stages.quantized_cell_scores(quantized, self._batch, tile, self._options, self._out)
