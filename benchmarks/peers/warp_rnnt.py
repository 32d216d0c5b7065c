# SPDX-License-Identifier: Apache-2.0
"""warp_rnnt: CUDA only; padded log-probabilities, int32 indices.

`gather=True` is what its README advises: the loss then reads two scores a cell.
"""

from benchmarks.jobs import Implementation, LossOfLogits, int32_indices, unpruned
from benchmarks.workloads import Workload


def make_loss(workload: Workload) -> LossOfLogits:
    from warp_rnnt import rnnt_loss

    indices = int32_indices(workload)
    return lambda logits: rnnt_loss(
        logits.log_softmax(-1), *indices, reduction="none", blank=0, gather=True
    )


IMPLEMENTATIONS = [
    Implementation(
        "warp_rnnt",
        project="warp_rnnt",
        module="warp_rnnt",
        needs=("rnnt_loss",),
        distribution="warp_rnnt",
        jobs=unpruned(make_loss, packed=False),
    )
]
