# SPDX-License-Identifier: Apache-2.0
"""torchaudio: int32 indices, padded logits of which every frame is used."""

from benchmarks.jobs import Implementation, LossOfLogits, int32_indices, unpruned
from benchmarks.workloads import Workload


def make_loss(workload: Workload) -> LossOfLogits:
    from torchaudio.functional import rnnt_loss

    indices = int32_indices(workload)
    return lambda logits: rnnt_loss(logits, *indices, blank=0, reduction="none")


IMPLEMENTATIONS = [
    Implementation(
        "torchaudio",
        project="torchaudio",
        module="torchaudio.functional",
        needs=("rnnt_loss",),
        distribution="torchaudio",
        jobs=unpruned(make_loss, packed=False),
    )
]
