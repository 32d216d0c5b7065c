# SPDX-License-Identifier: Apache-2.0
"""optimized_transducer: packed logits, which its forward overwrites with their gradient."""

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.jobs import Implementation, LogitsOfInputs, LossOfLogits, int32_indices, unpruned
from benchmarks.workloads import Workload


def make_loss(workload: Workload) -> LossOfLogits:
    from optimized_transducer import transducer_loss

    indices = int32_indices(workload)
    return lambda logits: transducer_loss(
        logits, *indices, blank=0, from_log_softmax=False, reduction="sum"
    )


def make_logits(workload: Workload) -> LogitsOfInputs:
    """The packing that its README shows."""
    lengths = list(zip(workload.frames, workload.symbols, strict=True))

    def logits_of(enc: Tensor, pred: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        sums = [
            (enc[b, :frames, None] + pred[b, None, : symbols + 1]).reshape(-1, enc.size(2))
            for b, (frames, symbols) in enumerate(lengths)
        ]
        hidden = torch.cat(sums).tanh_()
        del sums
        return functional.linear(hidden, weight, bias)

    return logits_of


IMPLEMENTATIONS = [
    Implementation(
        "optimized_transducer",
        project="optimized_transducer",
        module="optimized_transducer",
        needs=("transducer_loss",),
        distribution="optimized_transducer",
        jobs=unpruned(make_loss, packed=True, overwrites=True, make_logits=make_logits),
    )
]
