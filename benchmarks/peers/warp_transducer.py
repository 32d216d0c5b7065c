# SPDX-License-Identifier: Apache-2.0
"""warp-transducer (warprnnt_pytorch): padded logits, int32 indices."""

from benchmarks.jobs import Implementation, LossOfLogits, int32_indices, unpruned
from benchmarks.workloads import Workload


def make_loss(workload: Workload) -> LossOfLogits:
    from warprnnt_pytorch import RNNTLoss

    indices = int32_indices(workload)
    loss = RNNTLoss(blank=0, reduction="none")  # takes log_softmax itself where the CPU needs it
    return lambda logits: loss(logits, *indices)


IMPLEMENTATIONS = [
    Implementation(
        "warp-transducer",
        project="warp-transducer",
        module="warprnnt_pytorch",
        needs=("RNNTLoss",),
        distribution="warprnnt_pytorch",
        jobs=unpruned(make_loss, packed=False),
    )
]
