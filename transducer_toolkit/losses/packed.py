# SPDX-License-Identifier: Apache-2.0
"""The exact transducer loss on packed or padded logits, through the compiled stages."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from transducer_toolkit import native
from transducer_toolkit.losses import checks
from transducer_toolkit.losses.reduction import check_reduction, reduce_losses


def transducer_loss(
    logits: Tensor,
    targets: Tensor,
    logit_lengths: Tensor,
    target_lengths: Tensor,
    blank: int,
    from_log_softmax: bool = False,
    one_sym_per_frame: bool = False,
    reduction: str = "mean",
    *,
    fastemit_lambda: float = 0.0,
    delay_penalty: float = 0.0,
    clamp: float = 0.0,
    inplace: bool = False,
    validate: bool | None = None,
) -> Tensor:
    """Negative log-probability of the targets under an RNN-Transducer.

    The probability of a target sequence is the sum over all lattice paths from cell (0, 0) to a
    final blank at (T_b - 1, U_b) of the product of the blank and label probabilities on the path::

        loss_b = -log alpha(T_b - 1, U_b) - log_softmax(logits(T_b - 1, U_b))[blank]
        alpha(t, u) = alpha(t - 1, u) * P(blank | t - 1, u) + alpha(t, u - 1) * P(y_u | t, u - 1)

    Forward reads the logits once; backward reads them once more and writes their gradient. Nothing
    else of the logits' size is made. Equal to ``torchaudio.functional.rnnt_loss`` on padded logits
    (with gradients a thousand times closer to float64), and to optimized_transducer's function of
    the same name and argument order on packed ones.

    Args:
        logits: joiner outputs, float16, bfloat16, float32 or float64. Packed
            ``(sum_b T_b * (U_b + 1), V)``, in the order of
            :class:`~transducer_toolkit.LatticeShape`, or padded ``(B, T, U + 1, V)``. Unnormalised
            unless `from_log_softmax`. -inf means probability zero.
        targets: (B, U) int32 or int64 labels in [0, V) other than blank, on the device of logits.
            What stands beyond an utterance's length does not matter.
        logit_lengths: (B,) int32 or int64, frames T_b >= 1 of each utterance; on the CPU (best: no
            synchronisation) or on the device of logits.
        target_lengths: (B,) int32 or int64, symbols U_b >= 0; likewise.
        blank: index of the blank symbol in [0, V).
        from_log_softmax: logits are log-probabilities already; the gradient is with respect to
            them. Only the entries of blank and label are read, and get a gradient.
        one_sym_per_frame: a label advances to the next frame, so that a frame emits at most one;
            the path ends with a blank on the last frame. Needs T_b > U_b.
        reduction: "none" (B,), "mean" over utterances, or "sum".
        fastemit_lambda: >= 0; gradients through label arcs are multiplied by 1 + lambda, which
            favours early symbols (FastEmit). The reported loss is unchanged.
        delay_penalty: >= 0; adds ``delay_penalty * ((T_b - 1) / 2 - t)`` to the log-probability of
            every label at frame t. Changes the loss.
        clamp: > 0 limits each d loss_b / d logit to [-clamp, clamp] before the upstream gradient
            multiplies it; <= 0 does not.
        inplace: backward writes the gradient over the logits instead of into a new tensor. Eager
            mode only; logits must be neither a leaf nor a view (padded logits straight from
            ``nn.Linear`` are one) nor needed by another backward; a second backward raises.
        validate: check lengths and labels. None: yes if they can be read without waiting for a
            device. Unchecked nonsense gives that utterance a NaN loss, never a wild access.

    Returns:
        The loss in nats, float64 for float64 logits and float32 otherwise. An utterance none of
        whose paths survives -inf logits has loss +inf and zero gradient; one with a NaN, a +inf or
        an all -inf row has NaN loss and NaN gradient, the others are untouched. An utterance whose
        upstream gradient is 0 gets zeros, so a non-finite loss can be masked out with
        ``torch.where``.

    Raises:
        TypeError: not a tensor, or a wrong dtype.
        ValueError: sizes, devices, blank, reduction, options, lengths or labels that do not fit;
            names the argument or utterance, what was expected and what came.
        RuntimeError: no stage for this device in this build; a second derivative.

    Example:
        >>> logits = torch.zeros(2 * 2 + 3 * 1, 5, requires_grad=True)
        >>> loss = transducer_loss(
        ...     logits,
        ...     targets=torch.tensor([[1], [-1]]),
        ...     logit_lengths=torch.tensor([2, 3]),
        ...     target_lengths=torch.tensor([1, 0]),
        ...     blank=0,
        ...     reduction="sum",
        ... )
        >>> round(loss.item(), 4)  # 3 log 5 - log 2, and 3 log 5
        8.9635
        >>> loss.backward()
        >>> logits.grad.shape
        torch.Size([7, 5])

    Source:
        A. Graves, "Sequence Transduction with Recurrent Neural Networks", 2012, eq. 12-22; packing:
        J. Li et al., "Improving RNN Transducer Modeling for End-to-End Speech Recognition", 2019.
    """
    topology = "one_sym_per_frame" if one_sym_per_frame else "regular"
    check_reduction(reduction)
    _check_arguments(logits, targets, logit_lengths, target_lengths, blank)
    _check_options(fastemit_lambda, delay_penalty, clamp)
    native.require_supported_device(logits.device)
    if validate is None:
        validate = logit_lengths.device.type == target_lengths.device.type == "cpu"
    arguments = (
        logits.contiguous(),
        targets,
        logit_lengths,
        target_lengths,
        blank,
        from_log_softmax,
        topology,
        float(fastemit_lambda),
        float(delay_penalty),
        float(clamp),
        validate,
    )
    if inplace and torch.is_grad_enabled() and logits.requires_grad:
        _check_inplace(logits)
        losses = _InplaceTransducerLoss.apply(*arguments)
    else:
        with_uses = torch.is_grad_enabled() and logits.requires_grad
        losses = torch.ops.transducer_toolkit.transducer_loss(*arguments, with_uses)[0]
    return reduce_losses(losses, reduction)


class TransducerLoss(nn.Module):
    """Module form of :func:`transducer_loss`: options here, tensors in forward.

    Example:
        >>> criterion = TransducerLoss(blank=0, reduction="sum")
        >>> lengths = torch.tensor([2]), torch.tensor([1])
        >>> criterion(torch.zeros(1, 2, 2, 5), torch.tensor([[1]]), *lengths)
        tensor(4.1352)
    """

    def __init__(
        self,
        blank: int,
        from_log_softmax: bool = False,
        one_sym_per_frame: bool = False,
        reduction: str = "mean",
        *,
        fastemit_lambda: float = 0.0,
        delay_penalty: float = 0.0,
        clamp: float = 0.0,
        inplace: bool = False,
        validate: bool | None = None,
    ) -> None:
        super().__init__()
        check_reduction(reduction)
        _check_options(fastemit_lambda, delay_penalty, clamp)
        self.options: dict[str, Any] = {
            "blank": blank,
            "from_log_softmax": from_log_softmax,
            "one_sym_per_frame": one_sym_per_frame,
            "reduction": reduction,
            "fastemit_lambda": fastemit_lambda,
            "delay_penalty": delay_penalty,
            "clamp": clamp,
            "inplace": inplace,
            "validate": validate,
        }

    def forward(
        self, logits: Tensor, targets: Tensor, logit_lengths: Tensor, target_lengths: Tensor
    ) -> Tensor:
        return transducer_loss(logits, targets, logit_lengths, target_lengths, **self.options)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


def _check_arguments(
    logits: Tensor, targets: Tensor, logit_lengths: Tensor, target_lengths: Tensor, blank: int
) -> None:
    checks.check_tensor(logits, "logits")
    checks.check_dtype(logits, "logits", native.SUPPORTED_DTYPES)
    if logits.dim() not in (2, 4):
        raise ValueError(
            "logits: expected packed (sum_b T_b * (U_b + 1), V) or padded (B, T, U + 1, V), "
            f"got shape {tuple(logits.shape)}"
        )
    checks.check_targets_and_lengths(targets, logit_lengths, target_lengths, logits.device)
    if logits.dim() == 4:
        num_utterances, _, columns, _ = logits.shape
        if (num_utterances, columns) != (targets.size(0), targets.size(1) + 1):
            raise ValueError(
                f"logits: expected shape ({targets.size(0)}, T, {targets.size(1) + 1}, V), B and "
                f"U + 1 from targets {tuple(targets.shape)}, got {tuple(logits.shape)}"
            )
    checks.check_blank(blank, logits.size(-1))


def _check_options(fastemit_lambda: float, delay_penalty: float, clamp: float) -> None:
    for name, value in (("fastemit_lambda", fastemit_lambda), ("delay_penalty", delay_penalty)):
        if not 0 <= value < math.inf:
            raise ValueError(f"{name}: expected a finite number >= 0, got {value}")
    if clamp != clamp:  # NaN; torch.compile traces this, but not math.isnan
        raise ValueError("clamp: expected a number, got nan")


def _check_inplace(logits: Tensor) -> None:
    what = None
    if logits.is_leaf:
        what = "a leaf"
    elif logits._is_view():
        what = "a view (so is what nn.Linear makes of more than two dimensions: pack first)"
    elif not logits.is_contiguous():
        what = "a tensor that is not contiguous"
    if what is not None:
        raise ValueError(
            "inplace: expected logits that an operation has just made (contiguous, neither a leaf "
            f"nor a view), got {what}"
        )


# --- the operator -------------------------------------------------------------------------------


def _lattice_batch(
    logits: Tensor, targets: Tensor, logit_lengths: Tensor, target_lengths: Tensor
) -> native.LatticeBatch:
    padded = logits.dim() == 4
    return native.LatticeBatch(
        logit_lengths,
        target_lengths,
        targets,
        num_rows=logits.shape[:-1].numel(),
        # Bounded by the rows, so that no product of lengths nobody checked can overflow.
        max_frames=logits.size(1)
        if padded
        else min(max(int(logit_lengths.max()), 1), logits.size(0)),
        padded=padded,
        device=logits.device,
    )


def _validate(
    logits: Tensor,
    targets: Tensor,
    logit_lengths: Tensor,
    target_lengths: Tensor,
    blank: int,
    topology: str,
) -> None:
    padded = logits.dim() == 4
    checks.check_lengths_fit(
        logit_lengths,
        target_lengths,
        max_frames=logits.size(1 if padded else 0),
        max_targets=targets.size(1),
    )
    checks.check_feasible(logit_lengths, target_lengths, topology)
    checks.check_labels(targets, target_lengths, blank=blank, vocab_size=logits.size(-1))


def _forward(
    logits: Tensor,
    targets: Tensor,
    logit_lengths: Tensor,
    target_lengths: Tensor,
    blank: int,
    from_log_softmax: bool,
    topology: str,
    fastemit_lambda: float,
    delay_penalty: float,
    clamp: float,
    validate: bool,
    with_uses: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Stages 1 and 2: losses (B,), and what stage 3 needs per row (empty unless with_uses)."""
    if validate:
        _validate(logits, targets, logit_lengths, target_lengths, blank, topology)
    if logits.dim() == 2 and logit_lengths.device.type == target_lengths.device.type == "cpu":
        checks.check_packed_rows(logit_lengths, target_lengths, logits.size(0))
    batch = _lattice_batch(logits, targets, logit_lengths, target_lengths)
    normaliser, blank_score, label_score = native.cell_scores(
        logits, batch, blank=blank, from_log_softmax=from_log_softmax
    )
    losses, use_blank, use_label = native.lattice(
        blank_score,
        label_score,
        batch,
        topology=topology,
        delay_penalty=delay_penalty,
        fastemit_lambda=fastemit_lambda,
        with_uses=with_uses,
    )
    if not with_uses:
        normaliser = normaliser.new_empty(0)
    return losses.to(native.compute_dtype(logits.dtype)), normaliser, use_blank, use_label


_INPUTS = (
    "Tensor logits, Tensor targets, Tensor logit_lengths, Tensor target_lengths, int blank, "
    "bool from_log_softmax"
)

torch.library.custom_op(
    "transducer_toolkit::transducer_loss",
    _forward,
    mutates_args=(),
    schema=f"({_INPUTS}, str topology, float fastemit_lambda, float delay_penalty, float clamp, "
    "bool validate, bool with_uses) -> (Tensor, Tensor, Tensor, Tensor)",
)


@torch.library.register_fake("transducer_toolkit::transducer_loss")
def _forward_fake(logits, targets, logit_lengths, target_lengths, blank, *options):
    with_uses = options[-1]
    # Not Size.numel(): it would turn symbolic sizes into numbers, and each shape into a recompile.
    num_rows = math.prod(logits.shape[:-1]) if with_uses else 0
    losses = logits.new_empty(targets.size(0), dtype=native.compute_dtype(logits.dtype))
    return losses, *(logits.new_empty(num_rows, dtype=native.SCORE_DTYPE) for _ in range(3))


def _backward(
    logits: Tensor,
    targets: Tensor,
    logit_lengths: Tensor,
    target_lengths: Tensor,
    blank: int,
    from_log_softmax: bool,
    clamp: float,
    normaliser: Tensor,
    use_blank: Tensor,
    use_label: Tensor,
    loss_grad: Tensor,
) -> Tensor:
    """Stage 3: the gradient of the logits, in their layout."""
    batch = _lattice_batch(logits, targets, logit_lengths, target_lengths)
    return native.logits_grad(
        logits,
        batch,
        normaliser,
        use_blank,
        use_label,
        loss_grad,
        blank=blank,
        from_log_softmax=from_log_softmax,
        clamp=clamp,
    )


torch.library.custom_op(
    "transducer_toolkit::transducer_loss_backward",
    _backward,
    mutates_args=(),
    schema=f"({_INPUTS}, float clamp, Tensor normaliser, Tensor use_blank, Tensor use_label, "
    "Tensor loss_grad) -> Tensor",
)


@torch.library.register_fake("transducer_toolkit::transducer_loss_backward")
def _backward_fake(logits, *arguments):
    return torch.empty_like(logits)


def _setup_context(ctx, inputs, output):
    logits, targets, logit_lengths, target_lengths, blank, from_log_softmax = inputs[:6]
    ctx.clamp, ctx.with_uses = inputs[9], inputs[11]
    ctx.blank, ctx.from_log_softmax = blank, from_log_softmax
    ctx.save_for_backward(logits, targets, logit_lengths, target_lengths, *output[1:])


def _differentiate(ctx, loss_grad, *_):
    logits, targets, logit_lengths, target_lengths, *for_stage_3 = ctx.saved_tensors
    grad = torch.ops.transducer_toolkit.transducer_loss_backward(
        logits,
        targets,
        logit_lengths,
        target_lengths,
        ctx.blank,
        ctx.from_log_softmax,
        ctx.clamp,
        *for_stage_3,
        loss_grad,
    )
    return grad, *(None for _ in range(11))


torch.library.register_autograd(
    "transducer_toolkit::transducer_loss", _differentiate, setup_context=_setup_context
)


def _refuse_second_derivative(ctx, grad):
    raise RuntimeError(
        "transducer_loss: the gradient of the gradient (create_graph=True) is not implemented"
    )


torch.library.register_autograd(
    "transducer_toolkit::transducer_loss_backward", _refuse_second_derivative
)


class _InplaceTransducerLoss(torch.autograd.Function):
    """The same stages, backward writing over the logits (an operator may not do that)."""

    @staticmethod
    def forward(ctx, *arguments):
        losses, *for_stage_3 = _forward(*arguments, ctx.needs_input_grad[0])
        ctx.save_for_backward(*arguments[:4], *for_stage_3)
        ctx.blank, ctx.from_log_softmax, ctx.clamp = arguments[4], arguments[5], arguments[9]
        ctx.is_consumed = False
        return losses

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, loss_grad):
        # Autograd notices by itself if the logits were changed, our own first backward included,
        # but not under saved-tensor hooks.
        if ctx.is_consumed:
            raise RuntimeError(
                "transducer_loss: inplace=True allows one backward; the logits were overwritten "
                "with their gradient (modified by an inplace operation)"
            )
        ctx.is_consumed = True
        logits, targets, logit_lengths, target_lengths, *for_stage_3 = ctx.saved_tensors
        batch = _lattice_batch(logits, targets, logit_lengths, target_lengths)
        native.logits_grad(
            logits,
            batch,
            *for_stage_3,
            loss_grad,
            blank=ctx.blank,
            from_log_softmax=ctx.from_log_softmax,
            clamp=ctx.clamp,
            out=logits,
        )
        torch.autograd.graph.increment_version(logits)
        return logits, *(None for _ in range(10))
