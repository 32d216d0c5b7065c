# SPDX-License-Identifier: Apache-2.0
"""fast_rnnt and k2, which share their functions: padded logits, int64 symbols and boundary."""

import importlib

from benchmarks.jobs import Implementation, Job, LossOfLogits, boundary_of, pruned_job, unpruned
from benchmarks.workloads import Workload

PRUNED_FUNCTIONS = (
    "rnnt_loss_smoothed",
    "get_rnnt_prune_ranges",
    "do_rnnt_pruning",
    "rnnt_loss_pruned",
)


def adapter(project: str) -> Implementation:
    def make_loss(workload: Workload) -> LossOfLogits:
        rnnt_loss = importlib.import_module(project).rnnt_loss
        symbols, boundary = workload.targets(), boundary_of(workload)
        return lambda logits: rnnt_loss(logits, symbols, 0, boundary=boundary, reduction="none")

    def make_pruned(workload: Workload) -> Job:
        return pruned_job(workload, importlib.import_module(project))

    return Implementation(
        project,
        project=project,
        module=project,
        needs=("rnnt_loss", *PRUNED_FUNCTIONS),
        distribution=project,
        jobs={**unpruned(make_loss, packed=False), "pruned": make_pruned},
    )


IMPLEMENTATIONS = [adapter("fast_rnnt"), adapter("k2")]
