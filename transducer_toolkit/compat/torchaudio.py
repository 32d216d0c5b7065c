# SPDX-License-Identifier: Apache-2.0
"""``torchaudio.functional.rnnt_loss`` and ``torchaudio.transforms.RNNTLoss``, argument by argument.

Change ``from torchaudio.functional import rnnt_loss`` to
``from transducer_toolkit.compat.torchaudio import rnnt_loss`` and nothing else. torchaudio itself
is not needed.
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
    """RNN-Transducer loss with the signature of torchaudio 2.x.

    Beyond torchaudio's: float64 and bfloat16 logits, int64 targets, logits wider than the longest
    utterance, backward twice, and errors instead of crashes for labels out of range.

    Args:
        logits: (B, T, U + 1, V) float16, bfloat16, float32 or float64.
        targets: (B, U) int32 or int64, zero padded.
        logit_lengths: (B,) int32 or int64.
        target_lengths: (B,) int32 or int64.
        blank: index of blank; negative counts from the end of the vocabulary.
        clamp: > 0 limits the gradient of the logits to [-clamp, clamp].
        reduction: "none", "mean" or "sum".
        fused_log_softmax: False if logits are log-probabilities already.

    Returns:
        (B,) for "none", otherwise a scalar; of the dtype of logits, as torchaudio's.

    Raises:
        As :func:`~transducer_toolkit.transducer_loss`.

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
    loss = transducer_loss(
        logits,
        targets,
        logit_lengths,
        target_lengths,
        blank + logits.size(-1) if blank < 0 else blank,
        from_log_softmax=not fused_log_softmax,
        reduction=reduction,
        clamp=clamp,
    )
    return loss.to(logits.dtype)


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
