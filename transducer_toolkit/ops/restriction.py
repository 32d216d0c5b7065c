# SPDX-License-Identifier: Apache-2.0
"""The cells that remain if each label may be emitted near its frame in an alignment only."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from transducer_toolkit.ops import checks, native
from transducer_toolkit.ops.lattice import Lengths
from transducer_toolkit.ops.options import LossOptions
from transducer_toolkit.ops.topology import Topology

# Frames are clamped to this magnitude, so that sums of them cannot overflow.
MOST_FRAMES = 2**40


class Restriction(NamedTuple):
    """An alignment and the frames that a label may be away from it, as :meth:`of` checks them.

    Attributes:
        alignment: (B, U) int32 or int64, the frame a_u of each label.
        left: frames that a label may be emitted before its frame.
        right: frames that a label may be emitted after its frame.
    """

    alignment: Tensor
    left: int
    right: int

    @classmethod
    def of(
        cls, alignment: Tensor | None, left: int, right: int, targets: Tensor
    ) -> Restriction | None:
        """Checks the arguments of a loss; returns None if there is no alignment.

        Args:
            alignment: argument of the loss.
            left: argument of the loss.
            right: argument of the loss.
            targets: (B, U), already checked.

        Raises:
            TypeError: the alignment is not a tensor of integers, or `left` or `right` is no int.
            ValueError: a shape or device does not fit, `left` or `right` is negative or given
                without an alignment, or torch.compile traces the loss.
            RuntimeError: the windows would be uploaded while a CUDA graph is being captured.
        """
        checks.check_at_least(0, left=left, right=right)
        if alignment is None:
            for name, value in (("left", left), ("right", right)):
                if value > 0:
                    raise ValueError(f"{name}: expected 0 without alignment, got {value}")
            return None
        checks.check_tensor(alignment, "alignment")
        checks.check_dtype(alignment, "alignment", checks.INDEX_DTYPES)
        if alignment.shape != targets.shape:
            raise ValueError(
                f"alignment: expected shape {tuple(targets.shape)}, that of targets, "
                f"got {tuple(alignment.shape)}"
            )
        if alignment.device not in (targets.device, torch.device("cpu")):
            raise ValueError(
                f"alignment: expected device cpu or {targets.device}, got {alignment.device}"
            )
        if torch.compiler.is_compiling():
            raise ValueError(
                "alignment: torch.compile(fullgraph=True) cannot read an alignment: call the loss "
                "outside of the compiled function"
            )
        if alignment.device != targets.device and native.is_capturing(targets.device):
            raise RuntimeError(
                f"alignment: expected device {targets.device} while a CUDA graph is being "
                "captured, got cpu: copy it before the capture"
            )
        frames = alignment.detach().to(torch.int64).clamp(-MOST_FRAMES, MOST_FRAMES)
        return cls(frames, min(left, MOST_FRAMES), min(right, MOST_FRAMES))

    def checked_windows(self, lengths: Lengths, options: LossOptions, num_frames: int) -> Tensor:
        """Returns :meth:`windows`, after :meth:`validate` if the options and devices allow it."""
        logit_lengths, target_lengths, index = lengths
        if checks.may_read(options.validate, self.alignment, logit_lengths, target_lengths):
            self.validate(logit_lengths, target_lengths, options.arcs)
        if index is not None and index.device == self.alignment.device:
            target_lengths = index[1]
        return self.windows(target_lengths, num_frames)

    def windows(self, target_lengths: Tensor, num_frames: int) -> Tensor:
        """Returns the cells of each frame.

        At frame t, the labels with ``a_u + right < t`` have been emitted, and those with
        ``a_u - left > t`` have not. A path of the regular topology that stays in these cells emits
        each label on an allowed frame, because both ends of a label arc are cells of its frame. In
        the other topologies, a label arc also needs the cell of its frame with one more label.

        Args:
            target_lengths: (B,).
            num_frames: T.

        Returns:
            (B, T, 2) int64 on the device of the alignment: the first number of emitted labels, and
            the one behind the last.

        Example:
            >>> restriction = Restriction(torch.tensor([[1, 2]]), 1, 0)
            >>> restriction.windows(torch.tensor([2]), num_frames=4).tolist()
            [[[0, 2], [0, 3], [1, 3], [2, 3]]]
        """
        device = self.alignment.device
        labels = torch.arange(self.alignment.size(1), device=device)
        is_padding = labels >= target_lengths.to(device)[:, None]
        alignment = self.alignment.masked_fill(is_padding, 4 * MOST_FRAMES)
        frames = torch.arange(num_frames, device=device).expand(alignment.size(0), -1).contiguous()
        begin = torch.searchsorted(alignment + self.right, frames)
        end = torch.searchsorted(alignment - self.left, frames, right=True) + 1
        return torch.stack([begin, end], 2)

    def validate(self, logit_lengths: Tensor, target_lengths: Tensor, topology: Topology) -> None:
        """Raises a ValueError that names the first utterance whose alignment leaves no path.

        Args:
            logit_lengths: (B,).
            target_lengths: (B,), each of which the topology can emit.
            topology: of the lattice.
        """
        alignment, num_frames = self.alignment.cpu(), logit_lengths.cpu()[:, None]
        labels = torch.arange(alignment.size(1))
        is_label = labels < target_lengths.cpu()[:, None]
        falls = torch.zeros_like(is_label)
        falls[:, 1:] = alignment[:, 1:] < alignment[:, :-1]
        self._raise_at(falls & is_label, "expected frames that do not decrease")
        # Each label as early as it can be, at least `step` frames behind the one before.
        step = topology.label_durations[0]
        last = alignment + self.right
        ends = num_frames - step - (0 if topology.ends_with_label else topology.blank_durations[0])
        earliest = (alignment - self.left).clamp(min=0) - step * labels
        earliest = earliest.cummax(1).values + step * labels if labels.numel() else earliest
        no_path = f"leaves no path in topology {topology.name!r} with left={self.left}"
        no_path += f", right={self.right}"
        self._raise_at((earliest > last.minimum(ends)) & is_label, no_path, num_frames)
        if topology.blank_durations[0] == 1:
            return
        first = (alignment - self.left).tolist()
        for b, size in enumerate(target_lengths.tolist()):
            windows = list(zip(first[b], last[b].tolist(), strict=True))[:size]
            if not topology.has_path(int(num_frames[b]), windows):
                bad = torch.zeros_like(is_label)
                bad[b] = True
                self._raise_at(bad, no_path, num_frames)

    def _raise_at(self, bad: Tensor, reason: str, num_frames: Tensor | None = None) -> None:
        if not bool(bad.any()):
            return
        b, u = (int(i) for i in bad.nonzero()[0])
        before = f" after {int(self.alignment[b, u - 1])}" if u > 0 else ""
        of = "" if num_frames is None else f" of {int(num_frames[b])} frames"
        raise ValueError(
            f"alignment[{b}, {u}] (utterance {b}{of}): {reason}, got {int(self.alignment[b, u])}"
            f"{before}"
        )
