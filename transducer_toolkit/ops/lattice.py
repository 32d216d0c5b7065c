# SPDX-License-Identifier: Apache-2.0
"""The lattices of a batch: their shapes, the packed layout, and their native views."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from transducer_toolkit.ops import native
from transducer_toolkit.ops.checks import check_tensor


@dataclass(frozen=True, eq=False)
class LatticeShape:
    """The numbers of frames and symbols of every utterance of a batch, on the CPU.

    Utterance b has ``T_b * (U_b + 1)`` lattice cells. A packed tensor ``(num_cells, ...)`` contains
    the cells of the utterances one after the other, each utterance in row-major order of (t, u).
    Cell (t, u) of utterance b is row ``cell_offsets[b] + t * (U_b + 1) + u``.

    Build the shape once, where the lengths are known on the CPU, for example in ``collate_fn``.
    Functions that take the shape can size their outputs without a device synchronization. After
    :meth:`to`, the lengths are also on the device, so a loss copies nothing.

    Attributes:
        logit_lengths: (B,) int64 on the CPU, the number of frames T_b of each utterance.
        target_lengths: (B,) int64 on the CPU, the number of symbols U_b of each utterance.
        num_utterances: B.
        max_frames: T, the largest T_b.
        max_targets: U, the largest U_b.
        num_frames: the sum of all T_b.
        num_cells: the number of cells of all lattices.
        cell_offsets: (B + 1,) int64 on the CPU, the first row of each utterance, and ``num_cells``.

    Example:
        >>> shape = LatticeShape.from_lengths([2, 3], [1, 0])
        >>> shape.num_cells, shape.cell_offsets.tolist()
        (7, [0, 4, 7])
        >>> shape.pack(torch.zeros(2, 3, 2, 5)).shape
        torch.Size([7, 5])
    """

    logit_lengths: Tensor
    target_lengths: Tensor
    num_utterances: int = field(init=False)
    max_frames: int = field(init=False)
    max_targets: int = field(init=False)
    num_frames: int = field(init=False)
    num_cells: int = field(init=False)
    cell_offsets: Tensor = field(init=False)
    _indices: dict[torch.device, Tensor] = field(init=False, repr=False)  # index() of each device

    def __post_init__(self) -> None:
        # In Python: two dozen operators of torch take several times as long for a few numbers.
        frames, targets = self.logit_lengths.tolist(), self.target_lengths.tolist()
        cells = (t * (u + 1) for t, u in zip(frames, targets, strict=True))
        offsets = list(itertools.accumulate(cells, initial=0))
        first_frames = list(itertools.accumulate(frames, initial=0))
        index = torch.tensor([frames, targets, offsets[:-1], first_frames[:-1]])
        derived = {
            "num_utterances": len(frames),
            "max_frames": max(frames),
            "max_targets": max(targets),
            "num_frames": first_frames[-1],
            "num_cells": offsets[-1],
            "cell_offsets": torch.tensor(offsets),
            "_indices": {torch.device("cpu"): index},
        }
        for name, value in derived.items():
            object.__setattr__(self, name, value)

    @classmethod
    def from_lengths(
        cls, logit_lengths: Tensor | Sequence[int], target_lengths: Tensor | Sequence[int]
    ) -> LatticeShape:
        """Checks the lengths and builds the shape.

        Args:
            logit_lengths: (B,) number of frames of each utterance, at least 1. A tensor on a device
                is copied to the CPU, which synchronizes with the device.
            target_lengths: (B,) number of symbols of each utterance, at least 0.

        Returns:
            The shape.

        Raises:
            TypeError: if the lengths are not integers.
            ValueError: if the lengths are empty, differ in number, or are out of range.
        """
        frames = _lengths(logit_lengths, "logit_lengths", minimum=1)
        targets = _lengths(target_lengths, "target_lengths", minimum=0)
        if frames.numel() != targets.numel():
            raise ValueError(
                f"target_lengths: expected {frames.numel()} lengths, B of logit_lengths, "
                f"got {targets.numel()}"
            )
        lengths = zip(frames.tolist(), targets.tolist(), strict=True)
        if sum(t * (u + 1) for t, u in lengths) >= 2**62:  # of Python's integers, without overflow
            raise ValueError(
                "logit_lengths, target_lengths: expected fewer than 2**62 cells, got up to "
                f"{int(frames.max())} frames and {int(targets.max())} symbols"
            )
        return cls(frames, targets)

    def to(self, *args: Any, **kwargs: Any) -> LatticeShape:
        """Copies the lengths to a device, unless it already has them; returns the shape itself.

        The copy is asynchronous, from pinned memory on the current stream of the device. Another
        stream must wait for this stream before it uses the shape: ``other.wait_stream(current)``.
        The lengths also stay on the CPU, so that reading a size needs no synchronization.

        Call this method before a CUDA graph is captured, and keep the shape as long as the graph.
        It takes the arguments of ``Tensor.to``, so that a trainer can move a shape with its batch.

        Raises:
            RuntimeError: if a CUDA graph is being captured and the device has no copy yet.
        """
        device = kwargs.get("device", args[0] if args else None)
        if isinstance(device, Tensor):
            device = device.device
        if isinstance(device, torch.dtype) or device is None:
            return self
        device = torch.device(device)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        if device not in self._indices:
            self._indices[device] = native.upload(self._indices[torch.device("cpu")], device)
        return self

    def index(self, device: torch.device) -> Tensor | None:
        """Returns the lengths and offsets of the utterances on a device, for the stages.

        Returns:
            (4, B) int64 on `device`: frames, symbols, first cell and first frame of each
            utterance. None if :meth:`to` was not called for the device.
        """
        return self._indices.get(device)

    def __getstate__(self) -> dict[str, Any]:
        cpu = torch.device("cpu")
        # A pickled shape must not refer to the memory of a device.
        return {**vars(self), "_indices": {cpu: self._indices[cpu]}}

    @property
    def lengths(self) -> tuple[Tensor, Tensor]:
        """Logit lengths and target lengths, (B,) int64 on the CPU."""
        return self.logit_lengths, self.target_lengths

    def pack(self, padded: Tensor) -> Tensor:
        """Packs a padded tensor. The operation is differentiable.

        Args:
            padded: (B, T, U + 1, ...), where T and U are at least ``max_frames`` and
                ``max_targets``.

        Returns:
            (num_cells, ...), same dtype and device.

        Raises:
            ValueError: if the shape of ``padded`` does not fit.
        """
        expected = (self.num_utterances, self.max_frames, self.max_targets + 1)
        if (
            padded.dim() < 3
            or padded.size(0) != expected[0]
            or padded.size(1) < expected[1]
            or (padded.size(2) < expected[2])
        ):
            raise ValueError(
                f"padded: expected shape (B, T, U + 1, ...), at least {expected}, "
                f"got {tuple(padded.shape)}"
            )
        return padded[self._mask(padded.size(1), padded.size(2), padded.device)]

    def unpack(self, packed: Tensor, fill: float = 0.0) -> Tensor:
        """Unpacks a packed tensor, the inverse of :meth:`pack`. The operation is differentiable.

        Args:
            packed: (num_cells, ...).
            fill: value of padding.

        Returns:
            (B, T, U + 1, ...), same dtype and device.

        Raises:
            ValueError: if the shape of ``packed`` does not fit.
        """
        if packed.dim() < 1 or packed.size(0) != self.num_cells:
            raise ValueError(
                f"packed: expected shape ({self.num_cells}, ...), one row for each cell, "
                f"got {tuple(packed.shape)}"
            )
        grid = (self.num_utterances, self.max_frames, self.max_targets + 1)
        mask = self._mask(grid[1], grid[2], packed.device)
        padded = packed.new_full((*grid, *packed.shape[1:]), fill)
        return padded.index_put((mask,), packed)

    def _mask(self, num_frames: int, num_columns: int, device: torch.device) -> Tensor:
        frames = torch.arange(num_frames) < self.logit_lengths[:, None]  # (B, T)
        columns = torch.arange(num_columns) <= self.target_lengths[:, None]  # (B, U + 1)
        return (frames[:, :, None] & columns[:, None, :]).to(device)


def check_shape(shape: object, logit_lengths: Tensor, target_lengths: Tensor) -> None:
    """Checks that `shape` is None or a LatticeShape of these lengths (B,).

    Lengths on a device are not read, because that would synchronize with the device. While
    torch.compile traces, no length is read.

    Raises:
        TypeError: if it is another object.
        ValueError: if it has another number of utterances, or other lengths.
    """
    if shape is None:
        return
    if not isinstance(shape, LatticeShape):
        raise TypeError(f"shape: expected a LatticeShape, got {type(shape).__name__}")
    num_utterances = logit_lengths.size(0)
    if shape.num_utterances != num_utterances:
        raise ValueError(
            f"shape: expected {num_utterances} utterances, B of targets, got {shape.num_utterances}"
        )
    if torch.compiler.is_compiling():
        return
    for name, given, own in (
        ("logit_lengths", logit_lengths, shape.logit_lengths),
        ("target_lengths", target_lengths, shape.target_lengths),
    ):
        if given is own or given.device.type != "cpu":
            continue
        different = (given != own).nonzero()
        if different.numel():
            b = int(different[0])
            raise ValueError(
                f"shape: expected the {name} of the call, got {int(own[b])} and not "
                f"{int(given[b])} for utterance {b}"
            )


def refuse_tracing(remedy: str) -> None:
    """Raises a ValueError while torch.compile traces: sizes must not come from lengths then.

    With ``fullgraph=False``, torch breaks the graph at the error and runs the call without it.

    Args:
        remedy: what to do, for the message.
    """
    if torch.compiler.is_compiling():
        raise ValueError(
            f"shape: torch.compile(fullgraph=True) cannot read tensors of lengths: {remedy}"
        )


def _lengths(lengths: Tensor | Sequence[int], name: str, *, minimum: int) -> Tensor:
    if isinstance(lengths, Tensor):
        # Here and not in the caller: of the calls behind a break, torch compiles each by itself.
        refuse_tracing("make the LatticeShape outside of the compiled function")
        check_tensor(lengths, name)
        if lengths.device.type == "meta":
            raise ValueError(f"{name}: expected a tensor with data, got one on device meta")
        tensor = lengths.detach().cpu()
    else:
        try:
            tensor = torch.as_tensor(lengths)
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(f"{name}: expected integers, got {lengths!r}") from error
    if tensor.dim() != 1 or tensor.numel() == 0:
        raise ValueError(f"{name}: expected shape (B,) with B >= 1, got {tuple(tensor.shape)}")
    if tensor.dtype.is_floating_point or tensor.dtype.is_complex or tensor.dtype == torch.bool:
        raise TypeError(f"{name}: expected integers, got {tensor.dtype}")
    tensor = tensor.to(torch.int64, copy=True)
    if int(tensor.min()) < minimum:
        index = int((tensor < minimum).nonzero()[0])
        raise ValueError(f"{name}[{index}]: expected at least {minimum}, got {int(tensor[index])}")
    return tensor


def _index(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.detach().to(device=device, dtype=torch.int64).contiguous()


class Lengths(NamedTuple):
    """The numbers of frames and symbols of each utterance.

    Attributes:
        logit_lengths: (B,) integers, on the CPU or the device of the stage.
        target_lengths: (B,) integers, on the CPU or the device of the stage.
        shape_index: :meth:`LatticeShape.index` of these lengths on the device of the stage, or
            None. With it, nothing is copied from the CPU.
    """

    logit_lengths: Tensor
    target_lengths: Tensor
    shape_index: Tensor | None = None


class Band(NamedTuple):
    """A band of the lattice: each frame has cells for `width` consecutive symbols only.

    Attributes:
        start: (B, T) integers, the first symbol of each frame.
        width: R.
    """

    start: Tensor
    width: int

    @classmethod
    def of(cls, ranges: Tensor | None) -> Band | None:
        """Returns the band of ranges (B, T, R), or None if ranges is None."""
        return None if ranges is None else cls(ranges[:, :, 0], ranges.size(2))


class LatticeBatch:
    """Native view of the lattices of a batch, which maps each cell to a row of the logits.

    Args:
        lengths: numbers of frames and symbols of each utterance.
        targets: (B, U) integers on the device of the stage. Padding may hold any value.
        max_frames: T, the largest number of frames of an utterance.
        padded: whether the rows have the layout (B, T, U + 1), or (B, T, R) with a band. Otherwise
            they are packed.
        num_rows: number of rows of the logits; None to compute it from lengths on the CPU.
        band: the cells that exist, or None if all U + 1 cells of each frame exist.
        begins: (B, 2) integers, the symbol and the frame at which each lattice begins in the padded
            layout. The lengths are counted from there. None for zeros.
        skip: (B,) bool on the device, the utterances that have no cells. Their rows are padding.
        windows: (B, T, 2) integers, the first symbol of each frame's cells and the one behind the
            last; not with `begins`. Rows do not move: those of the other cells are padding. A label
            arc out of (t, u) needs the cell (t, u + 1), also where it leads to another frame.

    Raises:
        ValueError: if a shape does not fit.
    """

    def __init__(
        self,
        lengths: Lengths,
        targets: Tensor,
        *,
        max_frames: int,
        padded: bool,
        num_rows: int | None = None,
        band: Band | None = None,
        begins: Tensor | None = None,
        skip: Tensor | None = None,
        windows: Tensor | None = None,
    ) -> None:
        device = targets.device
        logit_lengths, target_lengths, index = lengths
        band_start, band_width = (None, 0) if band is None else band
        # Keep lengths that are on the CPU there, so that num_rows is known without a
        # synchronization.
        on_cpu = logit_lengths.device.type == target_lengths.device.type == "cpu"
        place = torch.device("cpu") if on_cpu and begins is None and index is None else device
        if index is None:
            num_frames, num_targets = (_index(x, place) for x in (logit_lengths, target_lengths))
        else:
            num_frames, num_targets, first_cell, frames_before = index.unbind()
        targets = _index(targets, device)
        num_utterances, max_targets = targets.shape
        # The stages read this many elements, so a wrong shape would read out of bounds.
        for name, tensor, size in (
            ("logit_lengths", logit_lengths, (num_utterances,)),
            ("target_lengths", target_lengths, (num_utterances,)),
            ("band_start", band_start, (num_utterances, max_frames)),
            ("begins", begins, (num_utterances, 2)),
            ("windows", windows, (num_utterances, max_frames, 2)),
        ):
            if tensor is not None and tuple(tensor.shape) != size:
                raise ValueError(f"{name}: expected shape {size}, got {tuple(tensor.shape)}")
        if padded:
            stride = max_targets + 1 if band_start is None else band_width
            rows_per_utterance = max_frames * stride
            first_row = torch.arange(num_utterances, device=place) * rows_per_utterance
            total = num_utterances * rows_per_utterance
        else:
            stride = 0 if band_start is None else band_width
            rows_per_utterance = 0
            total = -1
            if index is not None:
                assert num_rows is not None
                first_row = frames_before * stride if stride else first_cell
            else:
                # Clamped, because unvalidated lengths could otherwise make the rows of two
                # utterances overlap.
                columns = stride or (num_targets.clamp(-1, max_targets) + 1)
                ends = (num_frames.clamp(0, max_frames) * columns).cumsum(0)
                first_row = torch.cat([ends.new_zeros(1), ends[:-1]])
        first_frame = None
        if band_start is not None:
            band_start = _index(band_start, device)
        if windows is not None:
            assert begins is None
            windows = _index(windows, device)
        if begins is not None:
            first_symbol, first_frame = (_index(part, device) for part in begins.unbind(1))
            # A lattice that leaves the rows of its utterance gets the invalid length -1, for which
            # the stages return NaN.
            is_inside = (first_symbol >= 0) & (first_symbol <= max_targets - num_targets)
            is_inside &= (first_frame >= 0) & (first_frame <= max_frames - num_frames)
            num_frames = torch.where(is_inside, num_frames, -1)
            targets = _shift(targets, first_symbol)
            first_row = first_row + first_frame * stride
            if band_start is None:
                first_row = first_row + first_symbol
            else:
                band_start = _shift(band_start, first_frame) - first_symbol[:, None]
        if num_rows is None:
            num_rows = int(ends[-1]) if total < 0 else total
        if place != device:
            together = torch.stack([num_frames, num_targets, first_row])
            num_frames, num_targets, first_row = native.upload(together, device).unbind()
        if skip is not None:
            num_frames = num_frames.masked_fill(skip, -1)  # an invalid length: no cells
        self.num_rows = num_rows
        self.num_utterances = num_utterances
        self.max_frames = max_frames
        self.max_targets = max_targets
        self._num_frames, self._num_targets, self._stride = num_frames, num_targets, stride
        tensors: dict[str, Tensor | None] = {
            "num_frames": num_frames,
            "num_targets": num_targets,
            "first_row": first_row,
            "targets": targets,
            "band_start": band_start,
            "windows": windows,
            "first_frame": first_frame,
        }
        self._set_native(rows_per_utterance, tensors)

    @classmethod
    def of_grid(cls, lattices: Tensor, max_frames: int, max_targets: int) -> LatticeBatch:
        """Returns the lattices in the padded layout (B, T, U + 1) for stage 2, without targets.

        Args:
            lattices: (4, B) int64 on the device of the stage, which AdditiveStages computes:
                frames, symbols, first row and first frame of each utterance.
            max_frames: T.
            max_targets: U.
        """
        batch = cls.__new__(cls)
        num_frames, num_targets, first_row, first_frame = lattices.unbind()
        batch.num_utterances, batch.max_frames, batch.max_targets = (
            lattices.size(1),
            max_frames,
            max_targets,
        )
        batch._num_frames, batch._num_targets, batch._stride = (
            num_frames,
            num_targets,
            max_targets + 1,
        )
        rows_per_utterance = max_frames * (max_targets + 1)
        batch.num_rows = batch.num_utterances * rows_per_utterance
        batch._set_native(
            rows_per_utterance,
            {
                "num_frames": num_frames,
                "num_targets": num_targets,
                "first_row": first_row,
                "targets": None,
                "band_start": None,
                "windows": None,
                "first_frame": first_frame,
            },
        )
        return batch

    def _set_native(self, rows_per_utterance: int, tensors: dict[str, Tensor | None]) -> None:
        self._keep_alive = tensors
        self.native = native.extension.LatticeBatch(
            num_utterances=self.num_utterances,
            max_frames=self.max_frames,
            max_targets=self.max_targets,
            num_rows=self.num_rows,
            row_stride=self._stride,
            rows_per_utterance=rows_per_utterance,
            **{name: 0 if t is None else native.address(t) for name, t in tensors.items()},
        )

    def all_rows(self) -> RowTile:
        """Returns the tile of all rows, including padding."""
        return RowTile(0, self.num_rows)

    def cell_rows(self, num_cells: int) -> Tensor:
        """Returns the rows that are cells of the windows, (num_cells,) int64, ascending.

        Of a band that contains every cell. Does not synchronize, unlike ``nonzero()``.

        Args:
            num_cells: their number.
        """
        windows, band_start = self._keep_alive["windows"], self._keep_alive["band_start"]
        first_row = self._keep_alive["first_row"]
        assert windows is not None and band_start is not None and first_row is not None
        begin, end = windows.unbind(2)
        frames = torch.arange(self.max_frames, device=windows.device)
        is_frame = frames < self._num_frames[:, None]
        sizes = (end - begin).clamp(min=0).masked_fill(~is_frame, 0).flatten()  # (B * T,)
        first = (first_row[:, None] + frames * self._stride + begin - band_start).flatten()
        shift = first - (sizes.cumsum(0) - sizes)
        places = torch.arange(num_cells, device=windows.device)
        return places + shift.repeat_interleave(sizes, output_size=num_cells)

    @property
    def path_lengths(self) -> Tensor:
        """T_b + U_b, (B,) int64."""
        return self._num_frames + self._num_targets

    @property
    def rows_of_utterances(self) -> Tensor:
        """(B,) int64, of the packed layout."""
        return self._num_frames * (self._stride or self._num_targets + 1)

    def per_row(self, values: Tensor) -> Tensor:
        """Returns values (B,) of utterances for each of their rows (rows,), in packed layout."""
        return values.repeat_interleave(self.rows_of_utterances, output_size=self.num_rows)

    def per_utterance(self, values: Tensor, reduction: str) -> Tensor:
        """Reduces values (rows,) in packed layout to (B,) in a fixed order, by "sum" or "max"."""
        # unsafe: without a wait for the sum of the lengths.
        return torch.segment_reduce(values, reduction, lengths=self.rows_of_utterances, unsafe=True)


def _shift(rows: Tensor, begins: Tensor) -> Tensor:
    """Returns rows (B, N), each shifted left by its own number of elements, with edge padding."""
    places = torch.arange(rows.size(1), device=rows.device) + begins[:, None]
    return rows.gather(1, places.clamp(0, rows.size(1) - 1)) if rows.size(1) else rows


class RowTile:
    """The rows of a batch that one call of a stage processes, in ascending order.

    Args:
        begin: the first row; with `rows`, the index of the first element of `rows`.
        size: number of rows.
        rows: (N,) int64, ascending; None for the rows begin, begin + 1, ...
        whole_logits: whether the logits passed to logits_grad contain all rows of the batch, and
            not only those of the tile.
        places: (num_rows,) int64, the row of the logits passed to logits_grad for each row of the
            batch. Only those of the tile are read. None: as `whole_logits` says.
    """

    def __init__(
        self,
        begin: int,
        size: int,
        rows: Tensor | None = None,
        *,
        whole_logits: bool = False,
        places: Tensor | None = None,
    ) -> None:
        self.begin = begin
        self.size = size
        self.rows = rows
        self._keep_alive = rows, places  # the stages use their addresses
        self.native = native.extension.RowTile(
            rows=0 if rows is None else native.address(rows),
            begin=begin,
            size=size,
            whole_logits=whole_logits,
            places=0 if places is None else native.address(places),
        )


@dataclass(frozen=True)
class CellScores:
    """Scores of every row of a batch, the output of stage 1 and the input of stage 2.

    Attributes:
        blank: (rows,) float64, log-probability of blank.
        label: (rows,) float64, log-probability of the next label.
        normalizer: (rows,) float64, logsumexp of the row's logits.
        extra: (rows, K) float64, log-probabilities of K durations or of K big blanks; None for
            other topologies.
    """

    blank: Tensor
    label: Tensor
    normalizer: Tensor
    extra: Tensor | None = None

    @classmethod
    def zeros(cls, batch: LatticeBatch, device: torch.device, num_extra: int = 0) -> CellScores:
        """Returns zeros, into which stage 1 writes. Stage 1 does not write padding."""
        like = torch.empty(0, dtype=native.SCORE_DTYPE, device=device)
        size = batch.num_rows
        blank, label, normalizer, *extra = native.zeros(
            size, size, size, *([size * num_extra] if num_extra else []), like=like
        )
        return cls(blank, label, normalizer, extra[0].view(size, num_extra) if extra else None)
