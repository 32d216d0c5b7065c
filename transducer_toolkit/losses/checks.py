# SPDX-License-Identifier: Apache-2.0
"""Checks of arguments shared by the losses: a name, what was expected, what came.

Shape checks look at sizes only. Value checks read the tensors, so they run where the values are on
the CPU already (or where the caller asked for them).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.autograd import forward_ad

from transducer_toolkit import native
from transducer_toolkit.arguments import check_flag, check_int, check_number, check_tensor
from transducer_toolkit.lattice import LatticeShape

INDEX_DTYPES = (torch.int32, torch.int64)


def may_read(validate: bool | None, *tensors: Tensor | None) -> bool:
    """Whether to look at values: `validate`, or, where it is None, if all are on the CPU."""
    if validate is not None:
        return validate
    return all(tensor is None or tensor.device.type == "cpu" for tensor in tensors)


def refuse_forward_mode(*tensors: Tensor | None) -> None:
    """Raises a RuntimeError if one carries a tangent: the operators would give zero derivatives."""
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return
    for tensor in tensors:
        if tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None:
            raise RuntimeError(
                "the losses have no forward-mode derivative (torch.func.jvp, forward_ad): use "
                "backward, or torch.func.vjp"
            )


def check_dtype(tensor: Tensor, name: str, dtypes: tuple[torch.dtype, ...]) -> None:
    """Raises a TypeError unless the dtype is one of `dtypes`."""
    if tensor.dtype not in dtypes:
        expected = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{name}: expected dtype {expected}, got {tensor.dtype}")


def check_dropped_mass(dropped_mass: float) -> None:
    """Raises a ValueError unless 0 <= dropped_mass < 1."""
    check_number(dropped_mass, "dropped_mass")
    if not 0 <= dropped_mass < 1:
        raise ValueError(f"dropped_mass: expected 0 <= dropped_mass < 1, got {dropped_mass}")


def check_choice(value: str, name: str, choices: tuple[str, ...]) -> None:
    """Raises a ValueError unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name}: expected one of {choices}, got {value!r}")


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


def check_joint(enc: Tensor, pred: Tensor) -> None:
    """Types, dtypes, devices and sizes of what a joiner adds: (B, T, D) and (B, U + 1, D)."""
    for name, tensor in (("enc", enc), ("pred", pred)):
        check_tensor(tensor, name)
        check_dtype(tensor, name, native.SUPPORTED_DTYPES)
        if tensor.dim() != 3:
            raise ValueError(f"{name}: expected shape (B, length, D), got {tuple(tensor.shape)}")
    if pred.dtype != enc.dtype:
        raise TypeError(f"pred: expected dtype {enc.dtype}, that of enc, got {pred.dtype}")
    if pred.device != enc.device:
        raise ValueError(f"pred: expected device {enc.device}, that of enc, got {pred.device}")
    if (pred.size(0), pred.size(2)) != (enc.size(0), enc.size(2)):
        raise ValueError(
            f"pred: expected shape ({enc.size(0)}, U + 1, {enc.size(2)}), B and D from enc, "
            f"got {tuple(pred.shape)}"
        )


def check_ranges(
    ranges: Tensor | None, num_utterances: int, num_frames: int, device: torch.device
) -> None:
    """Type, dtype, size and device of ranges (B, T, R); None passes."""
    if ranges is None:
        return
    check_tensor(ranges, "ranges")
    check_dtype(ranges, "ranges", INDEX_DTYPES)
    expected = num_utterances, num_frames
    if ranges.dim() != 3 or tuple(ranges.shape[:2]) != expected or ranges.size(2) == 0:
        raise ValueError(
            f"ranges: expected shape ({num_utterances}, {num_frames}, R), R >= 1, "
            f"got {tuple(ranges.shape)}"
        )
    if ranges.device != device:
        raise ValueError(
            f"ranges: expected device {device}, that of the logits or enc, got {ranges.device}"
        )


def check_targets_and_lengths(
    targets: Tensor, logit_lengths: Tensor, target_lengths: Tensor, device: torch.device
) -> None:
    """Types, ranks, sizes and devices of the three index tensors.

    Raises:
        TypeError: not a tensor, or not int32 / int64.
        ValueError: wrong rank or size, B = 0, or on a device that is neither `device` nor, for
            lengths, the CPU.
    """
    for name, tensor in (
        ("targets", targets),
        ("logit_lengths", logit_lengths),
        ("target_lengths", target_lengths),
    ):
        check_tensor(tensor, name)
        check_dtype(tensor, name, INDEX_DTYPES)
    if targets.dim() != 2:
        raise ValueError(f"targets: expected shape (B, U), got {tuple(targets.shape)}")
    if targets.size(0) == 0:
        raise ValueError("targets: expected at least one utterance, got B = 0")
    for name, tensor in (("logit_lengths", logit_lengths), ("target_lengths", target_lengths)):
        if tuple(tensor.shape) != (targets.size(0),):
            raise ValueError(
                f"{name}: expected shape ({targets.size(0)},), the batch size of targets, "
                f"got {tuple(tensor.shape)}"
            )
        if tensor.device not in (device, torch.device("cpu")):
            raise ValueError(f"{name}: expected device {device} or cpu, got {tensor.device}")
    if targets.device != device:
        raise ValueError(f"targets: expected device {device}, that of logits, got {targets.device}")


def check_blank(blank: int, vocab_size: int, name: str = "blank") -> None:
    """Raises a TypeError unless blank is an int, a ValueError unless 0 <= blank < V."""
    check_int(blank, name)
    if not 0 <= blank < vocab_size:
        raise ValueError(f"{name}: expected 0 <= {name} < {vocab_size} (V of logits), got {blank}")


def check_lengths_fit(
    logit_lengths: Tensor, target_lengths: Tensor, *, max_frames: int, max_targets: int
) -> None:
    """Raises a ValueError naming the first utterance whose lengths are impossible.

    Args:
        logit_lengths: (B,) must be in [1, max_frames], T of padded or rows of packed logits.
        target_lengths: (B,) must be in [0, max_targets], the width of targets.
    """
    frames, symbols = logit_lengths.tolist(), target_lengths.tolist()
    for b, (num_frames, num_targets) in enumerate(zip(frames, symbols, strict=True)):
        if not 1 <= num_frames <= max_frames:
            raise ValueError(
                f"logit_lengths[{b}]: expected 1 to {max_frames} (what logits have room for), "
                f"got {num_frames}"
            )
        if not 0 <= num_targets <= max_targets:
            raise ValueError(
                f"target_lengths[{b}]: expected 0 to {max_targets} (width of targets), "
                f"got {num_targets}"
            )


def check_packed_rows(logit_lengths: Tensor, target_lengths: Tensor, num_rows: int) -> None:
    """Raises a ValueError unless packed logits have one row for each lattice cell."""
    cells = int((logit_lengths.long() * (target_lengths.long() + 1)).sum())
    if cells != num_rows:
        raise ValueError(
            f"logits: expected {cells} rows, sum of logit_lengths * (target_lengths + 1), for the "
            f"packed layout, got {num_rows}"
        )


def check_labels(
    targets: Tensor,
    target_lengths: Tensor,
    *,
    blank: int | None,
    vocab_size: int,
    first: Tensor | None = None,
    name: str = "targets",
) -> None:
    """Raises a ValueError naming the first label outside [0, V) or, unless None, equal to blank.

    The labels of an utterance are `target_lengths` (B,) many from place `first` (B,) on, or from 0.
    """
    places = torch.arange(targets.size(1), device=targets.device)
    if first is not None:
        places = places - first.to(targets.device)[:, None]
    real = (places >= 0) & (places < target_lengths.to(targets.device)[:, None])  # (B, U)
    bad = (targets < 0) | (targets >= vocab_size)
    if blank is not None:
        bad |= targets == blank
    bad &= real
    if bool(bad.any()):
        b, u = (int(i) for i in bad.nonzero()[0])
        label = int(targets[b, u])
        reason = (
            f"a label other than blank ({blank})"
            if label == blank
            else f"a label in [0, {vocab_size})"
        )
        raise ValueError(f"{name}[{b}, {u}] (utterance {b}): expected {reason}, got {label}")


def check_boundary_values(
    begins: Tensor,
    logit_lengths: Tensor,
    target_lengths: Tensor,
    *,
    max_frames: int,
    max_targets: int,
) -> None:
    """Raises a ValueError naming the first utterance whose boundary is impossible.

    Args:
        begins: (B, 2) s_begin, t_begin.
        logit_lengths: (B,) t_end - t_begin.
        target_lengths: (B,) s_end - s_begin.
        max_frames: T.
        max_targets: S.
    """
    lengths = zip(begins.tolist(), logit_lengths.tolist(), target_lengths.tolist(), strict=True)
    for b, ((s_begin, t_begin), num_frames, num_targets) in enumerate(lengths):
        s_end, t_end = s_begin + num_targets, t_begin + num_frames
        if not (0 <= s_begin <= s_end <= max_targets and 0 <= t_begin < t_end <= max_frames):
            raise ValueError(
                f"boundary[{b}]: expected 0 <= s_begin <= s_end <= {max_targets} and "
                f"0 <= t_begin < t_end <= {max_frames}, "
                f"got [{s_begin}, {t_begin}, {s_end}, {t_end}]"
            )


def check_ranges_values(
    ranges: Tensor, logit_lengths: Tensor, max_targets: int, first: Tensor | None = None
) -> None:
    """Raises a ValueError naming the first frame whose window is not one.

    Args:
        ranges: (B, T, R), R consecutive symbols for each frame, all in [0, max_targets].
        logit_lengths: (B,) how many frames to look at.
        max_targets: U.
        first: (B,) the first of them, or 0.
    """
    width = ranges.size(2)
    frames = torch.arange(ranges.size(1)) - (0 if first is None else first.cpu()[:, None])
    real = (frames >= 0) & (frames < logit_lengths.cpu()[:, None])
    start = ranges[:, :, :1].cpu()
    is_run = (ranges.cpu() == start + torch.arange(width)).all(2)
    fits = (start[:, :, 0] >= 0) & (start[:, :, 0] <= max_targets + 1 - width)
    bad = ~(is_run & fits) & real
    if bool(bad.any()):
        b, t = (int(i) for i in bad.nonzero()[0])
        raise ValueError(
            f"ranges[{b}, {t}] (utterance {b}): expected {width} consecutive symbols within "
            f"0 ... {max_targets}, got {ranges[b, t].tolist()}"
        )


def check_feasible(logit_lengths: Tensor, target_lengths: Tensor, topology: str) -> None:
    """Raises a ValueError naming the first utterance that no path of `topology` can explain.

    ``regular`` fits any number of symbols into one frame; ``modified`` and ``constrained`` need
    T >= U, ``one_sym_per_frame`` needs T > U.
    """
    if topology == "regular":
        return
    extra = 1 if topology == "one_sym_per_frame" else 0
    frames, symbols = logit_lengths.tolist(), target_lengths.tolist()
    for b, (num_frames, num_targets) in enumerate(zip(frames, symbols, strict=True)):
        if num_frames < num_targets + extra:
            relation = "more frames than symbols" if extra else "at least as many frames as symbols"
            raise ValueError(
                f"utterance {b}: {topology} needs {relation}, "
                f"got {num_frames} frames and {num_targets} symbols"
            )


def check_validate(validate: bool | None) -> None:
    """Raises a TypeError unless `validate` is a bool or None."""
    if validate is not None:
        check_flag(validate, "validate")


def check_options(fastemit_lambda: float, delay_penalty: float, clamp: float = 0.0) -> None:
    """Raises a ValueError for a negative or non-finite weight, or a clamp that is NaN.

    Or a TypeError for what is no number.
    """
    for name, value in (("fastemit_lambda", fastemit_lambda), ("delay_penalty", delay_penalty)):
        check_number(value, name)
        if not 0 <= value < math.inf:
            raise ValueError(f"{name}: expected a finite number >= 0, got {value}")
    check_number(clamp, "clamp")
    if clamp != clamp:  # NaN; torch.compile traces this, but not math.isnan
        raise ValueError("clamp: expected a number, got nan")
