# SPDX-License-Identifier: Apache-2.0
"""Replacements for ``torchaudio.functional.rnnt_loss`` and ``torchaudio.transforms.RNNTLoss``.

They have the same signatures. Replace ``from torchaudio.functional import rnnt_loss`` by
``from transducer_toolkit.compat.torchaudio import rnnt_loss``; torchaudio need not be installed.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from transducer_toolkit.losses.packed import transducer_loss
from transducer_toolkit.ops.checks import check_flag, check_int, check_tensor


def rnnt_loss(
    logits: Tensor,
    targets: Tensor,
    logit_lengths: Tensor,
    target_lengths: Tensor,
    blank: int = -1,
    clamp: float = -1,
    reduction: str = "mean",
    fused_log_softmax: bool = True,
) -> Tensor:
    """Computes the transducer loss with the signature of torchaudio 2.x.

    Unlike torchaudio's function, it accepts float64 and bfloat16 logits, int64 targets, and logits
    that are longer than the longest utterance. Backward may run twice. A label out of range raises
    an error instead of crashing the process.

    The logits and their gradient take as much memory as with torchaudio's function.
    :func:`~transducer_toolkit.fused_joiner_loss` computes the same loss without them.

    Args:
        logits: (B, T, U + 1, V) float16, bfloat16, float32 or float64.
        targets: (B, U) int32 or int64. Padding may hold any value.
        logit_lengths: (B,) int32 or int64, number of frames of each utterance.
        target_lengths: (B,) int32 or int64, number of labels of each utterance.
        blank: index of blank. A negative index counts from the end of the vocabulary.
        clamp: if positive, the gradient of the logits is limited to [-clamp, clamp].
        reduction: "none", "mean" over utterances, or "sum".
        fused_log_softmax: False if logits are log-probabilities already.

    Returns:
        The loss in nats, (B,) for "none" and a scalar otherwise; float64 for float64 logits, else
        float32. torchaudio rounds the loss of float16 logits to float16, whose sums overflow at
        65504.

    Raises:
        TypeError, ValueError, RuntimeError: as in :func:`~transducer_toolkit.transducer_loss`.

    Example:
        >>> one = torch.tensor([1], dtype=torch.int32)
        >>> rnnt_loss(torch.zeros(1, 1, 2, 4), torch.tensor([[2]], dtype=torch.int32), one, one)
        tensor(2.7726)
    """
    check_tensor(logits, "logits")
    check_int(blank, "blank")
    check_flag(fused_log_softmax, "fused_log_softmax")
    if logits.dim() != 4:
        raise ValueError(f"logits: expected shape (B, T, U + 1, V), got {tuple(logits.shape)}")
    return transducer_loss(
        logits,
        targets,
        logit_lengths,
        target_lengths,
        blank + logits.size(-1) if blank < 0 else blank,
        from_log_softmax=not fused_log_softmax,
        reduction=reduction,
        clamp=clamp,
    )


class RNNTLoss(nn.Module):
    """Module form with the signature of ``torchaudio.transforms.RNNTLoss``; see :func:`rnnt_loss`.

    Example:
        >>> one = torch.tensor([1])
        >>> RNNTLoss(reduction="sum")(torch.zeros(1, 1, 2, 4), torch.tensor([[2]]), one, one)
        tensor(2.7726)
    """

    def __init__(
        self,
        blank: int = -1,
        clamp: float = -1.0,
        reduction: str = "mean",
        fused_log_softmax: bool = True,
    ) -> None:
        super().__init__()
        self.options: dict[str, Any] = {
            "blank": blank,
            "clamp": clamp,
            "reduction": reduction,
            "fused_log_softmax": fused_log_softmax,
        }

    def forward(
        self, logits: Tensor, targets: Tensor, logit_lengths: Tensor, target_lengths: Tensor
    ) -> Tensor:
        return rnnt_loss(logits, targets, logit_lengths, target_lengths, **self.options)
