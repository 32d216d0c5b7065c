# SPDX-License-Identifier: Apache-2.0
"""The loss stage of an alignment-restricted transducer."""

from __future__ import annotations

from typing import Any

from transducer_toolkit.ops.checks import check_at_least
from transducer_toolkit.training.stages.base import LossInput
from transducer_toolkit.training.stages.fused import FusedLoss


class RestrictedLoss(FusedLoss):
    """Computes :func:`~transducer_toolkit.fused_joiner_loss` of the paths near an alignment.

    In training, a label aligned to frame a is emitted on the frames ``a - left`` to ``a + right``.
    The loss in validation is that of :class:`FusedLoss`, over all paths, and needs no alignment.

    Args:
        left: encoder frames that a label may be emitted before its frame in the alignment.
        right: encoder frames that a label may be emitted behind its frame in the alignment.
        **options: as of :class:`FusedLoss`.

    Example:
        >>> import torch
        >>> from transducer_toolkit import Joiner, LatticeShape
        >>> shape = LatticeShape.from_lengths([4, 3], [2, 1])
        >>> targets = torch.tensor([[1, 4], [2, -1]])
        >>> encoder_out, predictor_out = torch.randn(2, 4, 8), torch.randn(2, 3, 6)
        >>> batch = LossInput(Joiner(8, 6, 16, 5), encoder_out, predictor_out, targets, shape)
        >>> near = batch._replace(alignment=torch.tensor([[0, 2], [1, 0]]))
        >>> stage = RestrictedLoss(left=0, right=1)
        >>> bool((stage(near).losses >= stage.eval()(batch).losses).all())
        True

    Source:
        J. Mahadeokar et al., "Alignment Restricted Streaming Recurrent Neural Network Transducer",
        2020.
    """

    def __init__(self, *, left: int, right: int, **options: Any) -> None:
        super().__init__(**options)
        check_at_least(0, left=left, right=right)
        self.left = left
        self.right = right

    def restriction(self, batch: LossInput) -> dict[str, Any]:
        if not self.training:
            return {}
        if batch.alignment is None:
            raise ValueError(
                "alignment: expected the frames of the labels for RestrictedLoss "
                "(loss=restricted), got None: set data.alignment_dir=DIR, a folder that "
                "transducer-align --checkpoint CHECKPOINT --manifest MANIFEST --format json "
                "--output-dir DIR writes; data=lhotse has no alignments"
            )
        return {"alignment": batch.alignment, "left": self.left, "right": self.right}
