# SPDX-License-Identifier: Apache-2.0
"""Losses whose arcs advance several frames: token-and-duration and multi-blank transducers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from transducer_toolkit.losses.packed import check_logits
from transducer_toolkit.ops import checks
from transducer_toolkit.ops.lattice import LatticeShape, check_shape
from transducer_toolkit.ops.logits_loss import LogitsInputs, logits_loss
from transducer_toolkit.ops.options import LossOptions
from transducer_toolkit.ops.topology import multi_blank_topology, tdt_topology


def tdt_loss(
    logits: Tensor,
    targets: Tensor,
    logit_lengths: Tensor,
    target_lengths: Tensor,
    blank: int,
    durations: Sequence[int],
    *,
    sigma: float = 0.0,
    normalization: str = "softmax",
    reduction: str = "mean",
    fastemit_lambda: float = 0.0,
    delay_penalty: float = 0.0,
    clamp: float = 0.0,
    inplace: bool = False,
    shape: LatticeShape | None = None,
    validate: bool | None = None,
) -> Tensor:
    """Computes the loss of a token-and-duration transducer (TDT).

    Every cell predicts a token, and independently of it a duration: the number of frames by which
    the path advances. So blanks and labels may skip frames. From cell (t, u) lead

    - a blank with a duration d >= 1 to (t + d, u), where t + d <= T_b, and t + d = T_b only if
      u = U_b, which is the end of the path;
    - a label with any duration d to (t + d, u + 1), where t + d < T_b.

    The score of an arc is ``log_softmax(token logits)[token] - sigma + log_softmax(duration
    logits)[d]``.

    Args:
        logits: joiner outputs, float16, bfloat16, float32 or float64; packed
            ``(sum_b T_b * (U_b + 1), V + K)`` or padded ``(B, T, U + 1, V + K)``. The last K
            columns are the logits of the durations, the others those of the tokens, blank included.
        targets: (B, U) int32 or int64 labels in [0, V) other than blank, on the device of logits.
            Padding may hold any value.
        logit_lengths: (B,) int32 or int64, the number of frames T_b >= 1 of each utterance,
            preferably on the CPU.
        target_lengths: (B,) int32 or int64, the number of labels U_b >= 0 of each utterance,
            preferably on the CPU.
        blank: index of the blank token in [0, V).
        durations: the K durations in frames, distinct integers of at least 0 in ascending order,
            one of them at least 1; for example ``(0, 1, 2, 3, 4)``.
        sigma: >= 0; is subtracted from the log-probability of every token, so that paths with
            fewer tokens, and so with longer durations, become more probable (logit
            under-normalization).
        normalization: "softmax" or "hat", as in :func:`~transducer_toolkit.transducer_loss`; of the
            tokens.
        reduction: "none" (B,), "mean" over utterances, or "sum".
        fastemit_lambda: as in :func:`~transducer_toolkit.transducer_loss`.
        delay_penalty: as in :func:`~transducer_toolkit.transducer_loss`; t is the frame where a
            label begins.
        clamp: as in :func:`~transducer_toolkit.transducer_loss`; for token and duration logits.
        inplace: as in :func:`~transducer_toolkit.transducer_loss`.
        shape: as in :func:`~transducer_toolkit.transducer_loss`.
        validate: as in :func:`~transducer_toolkit.transducer_loss`.

    Returns:
        The loss in nats, float64 for float64 logits and float32 otherwise. It is +inf, with a zero
        gradient, for an utterance without a path. Non-finite logits are treated as in
        :func:`~transducer_toolkit.transducer_loss`.

    Raises:
        TypeError: not a tensor, or a wrong dtype.
        ValueError: sizes, devices, blank, durations, options, lengths or labels that do not fit;
            an utterance whose frames no sequence of durations fills.
        RuntimeError: no stage for this device in this build; a second derivative.

    Example:
        >>> import torch
        >>> logits = torch.zeros(1, 3, 2, 4 + 3, dtype=torch.float64)
        >>> one = torch.tensor([1])
        >>> loss = tdt_loss(
        ...     logits, torch.tensor([[0]]), 3 * one, one, blank=3, durations=(0, 1, 2), sigma=0.05
        ... )
        >>> round(loss.item(), 6)
        4.155739

    Source:
        H. Xu et al., "Efficient Sequence Transduction by Jointly Predicting Tokens and Durations",
        2023, arXiv:2304.06795.
    """
    options = LossOptions(
        blank=blank,
        topology=_tdt(durations),
        sigma=sigma,
        normalization=normalization,
        fastemit_lambda=fastemit_lambda,
        delay_penalty=delay_penalty,
        clamp=clamp,
        validate=validate,
    )
    tensors = logits, targets, logit_lengths, target_lengths
    return _loss(tensors, options, reduction=reduction, inplace=inplace, shape=shape)


def multi_blank_loss(
    logits: Tensor,
    targets: Tensor,
    logit_lengths: Tensor,
    target_lengths: Tensor,
    blank: int,
    big_blank_durations: Sequence[int],
    *,
    sigma: float = 0.0,
    reduction: str = "mean",
    fastemit_lambda: float = 0.0,
    delay_penalty: float = 0.0,
    clamp: float = 0.0,
    inplace: bool = False,
    shape: LatticeShape | None = None,
    validate: bool | None = None,
) -> Tensor:
    """Computes the loss of a multi-blank transducer.

    Beside the blank, which advances one frame, there are big blanks, which advance several. Big
    blank i is symbol ``blank - 1 - i``, from the end of the vocabulary if that is negative. It
    leads from cell (t, u) to (t + d, u), where d is ``big_blank_durations[i]``. A label stays on
    its frame. A path ends with any blank that leads from (T_b - d, U_b) to T_b.

    Args:
        logits: joiner outputs, float16, bfloat16, float32 or float64; packed
            ``(sum_b T_b * (U_b + 1), V)`` or padded ``(B, T, U + 1, V)``. The big blanks are among
            the V symbols.
        targets: (B, U) int32 or int64 labels in [0, V) other than the blanks. Padding may hold any
            value.
        logit_lengths: (B,) int32 or int64, the number of frames T_b >= 1 of each utterance.
        target_lengths: (B,) int32 or int64, the number of labels U_b >= 0 of each utterance.
        blank: index of the blank in [0, V).
        big_blank_durations: the frames that each big blank advances, distinct integers of at least
            2; for example ``(2, 4, 8)``.
        sigma: >= 0; is subtracted from the log-probability of every symbol, so that longer blanks
            become more probable (logit under-normalization).
        reduction: "none" (B,), "mean" over utterances, or "sum".
        fastemit_lambda: as in :func:`~transducer_toolkit.transducer_loss`.
        delay_penalty: as in :func:`~transducer_toolkit.transducer_loss`.
        clamp: as in :func:`~transducer_toolkit.transducer_loss`.
        inplace: as in :func:`~transducer_toolkit.transducer_loss`.
        shape: as in :func:`~transducer_toolkit.transducer_loss`.
        validate: as in :func:`~transducer_toolkit.transducer_loss`.

    Returns:
        The loss in nats, as :func:`tdt_loss` returns it.

    Raises:
        TypeError: not a tensor, or a wrong dtype.
        ValueError: sizes, devices, blank, durations, options, lengths or labels that do not fit.
        RuntimeError: no stage for this device in this build; a second derivative.

    Example:
        >>> import torch
        >>> logits = torch.zeros(1, 2, 1, 4)
        >>> two, none = torch.tensor([2]), torch.tensor([0])
        >>> loss = multi_blank_loss(
        ...     logits, torch.zeros(1, 0, dtype=torch.int64), two, none, 3, big_blank_durations=(2,)
        ... )
        >>> round(loss.exp().item(), 4)  # one blank of 2 frames, or two of 1: 1/4 + 1/16
        3.2

    Source:
        H. Xu et al., "Multi-blank Transducers for Speech Recognition", 2022, arXiv:2211.03541.
    """
    options = LossOptions(
        blank=blank,
        topology=_multi_blank(big_blank_durations),
        sigma=sigma,
        fastemit_lambda=fastemit_lambda,
        delay_penalty=delay_penalty,
        clamp=clamp,
        validate=validate,
    )
    tensors = logits, targets, logit_lengths, target_lengths
    return _loss(tensors, options, reduction=reduction, inplace=inplace, shape=shape)


class _DurationLoss(nn.Module):
    """Options in the constructor, tensors in forward."""

    def __init__(self, loss: Any, blank: int, durations: Sequence[int], options: Any) -> None:
        super().__init__()
        self._loss = loss
        self.blank, self.durations = blank, tuple(durations)
        self.options: dict[str, Any] = options

    def forward(
        self,
        logits: Tensor,
        targets: Tensor,
        logit_lengths: Tensor,
        target_lengths: Tensor,
        shape: LatticeShape | None = None,
    ) -> Tensor:
        tensors = logits, targets, logit_lengths, target_lengths
        loss: Tensor = self._loss(*tensors, self.blank, self.durations, **self.options, shape=shape)
        return loss

    def extra_repr(self) -> str:
        options = {"blank": self.blank, "durations": self.durations, **self.options}
        return ", ".join(f"{name}={value!r}" for name, value in options.items())


class TDTLoss(_DurationLoss):
    """Module form of :func:`tdt_loss`: options here, tensors in forward.

    Example:
        >>> import torch
        >>> criterion = TDTLoss(blank=3, durations=(0, 1, 2), sigma=0.05)
        >>> one = torch.tensor([1])
        >>> criterion(torch.zeros(1, 3, 2, 4 + 3), torch.tensor([[0]]), 3 * one, one)
        tensor(4.1557)
    """

    def __init__(
        self,
        blank: int,
        durations: Sequence[int],
        *,
        sigma: float = 0.0,
        normalization: str = "softmax",
        reduction: str = "mean",
        fastemit_lambda: float = 0.0,
        delay_penalty: float = 0.0,
        clamp: float = 0.0,
        inplace: bool = False,
        validate: bool | None = None,
    ) -> None:
        checks.check_reduction(reduction)
        options: dict[str, Any] = {
            "sigma": sigma,
            "normalization": normalization,
            "reduction": reduction,
            "fastemit_lambda": fastemit_lambda,
            "delay_penalty": delay_penalty,
            "clamp": clamp,
            "inplace": inplace,
            "validate": validate,
        }
        LossOptions.check(options | {"blank": blank, "topology": _tdt(durations)})
        super().__init__(tdt_loss, blank, durations, options)


class MultiBlankLoss(_DurationLoss):
    """Module form of :func:`multi_blank_loss`: options here, tensors in forward.

    Example:
        >>> import torch
        >>> criterion = MultiBlankLoss(blank=3, big_blank_durations=(2,))
        >>> lengths = torch.tensor([2]), torch.tensor([1])
        >>> criterion(torch.zeros(1, 2, 2, 4), torch.tensor([[0]]), *lengths)  # 1/16 + 2/64
        tensor(2.3671)
    """

    def __init__(
        self,
        blank: int,
        big_blank_durations: Sequence[int],
        *,
        sigma: float = 0.0,
        reduction: str = "mean",
        fastemit_lambda: float = 0.0,
        delay_penalty: float = 0.0,
        clamp: float = 0.0,
        inplace: bool = False,
        validate: bool | None = None,
    ) -> None:
        checks.check_reduction(reduction)
        options: dict[str, Any] = {
            "sigma": sigma,
            "reduction": reduction,
            "fastemit_lambda": fastemit_lambda,
            "delay_penalty": delay_penalty,
            "clamp": clamp,
            "inplace": inplace,
            "validate": validate,
        }
        LossOptions.check(options | {"blank": blank, "topology": _multi_blank(big_blank_durations)})
        super().__init__(multi_blank_loss, blank, big_blank_durations, options)


def _tdt(durations: Sequence[int]) -> str:
    checks.check_ints(durations, "durations")
    return tdt_topology(durations).name


def _multi_blank(big_blank_durations: Sequence[int]) -> str:
    checks.check_ints(big_blank_durations, "big_blank_durations")
    return multi_blank_topology(big_blank_durations).name


def _loss(
    tensors: tuple[Tensor, Tensor, Tensor, Tensor],
    options: LossOptions,
    *,
    reduction: str,
    inplace: bool,
    shape: LatticeShape | None,
) -> Tensor:
    logits, targets, logit_lengths, target_lengths = tensors
    checks.check_reduction(reduction)
    checks.check_flag(inplace, "inplace")
    check_logits(*tensors, options)
    check_shape(shape, logit_lengths, target_lengths)
    lengths = (logit_lengths, target_lengths) if shape is None else shape.lengths
    index = None if shape is None else shape.index(logits.device)
    inputs = LogitsInputs(logits, targets, *lengths, shape_index=index)
    return checks.reduce_losses(logits_loss(inputs, options, inplace=inplace).losses, reduction)
