# SPDX-License-Identifier: Apache-2.0
"""The shape of a batch's lattices, and the packed layout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from transducer_toolkit.ops import native
from transducer_toolkit.ops.checks import check_tensor


@dataclass(frozen=True, eq=False)
class LatticeShape:
    """Frames and symbols of every utterance of a batch, as integers on the CPU.

    Utterance b has ``T_b * (U_b + 1)`` lattice cells. A packed tensor holds the cells of all
    utterances one after the other, ``(num_cells, ...)``, each utterance in row-major order of
    (t, u): cell (t, u) of utterance b is row ``cell_offsets[b] + t * (U_b + 1) + u``.

    Build it once where the lengths are known on the CPU (in collate): whoever gets it never waits
    for a device to learn how large its output is. After :meth:`to` a device knows the lengths too,
    and a loss that gets the shape copies nothing to it.

    Example:
        >>> shape = LatticeShape.from_lengths([2, 3], [1, 0])
        >>> shape.num_cells, shape.cell_offsets.tolist()
        (7, [0, 4, 7])
        >>> shape.pack(torch.zeros(2, 3, 2, 5)).shape
        torch.Size([7, 5])
    """

    logit_lengths: Tensor  # (B,) int64, CPU: T_b, frames
    target_lengths: Tensor  # (B,) int64, CPU: U_b, symbols
    num_utterances: int = field(init=False)  # B
    max_frames: int = field(init=False)  # T
    max_targets: int = field(init=False)  # U
    num_frames: int = field(init=False)  # of all utterances
    num_cells: int = field(init=False)
    cell_offsets: Tensor = field(init=False)  # (B + 1,) int64, CPU
    _indices: dict[torch.device, Tensor] = field(init=False, repr=False)  # index() of each device

    def __post_init__(self) -> None:
        frames, targets = self.logit_lengths, self.target_lengths
        cells = frames * (targets + 1)
        offsets = torch.zeros(frames.numel() + 1, dtype=torch.int64)
        torch.cumsum(cells, 0, out=offsets[1:])
        derived = {
            "num_utterances": frames.numel(),
            "max_frames": int(frames.max()),
            "max_targets": int(targets.max()),
            "num_frames": int(frames.sum()),
            "num_cells": int(offsets[-1]),
            "cell_offsets": offsets,
            "_indices": {
                torch.device("cpu"): torch.stack(
                    [frames, targets, offsets[:-1], frames.cumsum(0) - frames]
                )
            },
        }
        for name, value in derived.items():
            object.__setattr__(self, name, value)

    @classmethod
    def from_lengths(
        cls, logit_lengths: Tensor | Sequence[int], target_lengths: Tensor | Sequence[int]
    ) -> LatticeShape:
        """Checks the lengths and builds the shape.

        Args:
            logit_lengths: (B,) frames of each utterance, at least 1. A tensor on a device is
                copied, which waits for that device.
            target_lengths: (B,) symbols of each utterance, at least 0.

        Raises:
            ValueError: lengths are empty, of different size, or out of range.
            TypeError: lengths are not integers.
        """
        frames = _lengths(logit_lengths, "logit_lengths", minimum=1)
        targets = _lengths(target_lengths, "target_lengths", minimum=0)
        if frames.numel() != targets.numel():
            raise ValueError(
                f"target_lengths: expected {frames.numel()} lengths, as many as logit_lengths, "
                f"got {targets.numel()}"
            )
        # In floating point first: a product of absurd lengths must not wrap round to a small one.
        if (frames.double() * (targets.double() + 1)).sum() >= 2**62:
            raise ValueError(
                f"logit_lengths, target_lengths: too large, up to {int(frames.max())} frames and "
                f"{int(targets.max())} symbols"
            )
        return cls(frames, targets)

    def to(self, *args: Any, **kwargs: Any) -> LatticeShape:
        """Itself, after one copy of the lengths to a device that has none yet.

        The copy comes from pinned memory, on the current stream of the device, and is not waited
        for. As with any tensor that is copied, another stream has to wait for that one before it
        uses the shape: ``other.wait_stream(current)``. The lengths also stay on the CPU, so that
        reading a size needs no synchronization.
        Needed before a CUDA graph is captured; keep the shape as long as the graph. Takes the
        arguments of ``Tensor.to``, so that a trainer moves a shape with its batch.

        Raises:
            RuntimeError: a CUDA graph is being captured.
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
        """Frames, symbols, first cell and first frame of each utterance, as the stages want them.

        Returns:
            (4, B) int64 on `device`, None if :meth:`to` was not called for it.
        """
        return self._indices.get(device)

    def __getstate__(self) -> dict[str, Any]:
        cpu = torch.device("cpu")
        return {**vars(self), "_indices": {cpu: self._indices[cpu]}}  # no device's memory

    @property
    def lengths(self) -> tuple[Tensor, Tensor]:
        """Logit lengths and target lengths, (B,) int64 on the CPU."""
        return self.logit_lengths, self.target_lengths

    def pack(self, padded: Tensor) -> Tensor:
        """Packs a padded tensor; differentiable.

        Args:
            padded: (B, T, U + 1, ...), T and U at least those of the shape.

        Returns:
            (num_cells, ...), same dtype and device.
        """
        expected = (self.num_utterances, self.max_frames, self.max_targets + 1)
        if (
            padded.dim() < 3
            or padded.size(0) != expected[0]
            or padded.size(1) < expected[1]
            or (padded.size(2) < expected[2])
        ):
            raise ValueError(
                f"padded: expected (B, T, U + 1, ...) of at least {expected}, "
                f"got {tuple(padded.shape)}"
            )
        return padded[self._mask(padded.size(1), padded.size(2), padded.device)]

    def unpack(self, packed: Tensor, fill: float = 0.0) -> Tensor:
        """The inverse of :meth:`pack`: (num_cells, ...) -> (B, T, U + 1, ...), padding = fill."""
        if packed.dim() < 1 or packed.size(0) != self.num_cells:
            raise ValueError(
                f"packed: expected {self.num_cells} rows, one for each cell, "
                f"got shape {tuple(packed.shape)}"
            )
        grid = (self.num_utterances, self.max_frames, self.max_targets + 1)
        mask = self._mask(grid[1], grid[2], packed.device)
        padded = packed.new_full((*grid, *packed.shape[1:]), fill)
        return padded.index_put((mask,), packed)

    def _mask(self, num_frames: int, num_columns: int, device: torch.device) -> Tensor:
        frames = torch.arange(num_frames) < self.logit_lengths[:, None]  # (B, T)
        columns = torch.arange(num_columns) <= self.target_lengths[:, None]  # (B, U + 1)
        return (frames[:, :, None] & columns[:, None, :]).to(device)


def check_shape(shape: object, num_utterances: int) -> None:
    """Raises unless `shape` is None or a LatticeShape of that many utterances."""
    if shape is None:
        return
    if not isinstance(shape, LatticeShape):
        raise TypeError(f"shape: expected a LatticeShape, got {type(shape).__name__}")
    if shape.num_utterances != num_utterances:
        raise ValueError(
            f"shape: expected {num_utterances} utterances, as many as targets, "
            f"got {shape.num_utterances}"
        )


def _lengths(lengths: Tensor | Sequence[int], name: str, *, minimum: int) -> Tensor:
    if isinstance(lengths, Tensor):
        check_tensor(lengths, name)
        if lengths.device.type == "meta":
            raise ValueError(f"{name}: expected numbers, got a tensor on device meta")
        tensor = lengths.detach().cpu()
    else:
        try:
            tensor = torch.as_tensor(lengths)
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(f"{name}: expected integers, got {lengths!r}") from error
    if tensor.dim() != 1 or tensor.numel() == 0:
        raise ValueError(f"{name}: expected a shape of (B,) with B >= 1, got {tuple(tensor.shape)}")
    if tensor.dtype.is_floating_point or tensor.dtype.is_complex or tensor.dtype == torch.bool:
        raise TypeError(f"{name}: expected integers, got {tensor.dtype}")
    tensor = tensor.to(torch.int64, copy=True)
    below = (tensor < minimum).nonzero()
    if below.numel():
        index = int(below[0])
        raise ValueError(f"{name}[{index}]: expected at least {minimum}, got {int(tensor[index])}")
    return tensor


def _index(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.detach().to(device=device, dtype=torch.int64).contiguous()


class Lengths(NamedTuple):
    """Frames and symbols of each utterance.

    Attributes:
        logit_lengths: (B,) integers, on the CPU or the device of the stage.
        target_lengths: (B,) integers, on the CPU or the device of the stage.
        shape_index: LatticeShape.index of these lengths on the device of the stage, if there is
            one; then nothing is copied from the CPU.
    """

    logit_lengths: Tensor
    target_lengths: Tensor
    shape_index: Tensor | None = None


class Band(NamedTuple):
    """The cells that exist: `width` of each frame.

    Attributes:
        start: (B, T) integers, the first symbol of each frame's cells.
        width: R.
    """

    start: Tensor
    width: int

    @classmethod
    def of(cls, ranges: Tensor | None) -> Band | None:
        """Returns the band of ranges (B, T, R), None for None."""
        return None if ranges is None else cls(ranges[:, :, 0], ranges.size(2))


class LatticeBatch:
    """Native view of a batch's lattices: which row of a logits-like tensor each cell is.

    Args:
        lengths: frames and symbols of each utterance.
        targets: (B, U) integers on the device of the stage; padding may hold anything.
        max_frames: T; no utterance has more frames.
        padded: rows laid out as (B, T, U + 1), or (B, T, R) with a band, instead of packed.
        num_rows: rows of the logits-like tensor; None computes them from lengths on the CPU.
        band: the cells that exist; None: all U + 1 of each frame.
        begins: (B, 2) integers, symbol and frame at which each lattice begins inside of the
            padded layout; lengths count from there. None: zeros.
        skip: (B,) bool on the device: utterances without cells. Their rows are padding.
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
    ) -> None:
        device = targets.device
        logit_lengths, target_lengths, index = lengths
        band_start, band_width = (None, 0) if band is None else band
        # Lengths on the CPU are worked on there: num_rows is known without waiting for a device.
        on_cpu = logit_lengths.device.type == target_lengths.device.type == "cpu"
        place = torch.device("cpu") if on_cpu and begins is None and index is None else device
        if index is None:
            num_frames, num_targets = (_index(x, place) for x in (logit_lengths, target_lengths))
        else:
            num_frames, num_targets, first_cell, frames_before = index.unbind()
        targets = _index(targets, device)
        num_utterances, max_targets = targets.shape
        # The stages read so many elements, whatever the caller forgot to check.
        for name, tensor, size in (
            ("logit_lengths", logit_lengths, (num_utterances,)),
            ("target_lengths", target_lengths, (num_utterances,)),
            ("band_start", band_start, (num_utterances, max_frames)),
            ("begins", begins, (num_utterances, 2)),
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
                # Clamped: lengths nobody validated must not make the rows of two overlap.
                columns = stride or (num_targets.clamp(-1, max_targets) + 1)
                ends = (num_frames.clamp(0, max_frames) * columns).cumsum(0)
                first_row = torch.cat([ends.new_zeros(1), ends[:-1]])
        first_frame = None
        if band_start is not None:
            band_start = _index(band_start, device)
        if begins is not None:
            first_symbol, first_frame = (_index(part, device) for part in begins.unbind(1))
            # What leaves the rows of its utterance gets a length that no stage accepts.
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
            num_frames = num_frames.masked_fill(skip, -1)  # an invalid length
        self.num_rows = num_rows
        self.num_utterances = num_utterances
        self.max_frames = max_frames
        self.max_targets = max_targets
        tensors = {
            "num_frames": num_frames,
            "num_targets": num_targets,
            "first_row": first_row,
            "targets": targets,
            "band_start": band_start,
            "first_frame": first_frame,
        }
        self._keep_alive = tensors
        self.native = native.extension.LatticeBatch(
            num_utterances=num_utterances,
            max_frames=max_frames,
            max_targets=max_targets,
            num_rows=num_rows,
            row_stride=stride,
            rows_per_utterance=rows_per_utterance,
            **{name: 0 if t is None else native.address(t) for name, t in tensors.items()},
        )

    def all_rows(self) -> RowTile:
        """The tile of all rows, padding included."""
        return RowTile(0, self.num_rows)


def _shift(rows: Tensor, begins: Tensor) -> Tensor:
    """Each row (B, N) moved left by its own number of places; the elements at the ends fill up."""
    places = torch.arange(rows.size(1), device=rows.device) + begins[:, None]
    return rows.gather(1, places.clamp(0, rows.size(1) - 1)) if rows.size(1) else rows


class RowTile:
    """Some rows of a batch, in ascending order: what one call of a stage works on.

    Args:
        begin: first row, or first element of `rows`.
        size: number of rows.
        rows: (N,) int64, ascending; None: begin, begin + 1, ...
        whole_logits: logits_grad reads the logits of all rows of the batch.
    """

    def __init__(
        self, begin: int, size: int, rows: Tensor | None = None, *, whole_logits: bool = False
    ) -> None:
        self.begin = begin
        self.size = size
        self.rows = rows  # kept alive for the stages, too
        address = 0 if rows is None else native.address(rows)
        self.native = native.extension.RowTile(
            rows=address, begin=begin, size=size, whole_logits=whole_logits
        )


@dataclass(frozen=True)
class CellScores:
    """Scores of every row of a batch: the output of stage 1 and the input of stage 2.

    Attributes:
        blank: (rows,) float64, log-probability of blank.
        label: (rows,) float64, log-probability of the next label.
        normalizer: (rows,) float64, logsumexp of the row's logits.
    """

    blank: Tensor
    label: Tensor
    normalizer: Tensor

    @classmethod
    def zeros(cls, batch: LatticeBatch, device: torch.device) -> CellScores:
        """Returns scores for stage 1 to write. It leaves padding alone, which stays zero."""
        return cls(
            *(
                torch.zeros(batch.num_rows, dtype=native.SCORE_DTYPE, device=device)
                for _ in range(3)
            )
        )
