# SPDX-License-Identifier: Apache-2.0
"""``Linear(activation(enc_t + pred_u))`` of lattice cells, computed in tiles of rows.

The hidden layer of all cells never exists at once. The logits of all cells exist only in
``joiner_logits``, and in a fused loss if they are small. All tiles use the same memory. Backward
computes the tiles again. torch computes the matrix products; on the CPU a tile is small enough to
stay in the cache between two of them.
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

# Size of the hidden layer, its gradient and the logits of a tile together. On two CPUs, the times
# of tiles of 4 to 16 MiB were within 10 % of each other (4 MiB was fastest at V = 500, 10 MiB at
# V = 5000), and other sizes were slower. A GPU needs more rows to be busy, and launches several
# kernels for each tile.
TILE_BYTES = {"cpu": 10 * 2**20, "cuda": 512 * 2**20}
# The same beside other large buffers, such as all logits that forward keeps. Smaller tiles are
# faster on the CPU, because the hidden layer stays in the cache.
TILE_BYTES_BESIDE_KEPT = {"cpu": 3 * 2**20, "cuda": 512 * 2**20}
# Products of fewer rows are slower on the CPU, because each copies the weight. With V = 8198 and
# D = 640, a step with tiles of 82 rows took 8 % longer than with 192.
MIN_TILE_ROWS = {"cpu": 192, "cuda": 64}
# A tile takes at most this fraction of a GPU's memory: 128 MiB of 8 GiB.
TILE_SHARE_OF_DEVICE = 1 / 64
# A matrix product on the CPU copies its right operand into another layout. The weight is therefore
# multiplied in panels of at most this size; otherwise the copy would be as large as the weight. On
# a GPU no copy is made.
PANEL_BYTES = {"cpu": 2 * 2**20}
# The same for products of 16 bits: for the panels of the gradient of the weight in float32, and for
# those of a float32 weight, which are cast.
NARROW_PANEL_BYTES = {"cpu": 2**20}
# If all logits together are at most this large, forward keeps them for backward.
KEPT_LOGITS_BYTES = {"cpu": 16 * 2**20, "cuda": 128 * 2**20}
# Narrower products are slow: at D = 8192, panels of 2 MiB took 40 % more time.
MIN_PANEL_ROWS = 256
# cuBLAS uses its fast kernels for 16 bits and TF32 only if every row begins at a multiple of 16
# bytes. So the tiles of a fused loss get a vocabulary that is a multiple of this, in every dtype:
# the tiles of two precisions add to the same sums.
VOCAB_MULTIPLE = {"cuda": 8}


def automatic_tile_cells(like: Tensor, num_numbers: int, beside_kept: bool) -> int:
    """Returns the number of rows for which a tile takes TILE_BYTES, but at least MIN_TILE_ROWS.

    Args:
        like: a tensor with the dtype and the device of the products.
        num_numbers: numbers of that dtype in a row: those of the hidden layer, of its gradient and
            of the logits.
        beside_kept: as of JointTiles.
    """
    row_bytes = num_numbers * like.element_size()
    budgets = TILE_BYTES_BESIDE_KEPT if beside_kept else TILE_BYTES
    budget = budgets.get(like.device.type, budgets["cpu"])
    min_rows = MIN_TILE_ROWS.get(like.device.type, MIN_TILE_ROWS["cpu"])
    return max(min_rows, within_share_of_device(budget, like.device) // row_bytes)


def within_share_of_device(num_bytes: int, device: torch.device) -> int:
    """Returns `num_bytes`, but at most TILE_SHARE_OF_DEVICE of a GPU's memory."""
    if device.type != "cuda":
        return num_bytes
    memory = torch.cuda.get_device_properties(device).total_memory
    return min(num_bytes, int(memory * TILE_SHARE_OF_DEVICE))


def padded_vocab_size(device: torch.device, vocab_size: int) -> int:
    """Returns the number of columns of a tile's logits: V, rounded up to VOCAB_MULTIPLE."""
    multiple = VOCAB_MULTIPLE.get(device.type, 1)
    return -(-vocab_size // multiple) * multiple


def are_logits_few(enc: Tensor, vocab_size: int, num_rows: int) -> bool:
    """Returns whether `num_rows` rows of logits fit into KEPT_LOGITS_BYTES."""
    budget = KEPT_LOGITS_BYTES.get(enc.device.type, 0)
    row_bytes = padded_vocab_size(enc.device, vocab_size) * enc.element_size()
    # Not bool(...): torch 2.4 cannot trace it for a symbolic size.
    return True if num_rows * row_bytes <= budget else False  # noqa: SIM210


def _panels(vocab_size: int, width: int, like: Tensor, bytes_of: dict[str, int]) -> list[slice]:
    """Divides the rows of a weight (V, D) with the dtype and the device of `like` into panels.

    They are equal. A panel has about as many bytes as `bytes_of` says for the device, but at least
    MIN_PANEL_ROWS rows.
    """
    panel_bytes = bytes_of.get(like.device.type)
    count = 1
    if panel_bytes is not None:
        rows = max(MIN_PANEL_ROWS, panel_bytes // max(1, width * like.element_size()))
        count = max(1, -(-vocab_size // rows))
    edges = [index * vocab_size // count for index in range(count + 1)]
    return [slice(begin, end) for begin, end in itertools.pairwise(edges)]


def _finite(weight: Tensor) -> Tensor:
    """Replaces the infinities of a weight that was cast by the largest number of its dtype."""
    largest = torch.finfo(weight.dtype).max
    return weight.clamp_(-largest, largest)


# Since torch 2.8, a product of 16-bit matrices can be returned as float32, on CUDA only.
_MM_HAS_OUT_DTYPE = "dtype" in torch.ops.aten.mm.overloads()


def _mm_to_float32(left: Tensor, right: Tensor) -> Tensor:
    """Returns the product of two 16-bit matrices, to be added to a float32 sum.

    On CUDA, it is float32 if torch supports that. Otherwise torch rounds it to 16 bits.
    """
    if _MM_HAS_OUT_DTYPE and left.device.type == "cuda":
        return torch.mm(left, right, out_dtype=torch.float32)
    return torch.mm(left, right)


def autocast(tensor: Tensor) -> Tensor:
    """Casts a tensor as autocast casts the inputs of a matrix product.

    torch casts float16, bfloat16 and float32, and leaves float64 and integers as they are.
    """
    device_type = tensor.device.type
    if (
        tensor.is_floating_point()
        and tensor.dtype != torch.float64
        and device_type != "meta"  # which has no autocast
        and torch.is_autocast_enabled(device_type)
    ):
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
    """Forward and backward of the joiner of a batch, in tiles, outside of autograd.

    The arguments are not checked.

    Args:
        joint: encoder and predictor outputs in the dtype of the join, and the activation.
        weights: the output layer.
        batch: the lattices.
        tile_cells: number of rows of a tile; None for an automatic size.
        beside_kept: whether other large buffers exist, such as all logits: a tile is smaller then.
        pads_vocab: whether the logits have :func:`padded_vocab_size` columns. The additional
            columns are -inf, behind those of the symbols.
        num_durations: the last rows of the weight that are no symbols, but durations.
        product_dtype: dtype of the matrix products and of the logits; None for that of the joint.
        has_backward: whether backward is called, which needs memory for a gradient.
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
        num_durations: int = 0,
        product_dtype: torch.dtype | None = None,
        has_backward: bool = True,
    ) -> None:
        self.joint, self.batch = joint, batch
        weight, bias = weights
        dtype = product_dtype or joint.enc.dtype
        self._like = weight.new_empty(0, dtype=dtype)  # of the products
        self.vocab_size, self.width = weight.shape  # vocab_size: columns of the logits
        self._num_columns = self.vocab_size  # without padding
        self._num_durations = num_durations
        if pads_vocab:
            self.vocab_size = padded_vocab_size(weight.device, self._num_columns)
        narrows = product_dtype not in (None, weight.dtype)
        self._panels = self._sum_panels = _panels(
            self.vocab_size, self.width, self._like, NARROW_PANEL_BYTES if narrows else PANEL_BYTES
        )
        if dtype in native.SIXTEEN_BIT:
            # Adding 16-bit numbers to a float32 sum, torch makes a float32 copy of them.
            like = weight.new_empty(0, dtype=torch.float32)
            self._sum_panels = _panels(self.vocab_size, self.width, like, NARROW_PANEL_BYTES)
        # A copy of a large weight in another dtype would need memory for the whole step.
        self._casts_panels = narrows and len(self._panels) > 1
        self.weight = self._padded(weight, 0.0, weight.dtype if self._casts_panels else dtype)
        if narrows and not self._casts_panels:
            self.weight = _finite(self.weight)
        if bias is None and self.vocab_size > self._num_columns:
            bias = weight.new_zeros(self._num_columns)
        # -inf does not change the softmax.
        self.bias = None if bias is None else self._padded(bias, -torch.inf, dtype)
        # The hidden layer and its gradient are in the dtype of the join, if that is another one.
        self._joins_apart = dtype != joint.enc.dtype
        self._others: dict[str, Tensor] = {}  # buffers in other dtypes than the workspace
        self._widths = {"hidden": self.width, "logits": self.vocab_size}
        if has_backward:
            self._widths["grad_hidden"] = self.width
        if tile_cells is None:
            # The hidden layer and its gradient. Without the gradient a GPU's tile has more rows; on
            # the CPU, tiles of more rows took 2 % more time.
            num_hidden = 2 if has_backward or weight.device.type == "cpu" else 1
            num_numbers = num_hidden * self.width + self.vocab_size
            if self._joins_apart:
                joined = num_hidden * self.width * joint.enc.element_size()
                num_numbers += joined // self._like.element_size()
            tile_cells = automatic_tile_cells(self._like, num_numbers, beside_kept)
        self.tile_cells = tile_cells
        self._tile_rows = 0  # rows of the largest tile
        self._wanted: frozenset[str] = frozenset()
        self._workspace: Tensor | None = None
        self._sums: dict[str, Tensor] = {}  # sums of the gradients, by name
        self._dtypes = {"enc": joint.enc.dtype, "pred": joint.enc.dtype, "weight": weight.dtype}
        if bias is not None:
            self._dtypes["bias"] = bias.dtype

    def _padded(self, values: Tensor, padding: float, dtype: torch.dtype) -> Tensor:
        """Casts numbers of the columns of the logits, and adds those of the additional columns."""
        num_symbols = self._num_columns - self._num_durations
        first = self.vocab_size - self._num_durations  # duration
        if first == num_symbols:
            return values.to(dtype)
        wide = values.new_empty(self.vocab_size, *values.shape[1:], dtype=dtype)
        wide[:num_symbols].copy_(values[:num_symbols])
        wide[num_symbols:first].fill_(padding)
        if self._num_durations:
            wide[first:].copy_(values[num_symbols:])
        return wide

    def _without_padding(self, total: Tensor) -> Tensor:
        """Returns the sum (columns, ...) of a gradient without the padding of the vocabulary."""
        if total.size(0) == self._num_columns:
            return total
        num_symbols = self._num_columns - self._num_durations
        if self._num_durations == 0:
            return total[:num_symbols]
        return torch.cat([total[:num_symbols], total[-self._num_durations :]])

    def tiles(
        self,
        rows: Tensor | None = None,
        *,
        whole_logits: bool = False,
        places: Tensor | None = None,
    ) -> Iterator[RowTile]:
        """Yields tiles of all rows of the batch, or of `rows`. The arguments are as in RowTile."""
        total = self.batch.num_rows if rows is None else rows.numel()
        # Equal tiles, because a short last tile would take nearly as long as a full one.
        count = -(-total // self.tile_cells)
        self._tile_rows = -(-total // max(count, 1))
        self._workspace = None
        self._others = {}
        for index in range(count):
            begin, end = index * total // count, (index + 1) * total // count
            yield RowTile(begin, end - begin, rows, whole_logits=whole_logits, places=places)
        self._workspace = None  # the lattice, or other tiles, may take its memory
        self._others = {}

    def buffer(self, name: str, num_rows: int) -> Tensor:
        """Returns the memory (num_rows, width) of a buffer. All calls with a name share it."""
        if self._workspace is None:
            # One mapping, and not from the heap: fragmentation of the heap could double the peak.
            size = self._tile_rows * sum(self._widths.values())
            self._workspace = native.mapped(size, like=self._like)
        begin = 0
        for other, width in self._widths.items():
            if other == name:
                break
            begin += self._tile_rows * width
        return self._workspace[begin : begin + num_rows * width].view(num_rows, width)

    def hidden(self, tile: RowTile) -> Tensor:
        """Computes activation(enc_t + pred_u), (tile rows, D). The next tile overwrites it."""
        out = self.buffer("hidden", tile.size)
        if self._joins_apart:
            joined = self._joined("hidden", tile.size)
            stages.join_forward(self.joint, self.batch, tile, joined)
            return out.copy_(joined)
        stages.join_forward(self.joint, self.batch, tile, out)
        return out

    def _other_buffer(self, name: str, num_rows: int, max_rows: int, dtype: torch.dtype) -> Tensor:
        """Returns the memory (num_rows, D) of a buffer beside the workspace."""
        if name not in self._others:
            like = self._like.new_empty(0, dtype=dtype)
            self._others[name] = native.mapped(max_rows * self.width, like=like)
        return self._others[name].view(-1, self.width)[:num_rows]

    def _joined(self, name: str, num_rows: int) -> Tensor:
        """Returns the memory of the hidden layer or of its gradient in the dtype of the join."""
        return self._other_buffer(name, num_rows, self._tile_rows, self.joint.enc.dtype)

    def _weight(self, panel: slice) -> Tensor:
        """Returns rows of the weight in the dtype of the products."""
        weight = self.weight[panel]
        if not self._casts_panels:
            return weight
        rows = max(panel.stop - panel.start for panel in self._panels)
        out = self._other_buffer("weight", weight.size(0), rows, self._like.dtype)
        return _finite(out.copy_(weight))

    def _add_product(self, total: Tensor, left: Tensor, right: Tensor) -> None:
        """Adds the product of two 16-bit matrices to rows (at most a panel, D) of a float32 sum."""
        if left.device.type != "cpu":
            total += _mm_to_float32(left, right)
            return
        # torch would take memory for both from the heap.
        rows = max(panel.stop - panel.start for panel in self._sum_panels)
        product = self._other_buffer("product", left.size(0), rows, left.dtype)
        wide = self._other_buffer("sum", left.size(0), rows, total.dtype)
        total += wide.copy_(torch.mm(left, right, out=product))

    def logits(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        """Computes hidden @ weight.T + bias, (tile rows, V).

        Without `out`, the next tile overwrites the result.
        """
        if out is None:
            out = self.buffer("logits", hidden.size(0))
        for panel in self._panels:
            weight, columns = self._weight(panel).t(), out[:, panel]
            if self.bias is None:
                torch.mm(hidden, weight, out=columns)
            else:
                torch.addmm(self.bias[panel], hidden, weight, out=columns)
        return out

    def start_backward(self, wanted: frozenset[str], sums_of: JointTiles | None = None) -> None:
        """Allocates the sums of the wanted gradients, of "enc", "pred", "weight" and "bias".

        The sums are float32 or float64, because rounding a sum to 16 bits after each tile would
        lose small terms.

        Args:
            wanted: names of the gradients.
            sums_of: the tiles of the same joiner in another precision, whose sums are used
                instead.
        """
        if sums_of is not None:
            self._wanted, self._sums = wanted, sums_of._sums
            return
        dtype = native.compute_dtype(self.joint.enc.dtype)
        enc, pred = self.joint.enc, self.joint.pred
        self._wanted = wanted
        if wanted & {"enc", "pred"}:  # one stage computes both
            self._sums["enc"] = torch.empty_like(enc, dtype=dtype)
            self._sums["pred"] = torch.empty_like(pred, dtype=dtype)
        if "weight" in wanted:
            self._sums["weight"] = torch.empty_like(self.weight, dtype=dtype)
        if "bias" in wanted:
            self._sums["bias"] = self.weight.new_empty(self.vocab_size, dtype=dtype)
        if self._sums:
            torch._foreach_zero_(list(self._sums.values()))  # one launch on a GPU

    def backward(self, tile: RowTile, hidden: Tensor, grad_logits: Tensor) -> None:
        """Adds the gradients of a tile to the sums."""
        for panel in self._sum_panels:
            columns = grad_logits[:, panel]
            if "weight" in self._sums:
                grad_weight = self._sums["weight"][panel]
                if grad_weight.dtype == columns.dtype:
                    grad_weight.addmm_(columns.t(), hidden)
                else:
                    self._add_product(grad_weight, columns.t(), hidden)
            if "bias" in self._sums:
                grad_bias = self._sums["bias"][panel]
                grad_bias += columns.sum(0, dtype=grad_bias.dtype)
        if "enc" in self._sums:
            grad_hidden = self.buffer("grad_hidden", hidden.size(0))
            grads = self._sums["enc"], self._sums["pred"]
            if self._joins_apart:
                hidden = self._joined("hidden", hidden.size(0))
                total = self._joined("grad_hidden", hidden.size(0)).zero_()
                for panel in self._panels if self._casts_panels else [slice(None)]:
                    torch.mm(grad_logits[:, panel], self._weight(panel), out=grad_hidden)
                    total += grad_hidden
                grad_hidden = total
            else:
                torch.mm(grad_logits, self.weight, out=grad_hidden)
            stages.join_backward(self.joint, self.batch, tile, hidden, grad_hidden, grads)

    def gradients(self, scale: Tensor | None = None) -> dict[str, Tensor]:
        """Returns the wanted gradients in the dtypes of the inputs.

        Args:
            scale: a scalar tensor by which they are multiplied, or None.
        """
        grads = {}
        for name in self._wanted:
            total = self._sums[name]
            if name in ("weight", "bias"):
                total = self._without_padding(total)
            scaled = total if scale is None else total * scale
            grads[name] = scaled.to(self._dtypes[name])
        return grads
