# SPDX-License-Identifier: Apache-2.0
"""The exact transducer loss on packed or padded logits, through the compiled stages."""

from typing import Any

from torch import Tensor, nn

from transducer_toolkit.ops import checks, native
from transducer_toolkit.ops.checks import check_reduction, reduce_losses
from transducer_toolkit.ops.lattice import LatticeShape, check_shape
from transducer_toolkit.ops.logits_loss import logits_loss


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
    shape: LatticeShape | None = None,
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
        shape: the lattices, if the caller has them; must hold the same lengths. If it has been
            moved to the device of logits, nothing is copied there, and the loss and its gradient
            can be captured in a CUDA graph.
        validate: check lengths and labels. None: those that can be read without waiting for a
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
        >>> import torch
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
    checks.check_options(fastemit_lambda, delay_penalty, clamp)
    for name, flag in (
        ("from_log_softmax", from_log_softmax),
        ("one_sym_per_frame", one_sym_per_frame),
        ("inplace", inplace),
    ):
        checks.check_flag(flag, name)
    checks.check_validate(validate)
    check_shape(shape, targets.size(0))
    lengths = (logit_lengths, target_lengths) if shape is None else shape.lengths
    losses = logits_loss(
        logits,
        targets,
        *lengths,
        blank=blank,
        from_log_softmax=from_log_softmax,
        topology=topology,
        fastemit_lambda=fastemit_lambda,
        delay_penalty=delay_penalty,
        clamp=clamp,
        inplace=inplace,
        index=None if shape is None else shape.index(logits.device),
        validate=validate,
    ).losses
    return reduce_losses(losses, reduction)


class TransducerLoss(nn.Module):
    """Module form of :func:`transducer_loss`: options here, tensors in forward.

    Example:
        >>> import torch
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
        checks.check_options(fastemit_lambda, delay_penalty, clamp)
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
        self,
        logits: Tensor,
        targets: Tensor,
        logit_lengths: Tensor,
        target_lengths: Tensor,
        shape: LatticeShape | None = None,
    ) -> Tensor:
        lengths = logit_lengths, target_lengths
        return transducer_loss(logits, targets, *lengths, **self.options, shape=shape)

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
