# SPDX-License-Identifier: Apache-2.0
"""The exact transducer loss of a joiner, computed without its logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor, nn

from transducer_toolkit.ops import checks, native
from transducer_toolkit.ops.fused_joiner import FusedInputs, fused_loss
from transducer_toolkit.ops.joint_tiles import autocast
from transducer_toolkit.ops.lattice import LatticeShape, Lengths, check_shape, refuse_tracing
from transducer_toolkit.ops.options import FusedOptions
from transducer_toolkit.ops.restriction import Restriction
from transducer_toolkit.ops.topology import multi_blank_topology, tdt_topology


class CellParts(NamedTuple):
    """Fractions of the cells of a batch, float32 scalars in [0, 1].

    Attributes:
        kept: backward visits them.
        selected: forward computes them in full precision.
        full: backward computes them in full precision.
        low: backward computes them in low precision.
    """

    kept: Tensor
    selected: Tensor
    full: Tensor
    low: Tensor


@overload
def fused_joiner_loss(
    enc: Tensor,
    pred: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    logit_lengths: Tensor,
    target_lengths: Tensor,
    blank: int,
    *,
    activation: str = "tanh",
    ranges: Tensor | None = None,
    alignment: Tensor | None = None,
    left: int = 0,
    right: int = 0,
    topology: str = "regular",
    durations: Sequence[int] | None = None,
    big_blank_durations: Sequence[int] | None = None,
    sigma: float = 0.0,
    normalization: str = "softmax",
    reduction: str = "mean",
    fastemit_lambda: float = 0.0,
    delay_penalty: float = 0.0,
    clamp: float = 0.0,
    dropped_mass: float = 1e-7,
    tile_cells: int | None = None,
    precision: str = "auto",
    shape: LatticeShape | None = None,
    validate: bool | None = None,
    return_kept: Literal[False] = ...,
    return_parts: Literal[False] = ...,
) -> Tensor: ...


@overload
def fused_joiner_loss(
    enc: Tensor,
    pred: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    logit_lengths: Tensor,
    target_lengths: Tensor,
    blank: int,
    *,
    activation: str = "tanh",
    ranges: Tensor | None = None,
    alignment: Tensor | None = None,
    left: int = 0,
    right: int = 0,
    topology: str = "regular",
    durations: Sequence[int] | None = None,
    big_blank_durations: Sequence[int] | None = None,
    sigma: float = 0.0,
    normalization: str = "softmax",
    reduction: str = "mean",
    fastemit_lambda: float = 0.0,
    delay_penalty: float = 0.0,
    clamp: float = 0.0,
    dropped_mass: float = 1e-7,
    tile_cells: int | None = None,
    precision: str = "auto",
    shape: LatticeShape | None = None,
    validate: bool | None = None,
    return_kept: Literal[True],
    return_parts: Literal[False] = ...,
) -> tuple[Tensor, Tensor]: ...


@overload
def fused_joiner_loss(
    enc: Tensor,
    pred: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    logit_lengths: Tensor,
    target_lengths: Tensor,
    blank: int,
    *,
    activation: str = "tanh",
    ranges: Tensor | None = None,
    alignment: Tensor | None = None,
    left: int = 0,
    right: int = 0,
    topology: str = "regular",
    durations: Sequence[int] | None = None,
    big_blank_durations: Sequence[int] | None = None,
    sigma: float = 0.0,
    normalization: str = "softmax",
    reduction: str = "mean",
    fastemit_lambda: float = 0.0,
    delay_penalty: float = 0.0,
    clamp: float = 0.0,
    dropped_mass: float = 1e-7,
    tile_cells: int | None = None,
    precision: str = "auto",
    shape: LatticeShape | None = None,
    validate: bool | None = None,
    return_kept: Literal[False] = ...,
    return_parts: Literal[True],
) -> tuple[Tensor, CellParts]: ...


def fused_joiner_loss(
    enc: Tensor,
    pred: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    logit_lengths: Tensor,
    target_lengths: Tensor,
    blank: int,
    *,
    activation: str = "tanh",
    ranges: Tensor | None = None,
    alignment: Tensor | None = None,
    left: int = 0,
    right: int = 0,
    topology: str = "regular",
    durations: Sequence[int] | None = None,
    big_blank_durations: Sequence[int] | None = None,
    sigma: float = 0.0,
    normalization: str = "softmax",
    reduction: str = "mean",
    fastemit_lambda: float = 0.0,
    delay_penalty: float = 0.0,
    clamp: float = 0.0,
    dropped_mass: float = 1e-7,
    tile_cells: int | None = None,
    precision: str = "auto",
    shape: LatticeShape | None = None,
    validate: bool | None = None,
    return_kept: bool = False,
    return_parts: bool = False,
) -> Tensor | tuple[Tensor, Tensor] | tuple[Tensor, CellParts]:
    """Computes the transducer loss of ``Linear(activation(enc_t + pred_u))`` without its logits.

    ::

        logits(b, t, u) = activation(enc[b, t] + pred[b, u]) @ weight.T + bias
        loss = transducer_loss(logits, ...)

    The loss and the gradients of enc, pred, weight and bias equal those of the unfused computation.
    Forward takes the cells of the lattice through the joiner a tile at a time and keeps three
    numbers of each cell. The forward-backward recursion then gives each cell's occupancy: the
    probability that a path uses it. Backward computes the tiles again, but only those cells whose
    occupancy matters. So peak memory depends on neither ``cells * V`` nor ``cells * D``, and
    backward skips most of the matrix products of a joiner.

    Of a large batch of float32 tensors, forward computes all cells in bfloat16 first and repeats
    those in float32 that matter; backward uses bfloat16 for the cells that matter little. The
    relative error of each gradient stays below 1e-5. ``precision="full"`` computes everything in
    the dtype of the inputs.

    If the logits of the whole batch are small (16 MiB on the CPU, 128 MiB on a GPU), they are kept,
    and backward does not compute them again. The logits of a band are often that small.

    Args:
        enc: (B, T, D) encoder frames in joiner width, float16, bfloat16, float32 or float64; T is
            at least the longest logit length. Autocast casts enc, pred, and a 16-bit weight and
            bias, as it casts the inputs of a matrix product.
        pred: (B, U + 1, D) predictor outputs in joiner width, of a start symbol and the targets,
            dtype (after autocast) and device of enc.
        weight: (V, D) of the output layer, dtype of enc, or float32 with 16-bit enc. With
            `durations`, (V + K, D): the last K rows give the logits of the durations.
        bias: (V,) or (V + K,) of the output layer, dtype as weight, or None.
        targets: (B, U) int32 or int64 labels in [0, V) other than blank. Padding may hold any
            value.
        logit_lengths: (B,) int32 or int64, the number of frames T_b >= 1 of each utterance,
            preferably on the CPU.
        target_lengths: (B,) int32 or int64, the number of labels U_b >= 0 of each utterance,
            preferably on the CPU.
        blank: index of blank in [0, V).
        activation: "tanh", "relu", "gelu", "silu" or "identity".
        ranges: (B, T, R) int32 or int64; for each frame the R consecutive symbols whose cells
            exist, as :func:`~transducer_toolkit.get_rnnt_prune_ranges` returns them. None: all
            cells exist.
        alignment: (B, U) int32 or int64, on the CPU or on the device of enc: the frame a_u of each
            label, from any aligner; not decreasing. Label u may be emitted on the frames
            ``a_u - left`` to ``a_u + right`` only (alignment-restricted transducer). Padding may
            hold any value. None: no restriction. Not with `ranges`. Only the cells
            that such a path can use are computed. A copy on the CPU avoids a synchronization.
        left: >= 0, frames that a label may be emitted before its frame in the alignment.
        right: >= 0, frames that a label may be emitted behind its frame in the alignment.
        topology: "regular", "modified", "constrained" or "one_sym_per_frame", as in
            :func:`~transducer_toolkit.transducer_loss`.
        durations: of a token-and-duration transducer, as in :func:`~transducer_toolkit.tdt_loss`;
            (0, 1, 2) is the same as ``topology="tdt-0-1-2"``.
        big_blank_durations: of a multi-blank transducer, as in
            :func:`~transducer_toolkit.multi_blank_loss`; (2, 4) is the same as
            ``topology="multi_blank-2-4"``.
        sigma: as in these two losses; with another topology it must be 0.
        normalization: "softmax" or "hat", as in :func:`~transducer_toolkit.transducer_loss`.
        reduction: "none" (B,), "mean" over utterances, or "sum".
        fastemit_lambda: as in :func:`~transducer_toolkit.transducer_loss`.
        delay_penalty: as in :func:`~transducer_toolkit.transducer_loss`.
        clamp: as in :func:`~transducer_toolkit.transducer_loss`.
        dropped_mass: >= 0. For each utterance, backward leaves out the cells of lowest occupancy as
            long as their occupancies sum to at most ``dropped_mass * (T_b + U_b)``. The L1 norm of
            the error of the logits' gradient is at most twice that sum times the upstream gradient.
            0 leaves out cells of occupancy zero only. ``python -m benchmarks.dropped_mass``
            measures how much accuracy the default costs.
        tile_cells: cells of a tile; no logits are kept then. None chooses a size that suits the
            processor's cache.
        precision: "auto" computes cells that matter little in bfloat16, if the inputs are float32,
            the logits of the batch take more than 16 MiB (128 MiB on a GPU), the weight has at
            least 2**14 elements, and the processor has instructions for bfloat16 products (AVX-512
            BF16; a GPU of compute capability 8.0, where a product of all cells must have 2**38
            operations and TF32 be off). "full" never does. float64 and 16-bit tensors
            are always computed in their own precision, and so are CUDA graphs.
        shape: the lattices; other lengths than those of the call are an error, if both are on the
            CPU. With a shape, the lengths stay on the CPU, and ``torch.compile(fullgraph=True)``
            works; without it, that raises an error. After ``shape.to(device)`` nothing is copied to
            the device, and the loss and its gradient can be captured in a CUDA graph. Backward
            visits every cell in a capture, because it may not wait for the number of kept cells.
        validate: as in :func:`~transducer_toolkit.transducer_loss`, but lengths are always checked,
            because they decide how much memory is needed.
        return_kept: also return the fraction of cells that backward visits.
        return_parts: also return how many cells are computed in which precision.

    Returns:
        The loss in nats, float64 for float64 inputs and float32 otherwise; non-finite values as in
        :func:`~transducer_toolkit.transducer_loss`. With return_kept, the pair of the loss and a
        float32 scalar in [0, 1]; with return_parts, the pair of the loss and a :class:`CellParts`.

    Raises:
        TypeError: not a tensor, a wrong dtype, or a sharded weight (DTensor).
        ValueError: sizes, devices, blank, options, lengths, ranges, labels or an alignment that do
            not fit; an alignment that leaves an utterance no path.
        RuntimeError: no stage for this device in this build; a second derivative.

    Example:
        >>> import torch
        >>> enc, pred = torch.zeros(1, 2, 8), torch.zeros(1, 2, 8)
        >>> weight, bias = torch.zeros(5, 8, requires_grad=True), torch.zeros(5)
        >>> lengths = torch.tensor([2]), torch.tensor([1])
        >>> joint = enc, pred, weight, bias
        >>> loss = fused_joiner_loss(*joint, torch.tensor([[1]]), *lengths, blank=0)
        >>> round(loss.item(), 4)  # 3 log 5 - log 2
        4.1352
        >>> loss.backward()

    Source:
        A. Graves, "Sequence Transduction with Recurrent Neural Networks", 2012, for the lattice;
        E. Wijmans et al., "Cut Your Losses in Large-Vocabulary Language Models", 2024, for the
        recomputation; J. Mahadeokar et al., "Alignment Restricted Streaming Recurrent Neural
        Network Transducer", 2020, for the alignment.
    """
    checks.check_reduction(reduction)
    options = FusedOptions(
        blank=blank,
        topology=_topology(topology, durations, big_blank_durations),
        sigma=sigma,
        normalization=normalization,
        fastemit_lambda=fastemit_lambda,
        delay_penalty=delay_penalty,
        clamp=clamp,
        validate=validate,
        activation=activation,
        dropped_mass=dropped_mass,
        tile_cells=tile_cells,
        precision=precision,
    )
    checks.check_flag(return_kept, "return_kept")
    checks.check_flag(return_parts, "return_parts")
    if return_kept and return_parts:
        raise ValueError("return_parts: expected False with return_kept: the parts include kept")
    if shape is None:
        refuse_tracing(
            "pass shape=LatticeShape.from_lengths(logit_lengths, target_lengths), made outside of "
            "the compiled function"
        )
    joint = *_autocast(enc, pred, weight, bias), targets
    _check_inputs(FusedInputs(*joint, logit_lengths, target_lengths, ranges), options)
    restriction = Restriction.of(alignment, left, right, targets)
    if restriction is not None:
        if ranges is not None:
            raise ValueError("ranges: expected None with alignment, got a tensor")
        # The windows decide how much memory is needed.
        restriction = restriction._replace(alignment=restriction.alignment.cpu())
    check_shape(shape, logit_lengths, target_lengths)
    if shape is None:
        checks.check_lengths_fit(  # before they decide any size
            logit_lengths,
            target_lengths,
            max_frames=enc.size(1),
            max_targets=targets.size(1),
            frames_of="enc",
        )
        shape = LatticeShape.from_lengths(logit_lengths, target_lengths).to(enc.device)
    windows, num_cells = None, None
    if restriction is not None:
        windows = restriction.checked_windows(Lengths(*shape.lengths), options, enc.size(1))
        ranges, num_cells = _band_of_windows(windows, shape, targets.size(1), enc.device)
        windows = native.to_device(windows, enc.device)
    num_rows = shape.num_cells if ranges is None else shape.num_frames * ranges.size(2)
    inputs = FusedInputs(*joint, *shape.lengths, ranges, shape.index(enc.device), windows)
    with_uses = return_kept or return_parts
    result = fused_loss(inputs, options, num_rows, with_uses=with_uses, num_cells=num_cells)
    num_cells = num_rows if num_cells is None else num_cells
    loss = checks.reduce_losses(result.losses, reduction)
    if return_kept:
        return loss, (result.num_full + result.num_low) / num_cells
    if return_parts:
        parts = result.num_full + result.num_low, result.num_fine, result.num_full, result.num_low
        return loss, CellParts(*(part / num_cells for part in parts))
    return loss


class FusedJoinerLoss(nn.Module):
    """Module form of :func:`fused_joiner_loss`: it takes options here and tensors in forward.

    Example:
        >>> import torch
        >>> criterion = FusedJoinerLoss(blank=0, reduction="sum")
        >>> output = torch.nn.Linear(8, 5)
        >>> enc, pred = torch.randn(1, 2, 8), torch.randn(1, 2, 8)
        >>> lengths = torch.tensor([2]), torch.tensor([1])
        >>> criterion(enc, pred, output.weight, output.bias, torch.tensor([[1]]), *lengths).shape
        torch.Size([])
    """

    def __init__(
        self,
        blank: int,
        *,
        activation: str = "tanh",
        topology: str = "regular",
        durations: Sequence[int] | None = None,
        big_blank_durations: Sequence[int] | None = None,
        sigma: float = 0.0,
        left: int = 0,
        right: int = 0,
        normalization: str = "softmax",
        reduction: str = "mean",
        fastemit_lambda: float = 0.0,
        delay_penalty: float = 0.0,
        clamp: float = 0.0,
        dropped_mass: float = 1e-7,
        tile_cells: int | None = None,
        precision: str = "auto",
        validate: bool | None = None,
        return_kept: bool = False,
        return_parts: bool = False,
    ) -> None:
        super().__init__()
        checks.check_reduction(reduction)
        checks.check_at_least(0, left=left, right=right)
        self.options: dict[str, Any] = {
            "blank": blank,
            "activation": activation,
            "topology": topology,
            "durations": durations,
            "big_blank_durations": big_blank_durations,
            "sigma": sigma,
            "left": left,
            "right": right,
            "normalization": normalization,
            "reduction": reduction,
            "fastemit_lambda": fastemit_lambda,
            "delay_penalty": delay_penalty,
            "clamp": clamp,
            "dropped_mass": dropped_mass,
            "tile_cells": tile_cells,
            "precision": precision,
            "validate": validate,
            "return_kept": return_kept,
            "return_parts": return_parts,
        }
        name = _topology(topology, durations, big_blank_durations)
        FusedOptions.check(self.options | {"topology": name})

    def forward(
        self,
        enc: Tensor,
        pred: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        logit_lengths: Tensor,
        target_lengths: Tensor,
        ranges: Tensor | None = None,
        shape: LatticeShape | None = None,
        alignment: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor] | tuple[Tensor, CellParts]:
        return fused_joiner_loss(
            enc,
            pred,
            weight,
            bias,
            targets,
            logit_lengths,
            target_lengths,
            ranges=ranges,
            shape=shape,
            alignment=alignment,
            **self.options,
        )

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


def _band_of_windows(
    windows: Tensor, shape: LatticeShape, max_targets: int, device: torch.device
) -> tuple[Tensor, int]:
    """Returns the band around windows (B, T, 2) on the CPU, and the number of their cells.

    The band (B, T, R) is on `device`. R is the width of the widest window.
    """
    is_frame = torch.arange(windows.size(1)) < shape.logit_lengths[:, None]
    begin, end = windows.unbind(2)
    sizes = (end - begin).clamp(min=0).masked_fill(~is_frame, 0)
    width = max(1, int(sizes.max()))
    start = native.to_device(begin.clamp(max=max_targets + 1 - width), device)
    return start[:, :, None] + torch.arange(width, device=device), int(sizes.sum())


def _topology(
    topology: str, durations: Sequence[int] | None, big_blank_durations: Sequence[int] | None
) -> str:
    """Returns the name of the topology; `durations` and `big_blank_durations` name one, too."""
    given = {"durations": durations, "big_blank_durations": big_blank_durations}
    for name, values in given.items():
        if values is None:
            continue
        checks.check_ints(values, name)
        if topology != "regular":
            raise ValueError(f"topology: expected 'regular' with {name}, got {topology!r}")
        topology = (tdt_topology if name == "durations" else multi_blank_topology)(values).name
    return topology


def _autocast(
    enc: Tensor, pred: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Casts the inputs of a joiner's output layer; a float32 weight and bias stay float32.

    The tiles cast them, so that their gradients are float32.
    """

    def cast(tensor: Tensor, name: str, keeps: tuple[torch.dtype, ...] = ()) -> Tensor:
        checks.check_tensor(tensor, name)
        return tensor if tensor.dtype in keeps else autocast(tensor)

    keeps = (torch.float32,)
    return (
        cast(enc, "enc"),
        cast(pred, "pred"),
        cast(weight, "weight", keeps),
        None if bias is None else cast(bias, "bias", keeps),
    )


def _check_inputs(inputs: FusedInputs, options: FusedOptions) -> None:
    enc, pred, weight, bias, targets, logit_lengths, target_lengths, ranges, *_ = inputs
    checks.check_joint(enc, pred)
    checks.check_output_layer(weight, bias, enc)
    allowed = (torch.float32,) if enc.dtype in native.SIXTEEN_BIT else ()
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None:
            checks.check_dtype(tensor, name, (enc.dtype, *allowed))
    checks.check_targets_and_lengths(targets, logit_lengths, target_lengths, enc.device)
    if (targets.size(0), targets.size(1) + 1) != tuple(pred.shape[:2]):
        has_no_start = targets.shape == pred.shape[:2]
        remedy = "; the input of the predictor begins with a start symbol" if has_no_start else ""
        raise ValueError(
            f"pred: expected shape ({targets.size(0)}, {targets.size(1) + 1}, D), B and U + 1 from "
            f"targets {tuple(targets.shape)}, got {tuple(pred.shape)}{remedy}"
        )
    vocab_size = options.vocab_size(weight.size(0))
    checks.check_blank(options.blank, vocab_size)
    checks.check_labels_of_hat(options.is_hat, vocab_size)
    checks.check_big_blanks(options.arcs.num_big_blanks, vocab_size)
    checks.check_ranges(ranges, enc.size(0), enc.size(1), enc.device)
    native.require_supported_device(enc.device)
    checks.refuse_forward_mode(enc, pred, weight, bias)
