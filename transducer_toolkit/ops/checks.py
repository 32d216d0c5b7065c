# SPDX-License-Identifier: Apache-2.0
"""Checks of arguments, whose errors have the form "name: expected X, got Y".

Shape checks read sizes only. Value checks read the elements of tensors. To avoid synchronization,
the losses run them only for tensors on the CPU, or if ``validate=True`` requests them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

from transducer_toolkit.ops import native
from transducer_toolkit.ops.topology import TOPOLOGIES, Topology

INDEX_DTYPES = (torch.int32, torch.int64)
REDUCTIONS = ("none", "mean", "sum")


def check_tensor(value: object, name: str) -> None:
    """Raises a TypeError unless `value` is a dense tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")
    if value.is_nested or value.layout != torch.strided:
        kind = "a nested tensor" if value.is_nested else f"layout {value.layout}"
        raise TypeError(f"{name}: expected a dense torch.Tensor (torch.strided), got {kind}")


def check_int(value: object, name: str) -> None:
    """Raises a TypeError unless `value` is an int. A bool is not accepted."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}")


def check_at_least(minimum: int, **values: object) -> None:
    """Raises a TypeError or ValueError unless each of `values` is an int of at least `minimum`."""
    for name, value in values.items():
        check_int(value, name)
        if value < minimum:  # type: ignore[operator]
            raise ValueError(f"{name}: expected at least {minimum}, got {value}")


def check_probability(value: object, name: str) -> None:
    """Raises a TypeError or ValueError unless `value` is a number in [0, 1]."""
    check_number(value, name)
    if not 0 <= value <= 1:  # type: ignore[operator]
        raise ValueError(f"{name}: expected a number in [0, 1], got {value}")


def check_number(value: object, name: str) -> None:
    """Raises a TypeError unless `value` is a real number or a 0-dimensional tensor."""
    if not (isinstance(value, (int, float)) or hasattr(value, "__float__")):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")


def one_line(error: BaseException) -> str:
    """Returns the message of another library's error as one line of at most 400 characters."""
    text, _, _ = str(error).partition("Exception raised from")  # torch's trace of C++
    text = " ".join(text.split())
    return shortened(text if isinstance(error, ValueError) else f"{type(error).__name__}: {text}")


def shortened(text: str) -> str:
    """Returns the first 400 characters of a text: a hostile file holds values of any length."""
    return text if len(text) <= 400 else text[:397] + "..."


def check_flag(value: object, name: str) -> None:
    """Raises a TypeError unless `value` is a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected a bool, got {type(value).__name__}")


def check_reduction(reduction: str) -> None:
    """Raises a ValueError unless `reduction` is one of REDUCTIONS."""
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction: expected one of {REDUCTIONS}, got {reduction!r}")


def reduce_losses(losses: Tensor, reduction: str) -> Tensor:
    """Reduces losses (B,): "none" returns them, "mean" and "sum" return a scalar."""
    if reduction == "none":
        return losses
    return losses.mean() if reduction == "mean" else losses.sum()


def may_read(validate: bool | None, *tensors: Tensor | None) -> bool:
    """Returns `validate`, or for None whether all tensors are on the CPU."""
    if validate is not None:
        return validate
    return all(tensor is None or tensor.device.type == "cpu" for tensor in tensors)


def refuse_forward_mode(*tensors: Tensor | None) -> None:
    """Raises a RuntimeError if a tensor has a forward-mode tangent.

    The operators have no forward-mode derivative, and torch would silently use zero.
    """
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return
    for tensor in tensors:
        if tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None:
            raise RuntimeError(
                "the losses do not support forward-mode derivatives (torch.func.jvp, forward_ad): "
                "use backward or torch.func.vjp"
            )


def check_dtype(tensor: Tensor, name: str, dtypes: tuple[torch.dtype, ...]) -> None:
    """Raises a TypeError unless the dtype is one of `dtypes`."""
    if tensor.dtype not in dtypes:
        expected = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{name}: expected dtype {expected}, got {tensor.dtype}")


def check_choice(value: str, name: str, choices: tuple[str, ...]) -> None:
    """Raises a ValueError unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name}: expected one of {choices}, got {value!r}")


def check_joint(enc: Tensor, pred: Tensor) -> None:
    """Checks types, dtypes, devices and shapes of the inputs of a joiner.

    Args:
        enc: expected to be (B, T, D).
        pred: expected to be (B, U + 1, D).

    Raises:
        TypeError: if one of them is not a tensor, or the dtypes do not fit.
        ValueError: if the shapes or the devices do not match.
    """
    for name, tensor, length in (("enc", enc, "T"), ("pred", pred, "U + 1")):
        check_tensor(tensor, name)
        check_dtype(tensor, name, native.SUPPORTED_DTYPES)
        if tensor.dim() != 3:
            raise ValueError(f"{name}: expected shape (B, {length}, D), got {tuple(tensor.shape)}")
    if pred.dtype != enc.dtype:
        raise TypeError(
            f"pred: expected dtype {enc.dtype}, that of enc, got {pred.dtype}; cast one of them, "
            "or call the function under torch.autocast"
        )
    if pred.device != enc.device:
        raise ValueError(f"pred: expected device {enc.device}, that of enc, got {pred.device}")
    if (pred.size(0), pred.size(2)) != (enc.size(0), enc.size(2)):
        raise ValueError(
            f"pred: expected shape ({enc.size(0)}, U + 1, {enc.size(2)}), B and D from enc, "
            f"got {tuple(pred.shape)}"
        )


def check_output_layer(weight: Tensor, bias: Tensor | None, enc: Tensor) -> None:
    """Checks types, devices and shapes of the output layer of a joiner; dtypes only for kind.

    Args:
        weight: expected to be (V, D) of a floating dtype.
        bias: expected to be (V,) of a floating dtype, or None.
        enc: (B, T, D), which has passed its own checks.

    Raises:
        TypeError: if one of them is not a whole, dense tensor of a floating dtype.
        ValueError: if the shapes or the devices do not match.
    """
    parameters = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
    for name, tensor in parameters.items():
        check_tensor(tensor, name)
        # torch 2.4 cannot trace hasattr.
        if not torch.compiler.is_compiling() and hasattr(tensor, "placements"):
            raise TypeError(
                f"{name}: expected a whole tensor, got a sharded one (DTensor): compute inside of "
                f"the module that owns it, where FSDP has gathered it, or pass {name}.full_tensor()"
            )
        if not tensor.is_floating_point():
            raise TypeError(f"{name}: expected a floating dtype, got {tensor.dtype}")
        if tensor.device != enc.device:
            raise ValueError(
                f"{name}: expected device {enc.device}, that of enc, got {tensor.device}"
            )
    if weight.dim() != 2 or weight.size(1) != enc.size(2):
        raise ValueError(
            f"weight: expected shape (V, {enc.size(2)}), D from enc, got {tuple(weight.shape)}"
        )
    if bias is not None and tuple(bias.shape) != (weight.size(0),):
        raise ValueError(
            f"bias: expected shape ({weight.size(0)},), V from weight, got {tuple(bias.shape)}"
        )


def check_ranges(
    ranges: Tensor | None, num_utterances: int, num_frames: int, device: torch.device
) -> None:
    """Raises a TypeError or ValueError unless ranges is None or (B, T, R) integers on `device`."""
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
    """Checks types, shapes and devices of targets (B, U) and lengths (B,).

    Raises:
        TypeError: if one of them is not an int32 or int64 tensor.
        ValueError: if a shape does not fit or B is 0, or if a tensor is not on `device`. Lengths
            may also be on the CPU.
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
        raise ValueError("targets: expected at least 1 utterance, got B = 0")
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
    """Raises a TypeError unless blank is an int, and a ValueError unless 0 <= blank < V."""
    check_int(blank, name)
    if not 0 <= blank < vocab_size:
        last = f"; the last symbol is {vocab_size - 1}" if blank == -1 else ""
        raise ValueError(f"{name}: expected 0 <= {name} < {vocab_size} (V), got {blank}{last}")


def check_big_blanks(num_big_blanks: int, vocab_size: int) -> None:
    """Raises a ValueError unless there are fewer big blanks than symbols beside blank."""
    if num_big_blanks >= vocab_size:
        raise ValueError(f"big blanks: expected fewer than {vocab_size} (V), got {num_big_blanks}")


def check_labels_of_hat(is_hat: bool, vocab_size: int) -> None:
    """Raises a ValueError if labels have a softmax of their own, and there is none."""
    if is_hat and vocab_size < 2:
        raise ValueError(
            "normalization: expected at least one label beside blank for 'hat', got "
            f"V = {vocab_size}"
        )


def check_lengths_fit(
    logit_lengths: Tensor,
    target_lengths: Tensor,
    *,
    max_frames: int,
    max_targets: int,
    frames_of: str = "logits",
) -> None:
    """Raises a ValueError that names the first utterance whose lengths are out of range.

    Args:
        logit_lengths: (B,), expected to be in [1, max_frames].
        target_lengths: (B,), expected to be in [0, max_targets].
        max_frames: T of padded logits or of enc, or the number of rows of packed logits.
        max_targets: U, the width of targets.
        frames_of: the argument that has these frames, for the message.
    """
    frames, symbols = logit_lengths.tolist(), target_lengths.tolist()
    for b, (num_frames, num_targets) in enumerate(zip(frames, symbols, strict=True)):
        if not 1 <= num_frames <= max_frames:
            raise ValueError(
                f"logit_lengths[{b}]: expected 1 to {max_frames} (the frames of {frames_of}), "
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
    num_big_blanks: int = 0,
    first: Tensor | None = None,
    name: str = "targets",
) -> None:
    """Raises a ValueError that names the first label which is not in [0, V), or is a blank.

    Args:
        targets: (B, U).
        target_lengths: (B,) number of labels of each utterance.
        blank: id of blank, or None if labels may be blank.
        vocab_size: V.
        num_big_blanks: the symbols before blank that are blanks, too; behind 0 comes V - 1.
        first: (B,) index of the first label of each utterance in its row; None for 0.
        name: name of `targets` in the message.
    """
    places = torch.arange(targets.size(1), device=targets.device)
    if first is not None:
        places = places - first.to(targets.device)[:, None]
    real = (places >= 0) & (places < target_lengths.to(targets.device)[:, None])  # (B, U)
    bad = (targets < 0) | (targets >= vocab_size)
    if blank is not None:
        bad |= (blank - targets) % vocab_size <= num_big_blanks
    bad &= real
    if bool(bad.any()):
        b, u = (int(i) for i in bad.nonzero()[0])
        label = int(targets[b, u])
        reason = f"a label in [0, {vocab_size})"
        if blank is not None and 0 <= label < vocab_size:
            reason = f"a label other than blank ({blank})"
            if num_big_blanks:
                reason += f" and the {num_big_blanks} big blanks before it"
        raise ValueError(f"{name}[{b}, {u}] (utterance {b}): expected {reason}, got {label}")


def check_boundary(boundary: object, num_utterances: int, device: torch.device) -> None:
    """Checks the type, the shape and the device of a boundary. None is accepted.

    Raises:
        TypeError: if it is neither None nor an int32 or int64 tensor.
        ValueError: if its shape is not (B, 4), or its device is neither `device` nor the CPU.
    """
    if boundary is None:
        return
    check_tensor(boundary, "boundary")
    assert isinstance(boundary, Tensor)
    check_dtype(boundary, "boundary", INDEX_DTYPES)
    if tuple(boundary.shape) != (num_utterances, 4):
        raise ValueError(
            f"boundary: expected shape ({num_utterances}, 4), rows [s_begin, t_begin, s_end, "
            f"t_end], got {tuple(boundary.shape)}"
        )
    if boundary.device not in (device, torch.device("cpu")):
        raise ValueError(f"boundary: expected device {device} or cpu, got {boundary.device}")


def check_boundary_values(
    boundary: Tensor, *, max_targets: int, max_frames: int, min_frames: int
) -> None:
    """Raises a ValueError that names the first utterance whose boundary is out of range.

    Args:
        boundary: (B, 4).
        max_targets: S, the largest s_end allowed.
        max_frames: T, the largest t_end allowed.
        min_frames: the smallest number of frames allowed.
    """
    for b, (s_begin, t_begin, s_end, t_end) in enumerate(boundary.tolist()):
        if not 0 <= s_begin <= s_end <= max_targets:
            raise ValueError(
                f"boundary[{b}] (utterance {b}): expected 0 <= s_begin <= s_end <= {max_targets}, "
                f"got s_begin = {s_begin}, s_end = {s_end}"
            )
        if not 0 <= t_begin <= t_end - min_frames <= max_frames - min_frames:
            relation = "<" if min_frames else "<="
            raise ValueError(
                f"boundary[{b}] (utterance {b}): expected 0 <= t_begin {relation} t_end <= "
                f"{max_frames}, got t_begin = {t_begin}, t_end = {t_end}"
            )


def check_ranges_values(
    ranges: Tensor, logit_lengths: Tensor, max_targets: int, first: Tensor | None = None
) -> None:
    """Raises a ValueError that names the first frame without R consecutive symbols in [0, U].

    Args:
        ranges: (B, T, R).
        logit_lengths: (B,) number of frames to check in each utterance.
        max_targets: U.
        first: (B,) the first frame to check; None for 0.
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


def check_ints(values: Sequence[int], name: str) -> None:
    """Raises a TypeError unless `values` is a list or a tuple of ints."""
    if not isinstance(values, (list, tuple)):
        raise TypeError(f"{name}: expected a list or a tuple of ints, got {type(values).__name__}")
    for index, value in enumerate(values):
        check_int(value, f"{name}[{index}]")


def check_not_negative(name: str, value: object) -> None:
    """Raises a TypeError or ValueError unless `value` is a finite number >= 0."""
    check_number(value, name)
    if not 0 <= value < math.inf:  # type: ignore[operator]
        raise ValueError(f"{name}: expected a finite number >= 0, got {value}")


def check_feasible(logit_lengths: Tensor, target_lengths: Tensor, topology: str | Topology) -> None:
    """Raises a ValueError that names the first utterance without a path in `topology`."""
    row = TOPOLOGIES[topology] if isinstance(topology, str) else topology
    lengths = zip(logit_lengths.tolist(), target_lengths.tolist(), strict=True)
    for b, (num_frames, num_targets) in enumerate(lengths):
        needed = row.min_frames(num_targets)
        if num_frames < needed:
            raise ValueError(
                f"utterance {b}: topology {row.name!r} needs at least {needed} frames for "
                f"{num_targets} symbols, got {num_frames}"
            )
        if not row.is_feasible(num_frames, num_targets):
            raise ValueError(
                f"utterance {b}: no durations of {num_targets} symbols and of blanks add up to "
                f"{num_frames} frames; blanks have {row.blank_durations}, symbols "
                f"{row.label_durations}"
            )
