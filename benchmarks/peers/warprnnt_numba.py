# SPDX-License-Identifier: Apache-2.0
"""warprnnt_numba: padded logits, int32 indices; on the CPU its recursion is a loop in Python."""

import numpy

from benchmarks.jobs import Implementation, LossOfLogits, int32_indices, unpruned
from benchmarks.workloads import Workload


def make_loss(workload: Workload) -> LossOfLogits:
    if not hasattr(numpy, "row_stack"):  # numba's CUDA target names it; numpy 2.5 dropped it
        numpy.row_stack = numpy.vstack
    from warprnnt_numba import RNNTLossNumba

    indices = int32_indices(workload)
    # reduction="none" would multiply the gradient by ones in a pass of its own.
    loss = RNNTLossNumba(blank=0, reduction="sum")
    return lambda logits: loss(logits, *indices)


IMPLEMENTATIONS = [
    Implementation(
        "warprnnt_numba",
        project="warprnnt_numba",
        module="warprnnt_numba",
        needs=("RNNTLossNumba",),
        distribution="warprnnt_numba",
        jobs=unpruned(make_loss, packed=False),
    )
]
