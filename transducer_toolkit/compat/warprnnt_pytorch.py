# SPDX-License-Identifier: Apache-2.0
"""Replacements for ``warprnnt_pytorch``, the PyTorch binding of warp-transducer.

Replace ``from warprnnt_pytorch import RNNTLoss`` by
``from transducer_toolkit.compat.warprnnt_pytorch import RNNTLoss``. Libraries that import
warprnnt_pytorch themselves, such as ESPnet, find this module after::

    import sys
    from transducer_toolkit.compat import warprnnt_pytorch
    sys.modules["warprnnt_pytorch"] = warprnnt_pytorch
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from transducer_toolkit.compat.common import JointInputs
from transducer_toolkit.losses.durations import MultiBlankLoss
from transducer_toolkit.losses.packed import TransducerLoss
from transducer_toolkit.ops import checks


def rnnt_loss(
    acts: Tensor,
    labels: Tensor,
    act_lens: Tensor,
    label_lens: Tensor,
    blank: int = 0,
    reduction: str = "mean",
    fastemit_lambda: float = 0.0,
) -> Tensor:
    """Computes the transducer loss with the signature of warprnnt_pytorch.

    Args:
        acts: (B, T, U + 1, V) logits, normalized or not.
        labels: (B, U) int32 or int64.
        act_lens: (B,) number of frames.
        label_lens: (B,) number of labels.
        blank: index of blank.
        reduction: "none", "mean" over utterances, or "sum".
        fastemit_lambda: as in :func:`~transducer_toolkit.transducer_loss`. The forks of
            warp-transducer that have it also multiply the reported loss by ``1 + lambda``.

    Returns:
        The loss in nats, (B,) for "none" and a scalar otherwise, where warprnnt_pytorch returns a
        tensor of shape (1,).

    Example:
        >>> one = torch.tensor([1])
        >>> rnnt_loss(torch.zeros(1, 1, 2, 4), torch.tensor([[2]]), one, one)
        tensor(2.7726)
    """
    return RNNTLoss(blank, reduction, fastemit_lambda)(acts, labels, act_lens, label_lens)


class RNNTLoss(nn.Module):
    """Module form of :func:`rnnt_loss`: options here, tensors in forward.

    Args:
        blank: index of blank.
        reduction: as in :func:`rnnt_loss`.
        fastemit_lambda: as in :func:`rnnt_loss`.
        big_blank_durations: of a multi-blank transducer, as in
            :func:`~transducer_toolkit.multi_blank_loss`.
        sigma: as in :func:`~transducer_toolkit.multi_blank_loss`.

    Example:
        >>> one = torch.tensor([1])
        >>> RNNTLoss(reduction="sum")(torch.zeros(1, 1, 2, 4), torch.tensor([[2]]), one, one)
        tensor(2.7726)
    """

    def __init__(
        self,
        blank: int = 0,
        reduction: str = "mean",
        fastemit_lambda: float = 0.0,
        *,
        big_blank_durations: Sequence[int] = (),
        sigma: float = 0.0,
    ) -> None:
        super().__init__()
        self.blank = blank
        self.options: dict[str, Any] = {"reduction": reduction, "fastemit_lambda": fastemit_lambda}
        self.loss: nn.Module
        if big_blank_durations:
            self.options |= {"big_blank_durations": tuple(big_blank_durations), "sigma": sigma}
            self.loss = MultiBlankLoss(blank, **self.options)
        else:
            self.loss = TransducerLoss(blank, **self.options)
        self.fused_options: dict[str, Any] = {}

    def forward(
        self, acts: Tensor | JointInputs, labels: Tensor, act_lens: Tensor, label_lens: Tensor
    ) -> Tensor:
        lengths = act_lens, label_lens
        if isinstance(acts, JointInputs):
            return acts.loss(labels, *lengths, self.blank, **self.options, **self.fused_options)
        checks.check_tensor(acts, "acts")
        if acts.dim() != 4:
            raise ValueError(f"acts: expected shape (B, T, U + 1, V), got {tuple(acts.shape)}")
        loss: Tensor = self.loss(acts, labels, *lengths)
        return loss
