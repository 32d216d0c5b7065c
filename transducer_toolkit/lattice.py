# SPDX-License-Identifier: Apache-2.0
"""The shape of a batch's lattices, and the packed layout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from transducer_toolkit import native
from transducer_toolkit.arguments import check_tensor


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
        uses the shape: ``other.wait_stream(current)``. The lengths stay on the CPU as well, so that
        nobody waits for a device to know a size.
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
