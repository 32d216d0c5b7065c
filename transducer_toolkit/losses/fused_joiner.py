# SPDX-License-Identifier: Apache-2.0
"""The exact transducer loss of a joiner whose logits never exist as a whole."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from transducer_toolkit.ops import checks, native
from transducer_toolkit.ops.fused_joiner import FusedInputs, fused_loss
from transducer_toolkit.ops.lattice import LatticeShape, check_shape
from transducer_toolkit.ops.options import FusedOptions


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
    topology: str = "regular",
    reduction: str = "mean",
    fastemit_lambda: float = 0.0,
    delay_penalty: float = 0.0,
    clamp: float = 0.0,
    dropped_mass: float = 1e-7,
    tile_cells: int | None = None,
    shape: LatticeShape | None = None,
    validate: bool | None = None,
    return_kept: bool = False,
) -> Any:
    """The transducer loss of ``Linear(activation(enc_t + pred_u))`` without its logits.

    ::

        logits(b, t, u) = activation(enc[b, t] + pred[b, u]) @ weight.T + bias
        loss = transducer_loss(logits, ...)

    equal in value and in the gradients of enc, pred, weight and bias to the unfused computation.
    Cells go through the joiner a tile at a time; three numbers of each survive until the lattice
    has been summed up. Backward makes tiles again, of those cells only that carry gradient: after
    the forward-backward recursion each cell's occupancy is known, and most are zero to rounding.
    So peak memory depends on neither ``cells * V`` nor ``cells * D``, and of the three matrix
    products of a joiner's backward a fraction is done. (Logits that are 16 MiB or less in all, 128
    on a GPU, are kept, and two products are left. A band often has so few.)

    Args:
        enc: (B, T, D) encoder frames in joiner width, float16, bfloat16, float32 or float64; T at
            least the longest logit length. Under autocast it is cast to autocast's dtype.
        pred: (B, U + 1, D) predictor outputs in joiner width, dtype and device of enc.
        weight: (V, D) of the output layer, dtype of enc, or float32 beside 16-bit enc.
        bias: (V,) like weight, or None.
        targets: (B, U) int32 or int64 labels in [0, V) other than blank; anything in padding.
        logit_lengths: (B,) int32 or int64, frames T_b >= 1, best on the CPU.
        target_lengths: (B,) int32 or int64, symbols U_b >= 0, best on the CPU.
        blank: index of blank in [0, V).
        activation: "tanh", "relu", "gelu", "silu" or "identity".
        ranges: (B, T, R) int32 or int64, for each frame the R consecutive symbols whose cells
            exist, as from :func:`~transducer_toolkit.get_rnnt_prune_ranges`; None: all of them.
        topology: "regular", "modified", "constrained" or "one_sym_per_frame".
        reduction: "none" (B,), "mean" over utterances, or "sum".
        fastemit_lambda: as in :func:`~transducer_toolkit.transducer_loss`.
        delay_penalty: as in :func:`~transducer_toolkit.transducer_loss`.
        clamp: as in :func:`~transducer_toolkit.transducer_loss`.
        dropped_mass: >= 0; backward leaves out, for each utterance, the cells of lowest occupancy
            as long as theirs sum to at most ``dropped_mass * (T_b + U_b)``. The L1 norm of the
            error of the logits' gradient is at most twice that times the upstream gradient. The
            default adds less to the error of the parameters' gradients than float32 itself makes
            (benchmarks/README.md). 0 is exact to rounding.
        tile_cells: cells of a tile, and no logits are kept; None takes what keeps a tile in the
            processor's cache.
        shape: the lattices, if the caller has them: lengths then stay on the CPU, and
            torch.compile(fullgraph=True) works. Must hold the same lengths. If it has been moved to
            the device of enc, nothing is copied there, and the loss and its gradient can be
            captured in a CUDA graph: backward then visits all cells, as nobody can wait for the
            number of those that count.
        validate: as in :func:`~transducer_toolkit.transducer_loss`, but lengths are checked
            always: they decide how much memory is needed.
        return_kept: also return which part of the cells backward visits.

    Returns:
        The loss in nats, float64 for float64 inputs and float32 otherwise; non-finite values as in
        :func:`~transducer_toolkit.transducer_loss`. With return_kept a pair of it and a float32
        scalar in [0, 1].

    Raises:
        TypeError: not a tensor, a wrong dtype, or a sharded weight (DTensor).
        ValueError: sizes, devices, blank, options, lengths, ranges or labels that do not fit.
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
        The lattice as in A. Graves, "Sequence Transduction with Recurrent Neural Networks", 2012;
        recomputation as in E. Wijmans et al., "Cut Your Losses in Large-Vocabulary Language
        Models", 2024.
    """
    checks.check_reduction(reduction)
    options = FusedOptions(
        blank=blank,
        topology=topology,
        fastemit_lambda=fastemit_lambda,
        delay_penalty=delay_penalty,
        clamp=clamp,
        validate=validate,
        activation=activation,
        dropped_mass=dropped_mass,
        tile_cells=tile_cells,
    )
    checks.check_flag(return_kept, "return_kept")
    inputs = FusedInputs(enc, pred, weight, bias, targets, logit_lengths, target_lengths, ranges)
    _check_inputs(inputs, blank)
    check_shape(shape, targets.size(0))
    if shape is None:
        checks.check_lengths_fit(  # before anything is sized by them
            logit_lengths, target_lengths, max_frames=enc.size(1), max_targets=targets.size(1)
        )
        shape = LatticeShape.from_lengths(logit_lengths, target_lengths).to(enc.device)
    num_rows = shape.num_cells if ranges is None else shape.num_frames * ranges.size(2)
    inputs = inputs._replace(
        logit_lengths=shape.logit_lengths,
        target_lengths=shape.target_lengths,
        shape_index=shape.index(enc.device),
    )
    result = fused_loss(inputs, options, num_rows, with_uses=return_kept)
    loss = checks.reduce_losses(result.losses, reduction)
    return (loss, result.num_kept.sum() / num_rows) if return_kept else loss


class FusedJoinerLoss(nn.Module):
    """Module form of :func:`fused_joiner_loss`: options here, tensors in forward.

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
        reduction: str = "mean",
        fastemit_lambda: float = 0.0,
        delay_penalty: float = 0.0,
        clamp: float = 0.0,
        dropped_mass: float = 1e-7,
        tile_cells: int | None = None,
        validate: bool | None = None,
        return_kept: bool = False,
    ) -> None:
        super().__init__()
        checks.check_reduction(reduction)
        FusedOptions(
            blank=blank,
            topology=topology,
            fastemit_lambda=fastemit_lambda,
            delay_penalty=delay_penalty,
            clamp=clamp,
            activation=activation,
            dropped_mass=dropped_mass,
            tile_cells=tile_cells,
        )
        self.options: dict[str, Any] = {
            "blank": blank,
            "activation": activation,
            "topology": topology,
            "reduction": reduction,
            "fastemit_lambda": fastemit_lambda,
            "delay_penalty": delay_penalty,
            "clamp": clamp,
            "dropped_mass": dropped_mass,
            "tile_cells": tile_cells,
            "validate": validate,
            "return_kept": return_kept,
        }

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
    ) -> Any:
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
            **self.options,
        )

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


def _check_inputs(inputs: FusedInputs, blank: int) -> None:
    enc, pred, weight, bias, targets, logit_lengths, target_lengths, ranges, _ = inputs
    checks.check_joint(enc, pred)
    parameters = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
    for name, tensor in parameters.items():
        checks.check_tensor(tensor, name)
        # (torch 2.4 cannot trace the question.)
        if not torch.compiler.is_compiling() and hasattr(tensor, "placements"):
            raise TypeError(
                f"{name}: expected a whole tensor, got a sharded one (DTensor): call the loss "
                "inside of the module that owns it, where FSDP has gathered it, or pass "
                f"{name}.full_tensor()"
            )
        allowed = (torch.float32,) if enc.dtype in native.SIXTEEN_BIT else ()
        checks.check_dtype(tensor, name, (enc.dtype, *allowed))
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
    checks.check_targets_and_lengths(targets, logit_lengths, target_lengths, enc.device)
    if (targets.size(0), targets.size(1) + 1) != tuple(pred.shape[:2]):
        raise ValueError(
            f"pred: expected shape ({targets.size(0)}, {targets.size(1) + 1}, D), B and U + 1 from "
            f"targets {tuple(targets.shape)}, got {tuple(pred.shape)}"
        )
    checks.check_blank(blank, weight.size(0))
    checks.check_ranges(ranges, enc.size(0), enc.size(1), enc.device)
