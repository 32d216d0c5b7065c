# SPDX-License-Identifier: Apache-2.0
"""The exact transducer loss of a joiner whose logits never exist as a whole."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from transducer_toolkit import native
from transducer_toolkit.joint_tiles import JointTiles, autocast
from transducer_toolkit.lattice import LatticeShape
from transducer_toolkit.losses import checks
from transducer_toolkit.losses.reduction import check_reduction, reduce_losses


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
    products of a joiner's backward a fraction is done.

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
        tile_cells: cells of a tile; None takes what keeps a tile in the processor's cache.
        shape: the lattices, if the caller has them: lengths then stay on the CPU, and
            torch.compile(fullgraph=True) works. Must hold the same lengths.
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
    check_reduction(reduction)
    checks.check_options(fastemit_lambda, delay_penalty, clamp)
    _check_arguments(enc, pred, weight, bias, targets, logit_lengths, target_lengths, blank)
    _check_choices(activation, topology, dropped_mass, tile_cells)
    checks.check_ranges(ranges, enc.size(0), enc.size(1), enc.device)
    native.require_supported_device(enc.device)
    checks.refuse_forward_mode(enc, pred, weight, bias)
    enc, pred = autocast(enc), autocast(pred)
    if validate is None:
        validate = logit_lengths.device.type == target_lengths.device.type == "cpu"
    if shape is None:
        checks.check_lengths_fit(  # before anything is sized by them
            logit_lengths, target_lengths, max_frames=enc.size(1), max_targets=targets.size(1)
        )
        shape = LatticeShape.from_lengths(logit_lengths, target_lengths)
    elif not isinstance(shape, LatticeShape):
        raise TypeError(f"shape: expected a LatticeShape, got {type(shape).__name__}")
    elif shape.num_utterances != targets.size(0):
        raise ValueError(
            f"shape: expected {targets.size(0)} utterances, as many as targets, "
            f"got {shape.num_utterances}"
        )
    with_grad = torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in (enc, pred, weight, bias)
    )
    num_rows = shape.num_cells if ranges is None else shape.num_frames * ranges.size(2)
    losses, _, _, _, _, num_kept = torch.ops.transducer_toolkit.fused_joiner_loss(
        enc.contiguous(),
        pred.contiguous(),
        weight,
        bias,
        targets,
        shape.logit_lengths,
        shape.target_lengths,
        None if ranges is None else ranges.contiguous(),
        num_rows,
        blank,
        activation,
        topology,
        float(fastemit_lambda),
        float(delay_penalty),
        float(clamp),
        float(dropped_mass),
        tile_cells or 0,
        validate,
        with_grad or return_kept,
    )
    loss = reduce_losses(losses, reduction)
    return (loss, num_kept.sum() / num_rows) if return_kept else loss


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
        check_reduction(reduction)
        checks.check_options(fastemit_lambda, delay_penalty, clamp)
        _check_choices(activation, topology, dropped_mass, tile_cells)
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


def _check_arguments(
    enc: Tensor,
    pred: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    logit_lengths: Tensor,
    target_lengths: Tensor,
    blank: int,
) -> None:
    checks.check_joint(enc, pred)
    parameters = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
    for name, tensor in parameters.items():
        checks.check_tensor(tensor, name)
        if hasattr(tensor, "placements"):
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


def _check_choices(
    activation: str, topology: str, dropped_mass: float, tile_cells: int | None
) -> None:
    checks.check_choice(activation, "activation", native.ACTIVATIONS)
    checks.check_choice(topology, "topology", native.TOPOLOGIES)
    checks.check_dropped_mass(dropped_mass)
    if tile_cells is not None and (not isinstance(tile_cells, int) or tile_cells < 1):
        raise ValueError(f"tile_cells: expected None or an int of at least 1, got {tile_cells}")


# --- the operator -------------------------------------------------------------------------------


def _lattice_batch(
    enc: Tensor,
    targets: Tensor,
    logit_lengths: Tensor,
    target_lengths: Tensor,
    ranges: Tensor | None,
    num_rows: int,
) -> native.LatticeBatch:
    return native.LatticeBatch(
        logit_lengths,
        target_lengths,
        targets,
        num_rows=num_rows,
        max_frames=enc.size(1),
        padded=False,
        device=enc.device,
        band_start=None if ranges is None else ranges[:, :, 0],
        band_width=0 if ranges is None else ranges.size(2),
    )


def _forward(
    enc: Tensor,
    pred: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    logit_lengths: Tensor,
    target_lengths: Tensor,
    ranges: Tensor | None,
    num_rows: int,
    blank: int,
    activation: str,
    topology: str,
    fastemit_lambda: float,
    delay_penalty: float,
    clamp: float,
    dropped_mass: float,
    tile_cells: int,
    validate: bool,
    with_uses: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Losses (B,); per row normaliser and uses; the rows to visit in backward; their number (B,).

    All but the losses are empty unless with_uses. Of the rows to visit the first num_kept.sum()
    elements count.
    """
    checks.check_lengths_fit(
        logit_lengths, target_lengths, max_frames=enc.size(1), max_targets=targets.size(1)
    )
    if validate:
        checks.check_feasible(logit_lengths, target_lengths, topology)
        if ranges is not None:
            checks.check_ranges_values(ranges, logit_lengths, targets.size(1))
        checks.check_labels(targets, target_lengths, blank=blank, vocab_size=weight.size(0))
    batch = _lattice_batch(enc, targets, logit_lengths, target_lengths, ranges, num_rows)
    scores = native.CellScores(batch, enc.device)
    with torch.autocast(enc.device.type, enabled=False):
        joint = JointTiles(
            enc, pred, weight, bias, batch, activation=activation, tile_cells=tile_cells
        )
        for tile in joint.tiles():
            native.cell_scores(joint.logits(joint.hidden(tile)), batch, tile, scores, blank=blank)
    del joint  # its buffers, before the lattice takes memory
    losses, use_blank, use_label = native.lattice(
        scores.blank,
        scores.label,
        batch,
        topology=topology,
        delay_penalty=delay_penalty,
        fastemit_lambda=fastemit_lambda,
        with_uses=with_uses,
        exact=enc.dtype == torch.float64,
    )
    losses = losses.to(native.compute_dtype(enc.dtype))
    if not with_uses:
        nothing = targets.new_empty(0, dtype=torch.int64)
        return losses, use_blank.clone(), use_blank.clone(), use_label, nothing, nothing.clone()
    rows, num_kept = native.kept_rows(use_blank, use_label, batch, dropped_mass=dropped_mass)
    return losses, scores.normaliser, use_blank, use_label, rows, num_kept


def _backward(
    enc: Tensor,
    pred: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    logit_lengths: Tensor,
    target_lengths: Tensor,
    ranges: Tensor | None,
    normaliser: Tensor,
    use_blank: Tensor,
    use_label: Tensor,
    rows: Tensor,
    num_kept: Tensor,
    loss_grad: Tensor,
    blank: int,
    activation: str,
    clamp: float,
    tile_cells: int,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of enc, pred, weight and bias; empty where not wanted."""
    batch = _lattice_batch(enc, targets, logit_lengths, target_lengths, ranges, normaliser.numel())
    loss_grad = loss_grad.to(native.SCORE_DTYPE).contiguous()
    scale = None
    if enc.dtype == torch.float16:
        # A loss scale of 65536 would overflow the tiles: it comes back in after the products.
        largest = loss_grad.abs().max()
        scale = torch.where((largest > 0) & largest.isfinite(), largest, 1.0)
        loss_grad = loss_grad / scale
        scale = scale.to(torch.float32)
    with torch.autocast(enc.device.type, enabled=False):
        joint = JointTiles(
            enc, pred, weight, bias, batch, activation=activation, tile_cells=tile_cells
        )
        joint.start_backward(tuple(wanted))
        rows = rows[: int(num_kept.sum())]
        # An utterance that the caller masked out may hold NaN, and 0 * NaN is not zero.
        if bool(((loss_grad == 0) & (num_kept > 0)).any()):
            rows = rows[(loss_grad != 0).repeat_interleave(num_kept)]
        for tile in joint.tiles(rows):
            hidden = joint.hidden(tile)
            logits = joint.logits(hidden)
            native.logits_grad(
                logits,
                batch,
                tile,
                normaliser,
                use_blank,
                use_label,
                loss_grad,
                blank=blank,
                clamp=clamp,
                out=logits,
            )
            joint.backward(tile, hidden, logits)
        grads = joint.gradients(scale)
    return tuple(enc.new_empty(0) if grad is None else grad for grad in grads)  # type: ignore


_TENSORS = (
    "Tensor enc, Tensor pred, Tensor weight, Tensor? bias, Tensor targets, Tensor logit_lengths, "
    "Tensor target_lengths, Tensor? ranges"
)
_NUM_TENSORS = 8

torch.library.custom_op(
    "transducer_toolkit::fused_joiner_loss",
    _forward,
    mutates_args=(),
    schema=f"({_TENSORS}, SymInt num_rows, int blank, str activation, str topology, "
    "float fastemit_lambda, float delay_penalty, float clamp, float dropped_mass, int tile_cells, "
    "bool validate, bool with_uses) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
torch.library.custom_op(
    "transducer_toolkit::fused_joiner_loss_backward",
    _backward,
    mutates_args=(),
    schema=f"({_TENSORS}, Tensor normaliser, Tensor use_blank, Tensor use_label, Tensor rows, "
    "Tensor num_kept, Tensor loss_grad, int blank, str activation, float clamp, int tile_cells, "
    "bool[] wanted) -> (Tensor, Tensor, Tensor, Tensor)",
)


@torch.library.register_fake("transducer_toolkit::fused_joiner_loss")
def _forward_fake(enc, pred, weight, bias, targets, logit_lengths, target_lengths, *options):
    num_rows, with_uses = options[1], options[-1]
    losses = enc.new_empty(targets.size(0), dtype=native.compute_dtype(enc.dtype))
    rows = num_rows if with_uses else 0
    per_row = (enc.new_empty(rows, dtype=native.SCORE_DTYPE) for _ in range(3))
    counts = targets.size(0) if with_uses else 0
    return (
        losses,
        *per_row,
        targets.new_empty(rows, dtype=torch.int64),
        targets.new_empty(counts, dtype=torch.int64),
    )


@torch.library.register_fake("transducer_toolkit::fused_joiner_loss_backward")
def _backward_fake(enc, pred, weight, bias, *arguments):
    return tuple(
        torch.empty_like(tensor) if is_wanted else enc.new_empty(0)
        for tensor, is_wanted in zip((enc, pred, weight, bias), arguments[-1], strict=True)
    )


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:_NUM_TENSORS], *output[1:])
    _, ctx.blank, ctx.activation, _, _, _, ctx.clamp, _, ctx.tile_cells, _, _ = inputs[
        _NUM_TENSORS:
    ]
    ctx.set_materialize_grads(False)


def _differentiate(ctx, loss_grad, *_):
    wanted = [bool(needed) for needed in ctx.needs_input_grad[:4]]
    nothing = (None,) * (_NUM_TENSORS + 11)
    if loss_grad is None:
        return nothing
    grads = torch.ops.transducer_toolkit.fused_joiner_loss_backward(
        *ctx.saved_tensors,
        loss_grad,
        ctx.blank,
        ctx.activation,
        ctx.clamp,
        ctx.tile_cells,
        wanted,
    )
    inputs = (grad if is_wanted else None for grad, is_wanted in zip(grads, wanted, strict=True))
    return *inputs, *nothing[4:]


torch.library.register_autograd(
    "transducer_toolkit::fused_joiner_loss", _differentiate, setup_context=_setup_context
)


def _refuse_second_derivative(ctx, *grads):
    raise RuntimeError(
        "fused_joiner_loss: the gradient of the gradient (create_graph=True) is not implemented"
    )


torch.library.register_autograd(
    "transducer_toolkit::fused_joiner_loss_backward", _refuse_second_derivative
)
