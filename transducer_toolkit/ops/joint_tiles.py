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

from transducer_toolkit.ops import native, stages
from transducer_toolkit.ops.lattice import LatticeBatch, RowTile
from transducer_toolkit.ops.stages import Joint

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
    # Not bool(...): torch 2.4 cannot trace that of a symbolic size.
    return True if num_rows * row_bytes <= budget else False  # noqa: SIM210


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


class JointWeights(NamedTuple):
    """The output layer of a joiner.

    Attributes:
        weight: (V, D), of any floating dtype.
        bias: (V,) of any floating dtype, or None.
    """

    weight: Tensor
    bias: Tensor | None


class JointTiles:
    """The joiner of a batch, by tiles. Arguments are trusted; autograd is not involved.

    Args:
        joint: encoder and predictor outputs in the dtype of the arithmetic, and the activation.
        weights: the output layer.
        batch: the lattices.
        tile_cells: rows of a tile; None chooses.
        beside_kept: this is a forward that keeps all logits.
        pads_vocab: logits have :func:`padded_vocab_size` columns. Those of no symbol are -inf.
    """

    def __init__(
        self,
        joint: Joint,
        weights: JointWeights,
        batch: LatticeBatch,
        *,
        tile_cells: int | None = None,
        beside_kept: bool = False,
        pads_vocab: bool = False,
    ) -> None:
        self.joint, self.batch = joint, batch
        weight, bias = weights
        dtype = joint.enc.dtype
        self.weight = weight.to(dtype)
        self.bias = None if bias is None else bias.to(dtype)
        self.vocab_size, self.width = weight.shape  # vocab_size: columns of the logits
        self._num_symbols = self.vocab_size
        if pads_vocab:
            self.vocab_size = padded_vocab_size(joint.enc, self._num_symbols)
            self._pad_vocab()
        if tile_cells is None:
            tile_cells = automatic_tile_cells(joint.enc, self.vocab_size, beside_kept)
        self.tile_cells = tile_cells
        self._panels = _panels(self.weight)
        self._tile_rows = 0  # of the largest tile
        self._wanted: frozenset[str] = frozenset()
        # What forward does not touch costs it nothing, so gradients come last.
        self._widths = {"hidden": self.width, "logits": self.vocab_size, "grad_hidden": self.width}
        self._workspace: Tensor | None = None
        self._sums: dict[str, Tensor] = {}  # of the gradients, by name
        self._dtypes = {"enc": dtype, "pred": dtype, "weight": weight.dtype}
        if bias is not None:
            self._dtypes["bias"] = bias.dtype

    def _pad_vocab(self) -> None:
        """Appends columns of logits that are -inf, which no softmax sees."""
        padding = self.vocab_size - self._num_symbols
        if padding == 0:
            return
        if self.bias is None:
            self.bias = self.weight.new_zeros(self._num_symbols)
        self.weight = torch.cat([self.weight, self.weight.new_zeros(padding, self.width)])
        self.bias = torch.cat([self.bias, self.bias.new_full((padding,), -torch.inf)])

    def tiles(self, rows: Tensor | None = None, *, whole_logits: bool = False) -> Iterator[RowTile]:
        """Tiles of all rows of the batch, or of `rows` (N,), ascending; RowTile has more."""
        total = self.batch.num_rows if rows is None else rows.numel()
        # Equal tiles: a short one at the end would be as slow as a whole one.
        count = -(-total // self.tile_cells)
        self._tile_rows = -(-total // max(count, 1))
        self._workspace = None
        for index in range(count):
            begin, end = index * total // count, (index + 1) * total // count
            yield RowTile(begin, end - begin, rows, whole_logits=whole_logits)

    def buffer(self, name: str, num_rows: int) -> Tensor:
        """(num_rows, width) of the tile's memory; the next call with this name takes it again."""
        if self._workspace is None:
            # In one piece, and not from the heap: in its holes the peak would depend on what else
            # was made and freed, and be twice as large at times.
            size = self._tile_rows * sum(self._widths.values())
            self._workspace = native.mapped(size, like=self.joint.enc)
        begin = 0
        for other, width in self._widths.items():
            if other == name:
                break
            begin += self._tile_rows * width
        return self._workspace[begin : begin + num_rows * width].view(num_rows, width)

    def hidden(self, tile: RowTile) -> Tensor:
        """activation(enc_t + pred_u): (tile rows, D), overwritten by the next tile."""
        out = self.buffer("hidden", tile.size)
        stages.join_forward(self.joint, self.batch, tile, out)
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

    def start_backward(self, wanted: frozenset[str]) -> None:
        """Makes room for the wanted gradients, of "enc", "pred", "weight" and "bias".

        Sums are in float32 or wider: rounded to 16 bits after each tile, they would be wrong.
        """
        dtype = native.compute_dtype(self.joint.enc.dtype)
        enc, pred = self.joint.enc, self.joint.pred
        self._wanted = wanted
        if wanted & {"enc", "pred"}:  # one stage computes both
            self._sums["enc"] = torch.zeros_like(enc, dtype=dtype)
            self._sums["pred"] = torch.zeros_like(pred, dtype=dtype)
        if "weight" in wanted:
            self._sums["weight"] = torch.zeros_like(self.weight, dtype=dtype)
        if "bias" in wanted:
            self._sums["bias"] = self.weight.new_zeros(self.vocab_size, dtype=dtype)

    def backward(self, tile: RowTile, hidden: Tensor, grad_logits: Tensor) -> None:
        """Adds what a tile contributes to the gradients."""
        if "weight" in self._sums:
            for panel in self._panels:
                grad_weight, columns = self._sums["weight"][panel], grad_logits[:, panel]
                if grad_weight.dtype == columns.dtype:
                    grad_weight.addmm_(columns.t(), hidden)
                else:
                    grad_weight += _mm_to_float32(columns.t(), hidden)
        if "bias" in self._sums:
            self._sums["bias"] += grad_logits.sum(0, dtype=self._sums["bias"].dtype)
        if "enc" in self._sums:
            grad_hidden = self.buffer("grad_hidden", hidden.size(0))
            torch.mm(grad_logits, self.weight, out=grad_hidden)
            grads = self._sums["enc"], self._sums["pred"]
            stages.join_backward(self.joint, self.batch, tile, hidden, grad_hidden, grads)

    def gradients(self, scale: Tensor | None = None) -> dict[str, Tensor]:
        """Returns the wanted gradients in the dtypes of the inputs.

        Args:
            scale: a scalar tensor that multiplies them, or None.
        """
        grads = {}
        for name in self._wanted:
            total = self._sums[name]
            if name in ("weight", "bias"):  # without the padding of the vocabulary
                total = total[: self._num_symbols]
            scaled = total if scale is None else total * scale
            grads[name] = scaled.to(self._dtypes[name])
        return grads
