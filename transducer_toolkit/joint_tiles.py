# SPDX-License-Identifier: Apache-2.0
"""``Linear(activation(enc_t + pred_u))`` of lattice cells, a tile of rows at a time.

Neither the hidden layer nor (for a fused loss, unless they are few) the logits of all cells exist
at once: a tile is made, used, and its memory taken for the next. Backward makes it again. The
matrix products are torch's; the tile is small enough to stay in cache between them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from transducer_toolkit import native

# Hidden layer, its gradient and logits of a tile together. On two CPUs tiles of 4 to 16 MiB were
# within 10 % of each other, 4 the fastest at V = 500 and 10 at V = 5000, and others slower. A GPU
# needs more rows to be busy, and each tile costs it a round of launches.
TILE_BYTES = {"cpu": 10 * 2**20, "cuda": 512 * 2**20}
# In a forward that keeps its logits smaller ones are faster: the hidden layer stays in the cache.
TILE_BYTES_BESIDE_KEPT = {"cpu": 4 * 2**20, "cuda": 512 * 2**20}
# A tile takes no more than this share of a GPU's memory: 128 MiB of 8 GiB.
TILE_SHARE_OF_DEVICE = 1 / 64
# A product on the CPU copies its right-hand side into the order it likes. So the weight goes in by
# panels of at most this size, or that copy would be as large as the weight. A GPU makes none.
PANEL_BYTES = {"cpu": 2 * 2**20}
# If all logits together are no more than this, backward need not make them again.
KEPT_LOGITS_BYTES = {"cpu": 16 * 2**20, "cuda": 128 * 2**20}
MIN_PANEL_ROWS = 256  # narrower products are slow: at D = 8192 panels of 2 MiB took 40 % more time
# cuBLAS takes its fast 16-bit kernels only where every row begins at a multiple of 16 bytes. So the
# tiles of a fused loss get a vocabulary that is a multiple of this.
VOCAB_MULTIPLE = {"cuda": 8}


def automatic_tile_cells(enc: Tensor, vocab_size: int, beside_kept: bool) -> int:
    """Rows of a tile such that a tile takes TILE_BYTES, whatever V and D are."""
    row_bytes = (2 * enc.size(-1) + vocab_size) * enc.element_size()
    budgets = TILE_BYTES_BESIDE_KEPT if beside_kept else TILE_BYTES
    budget = budgets.get(enc.device.type, budgets["cpu"])
    if enc.device.type == "cuda":
        memory = torch.cuda.get_device_properties(enc.device).total_memory
        budget = min(budget, int(memory * TILE_SHARE_OF_DEVICE))
    return max(64, budget // row_bytes)


def padded_vocab_size(enc: Tensor, vocab_size: int) -> int:
    """Columns of the logits of a tile: V, for 16-bit types rounded up to VOCAB_MULTIPLE."""
    multiple = VOCAB_MULTIPLE.get(enc.device.type, 1) if enc.dtype in native.SIXTEEN_BIT else 1
    return -(-vocab_size // multiple) * multiple


def are_logits_few(enc: Tensor, vocab_size: int, num_rows: int) -> bool:
    """Whether logits of `num_rows` rows in the dtype of enc are within KEPT_LOGITS_BYTES."""
    budget = KEPT_LOGITS_BYTES.get(enc.device.type, 0)
    row_bytes = padded_vocab_size(enc, vocab_size) * enc.element_size()
    return bool(num_rows * row_bytes <= budget)


def _panels(weight: Tensor) -> list[slice]:
    """Cut the rows of a weight into equal panels of PANEL_BYTES or MIN_PANEL_ROWS, the larger."""
    vocab_size, width = weight.shape
    panel_bytes = PANEL_BYTES.get(weight.device.type)
    count = 1
    if panel_bytes is not None:
        rows = max(MIN_PANEL_ROWS, panel_bytes // max(1, width * weight.element_size()))
        count = max(1, -(-vocab_size // rows))
    edges = [index * vocab_size // count for index in range(count + 1)]
    return [slice(begin, end) for begin, end in itertools.pairwise(edges)]


# torch 2.8 and later: a product of 16-bit matrices can be handed out in float32, on CUDA only.
_MM_HAS_OUT_DTYPE = "dtype" in torch.ops.aten.mm.overloads()


def _mm_to_float32(left: Tensor, right: Tensor) -> Tensor:
    """The product of two 16-bit matrices as a term of a float32 sum.

    On CUDA it is float32 where torch can return that. Otherwise torch rounds it to 16 bits.
    """
    if _MM_HAS_OUT_DTYPE and left.device.type == "cuda":
        return torch.mm(left, right, out_dtype=torch.float32)
    return torch.mm(left, right)


def autocast(tensor: Tensor) -> Tensor:
    """In the dtype that autocast, where it is on, would give a matrix product; float64 stays."""
    device_type = tensor.device.type
    if tensor.dtype != torch.float64 and torch.is_autocast_enabled(device_type):
        return tensor.to(torch.get_autocast_dtype(device_type))
    return tensor


class Gradients(NamedTuple):
    """Gradients of enc, pred, weight and bias; None where none is wanted."""

    enc: Tensor | None
    pred: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


class JointTiles:
    """The joiner of a batch, by tiles. Arguments are trusted; autograd is not involved.

    Args:
        enc: (B, T, D), contiguous.
        pred: (B, U + 1, D), contiguous, same dtype: that of the arithmetic.
        weight: (V, D), of any floating dtype.
        bias: (V,) or None.
        batch: the lattices.
        activation: one of native.ACTIVATIONS.
        tile_cells: rows of a tile; 0 chooses.
        beside_kept: this is a forward that keeps all logits.
        pads_vocab: logits have :func:`padded_vocab_size` columns. Those of no symbol are -inf.
    """

    def __init__(
        self,
        enc: Tensor,
        pred: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        batch: native.LatticeBatch,
        *,
        activation: str,
        tile_cells: int = 0,
        beside_kept: bool = False,
        pads_vocab: bool = False,
    ) -> None:
        self.enc, self.pred, self.batch, self.activation = enc, pred, batch, activation
        self.weight = weight.to(enc.dtype)
        self.bias = None if bias is None else bias.to(enc.dtype)
        self.vocab_size, self.width = weight.shape  # vocab_size: columns of the logits
        self._num_symbols = self.vocab_size
        if pads_vocab:
            self.vocab_size = padded_vocab_size(enc, self._num_symbols)
            self._pad_vocab()
        self.tile_cells = tile_cells or automatic_tile_cells(enc, self.vocab_size, beside_kept)
        self._panels = _panels(self.weight)
        self._tile_rows = 0  # of the largest tile
        # What forward does not touch costs it nothing, so gradients come last.
        self._widths = {"hidden": self.width, "logits": self.vocab_size, "grad_hidden": self.width}
        self._workspace: Tensor | None = None
        self._wanted: tuple[bool, ...] = ()
        self._parameter_dtypes = weight.dtype, None if bias is None else bias.dtype

    def _pad_vocab(self) -> None:
        """Appends to weight and bias what makes logits of -inf, which no softmax sees."""
        padding = self.vocab_size - self._num_symbols
        if padding == 0:
            return
        if self.bias is None:
            self.bias = self.weight.new_zeros(self._num_symbols)
        self.weight = torch.cat([self.weight, self.weight.new_zeros(padding, self.width)])
        self.bias = torch.cat([self.bias, self.bias.new_full((padding,), -torch.inf)])

    def tiles(
        self, rows: Tensor | None = None, *, whole_logits: bool = False
    ) -> Iterator[native.RowTile]:
        """Tiles of all rows of the batch, or of `rows` (N,), ascending; native.RowTile has more."""
        total = self.batch.num_rows if rows is None else rows.numel()
        # Equal tiles: a short one at the end would be as slow as a whole one.
        count = -(-total // self.tile_cells)
        self._tile_rows = -(-total // max(count, 1))
        self._workspace = None
        for index in range(count):
            begin, end = index * total // count, (index + 1) * total // count
            yield native.RowTile(begin, end - begin, rows, whole_logits=whole_logits)

    def buffer(self, name: str, num_rows: int) -> Tensor:
        """(num_rows, width) of the tile's memory; the next call with this name takes it again."""
        if self._workspace is None:
            # In one piece, and not from the heap: in its holes the peak would depend on what else
            # was made and freed, and be twice as large at times.
            size = self._tile_rows * sum(self._widths.values())
            self._workspace = native.mapped(size, like=self.enc)
        begin = 0
        for other, width in self._widths.items():
            if other == name:
                break
            begin += self._tile_rows * width
        return self._workspace[begin : begin + num_rows * width].view(num_rows, width)

    def hidden(self, tile: native.RowTile) -> Tensor:
        """activation(enc_t + pred_u): (tile rows, D), overwritten by the next tile."""
        out = self.buffer("hidden", tile.size)
        native.join_forward(
            self.enc, self.pred, self.batch, tile, activation=self.activation, out=out
        )
        return out

    def logits(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        """hidden @ weight.T + bias: (tile rows, V), overwritten by the next tile unless `out`."""
        if out is None:
            out = self.buffer("logits", hidden.size(0))
        for panel in self._panels:
            weight, columns = self.weight[panel].t(), out[:, panel]
            if self.bias is None:
                torch.mm(hidden, weight, out=columns)
            else:
                torch.addmm(self.bias[panel], hidden, weight, out=columns)
        return out

    def start_backward(self, wanted: tuple[bool, ...]) -> None:
        """Makes room for the gradients: enc, pred, weight, bias, those that are wanted.

        Sums are in float32 or wider: of tiles, rounding in 16 bits would add up.
        """
        dtype = native.compute_dtype(self.enc.dtype)
        self._wanted = wanted
        inputs = bool(wanted[0] or wanted[1])
        self._grad_enc = torch.zeros_like(self.enc, dtype=dtype) if inputs else None
        self._grad_pred = torch.zeros_like(self.pred, dtype=dtype) if inputs else None
        self._grad_weight = torch.zeros_like(self.weight, dtype=dtype) if wanted[2] else None
        self._grad_bias = self.weight.new_zeros(self.vocab_size, dtype=dtype) if wanted[3] else None

    def backward(self, tile: native.RowTile, hidden: Tensor, grad_logits: Tensor) -> None:
        """Adds what a tile contributes to the gradients."""
        if self._grad_weight is not None:
            for panel in self._panels:
                grad_weight, columns = self._grad_weight[panel], grad_logits[:, panel]
                if grad_weight.dtype == columns.dtype:
                    grad_weight.addmm_(columns.t(), hidden)
                else:
                    grad_weight += _mm_to_float32(columns.t(), hidden)
        if self._grad_bias is not None:
            self._grad_bias += grad_logits.sum(0, dtype=self._grad_bias.dtype)
        if self._grad_enc is not None and self._grad_pred is not None:
            grad_hidden = self.buffer("grad_hidden", hidden.size(0))
            native.join_backward(
                torch.mm(grad_logits, self.weight, out=grad_hidden),
                hidden,
                self.enc,
                self.pred,
                self.batch,
                tile,
                activation=self.activation,
                grad_enc=self._grad_enc,
                grad_pred=self._grad_pred,
            )

    def gradients(self, scale: Tensor | None = None) -> Gradients:
        """The sums, multiplied by `scale` (a scalar tensor), in the dtypes of the inputs."""
        grad_weight, grad_bias = (
            None if grad is None else grad[: self._num_symbols]
            for grad in (self._grad_weight, self._grad_bias)
        )
        sums = (self._grad_enc, self._grad_pred, grad_weight, grad_bias)
        dtypes = (self.enc.dtype, self.pred.dtype, *self._parameter_dtypes)
        return Gradients(
            *(
                (grad if scale is None else grad * scale).to(dtype)
                if wanted and grad is not None
                else None
                for grad, dtype, wanted in zip(sums, dtypes, self._wanted, strict=True)
            )
        )
