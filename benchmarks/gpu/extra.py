# SPDX-License-Identifier: Apache-2.0
"""Rows of benchmark.py alone: our loss on padded logits, and a pruned step in plain torch."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor

from benchmarks.jobs import Implementation, Job, LossOfLogits, boundary_of, pruned_job, unpruned
from benchmarks.workloads import Workload


def make_full(workload: Workload) -> LossOfLogits:
    from transducer_toolkit import rnnt_loss

    symbols, boundary = workload.targets(), boundary_of(workload).cpu()
    return lambda logits: rnnt_loss(logits, symbols, 0, boundary=boundary, reduction="none")


def smoothed_loss(
    lm: Tensor,
    am: Tensor,
    symbols: Tensor,
    termination_symbol: int,
    lm_only_scale: float,
    am_only_scale: float,
    boundary: Tensor,
    reduction: str,
    return_grad: bool,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """k2's smoothed loss by torch's operators around the recursion; without an am-only part."""
    from transducer_toolkit import mutual_information_recursion

    assert am_only_scale == 0 and reduction == "none" and return_grad
    lm, am = lm.float(), am.float()
    tops = lm.amax(-1, keepdim=True), am.amax(-1, keepdim=True)
    with torch.autocast(am.device.type, enabled=False):
        product = torch.bmm((lm - tops[0]).exp(), (am - tops[1]).exp().transpose(1, 2))
    tiny = torch.finfo(product.dtype).tiny
    normaliser = (product + tiny).log() + tops[0] + tops[1].transpose(1, 2)  # (B, S + 1, T)
    lm_normaliser = lm.logsumexp(-1, keepdim=True)  # (B, S + 1, 1)
    lm_label = lm[:, :-1].gather(2, symbols[:, :, None])  # (B, S, 1)
    am_label = am.gather(2, symbols[:, None].expand(-1, am.size(1), -1)).transpose(1, 2)
    lm_blank, am_blank = lm[:, :, termination_symbol, None], am[:, None, :, termination_symbol]
    both, alone = 1 - lm_only_scale, lm_only_scale
    px = both * (lm_label + am_label - normaliser[:, :-1])
    px = px + alone * (lm_label - lm_normaliser[:, :-1])
    py = both * (lm_blank + am_blank - normaliser) + alone * (lm_blank - lm_normaliser)
    # No symbol after an utterance's last frame.
    frames = torch.arange(am.size(1) + 1, device=am.device)
    is_behind = frames == boundary[:, 3, None, None]
    px = torch.nn.functional.pad(px, (0, 1)).masked_fill(is_behind, float("-inf"))
    scores, grads = mutual_information_recursion(px, py, boundary, return_grad=True)
    return -scores, grads


def band_loss(
    logits: Tensor,
    symbols: Tensor,
    ranges: Tensor,
    termination_symbol: int,
    boundary: Tensor,
    reduction: str,
) -> Tensor:
    """k2's pruned loss: scores of the band by torch's operators, scattered to the full grid."""
    from transducer_toolkit import get_rnnt_logprobs_pruned, mutual_information_recursion

    assert reduction == "none"
    px, py = get_rnnt_logprobs_pruned(logits.float(), symbols, ranges, termination_symbol, boundary)
    return -mutual_information_recursion(px, py, boundary)


def make_plain_pruned(workload: Workload) -> Job:
    """The steps of k2 in plain torch; the recursion alone is ours, which stands for k2's kernel."""
    from transducer_toolkit import do_rnnt_pruning, get_rnnt_prune_ranges

    api = SimpleNamespace(
        rnnt_loss_smoothed=smoothed_loss,
        get_rnnt_prune_ranges=get_rnnt_prune_ranges,
        do_rnnt_pruning=do_rnnt_pruning,
        rnnt_loss_pruned=band_loss,
    )
    return pruned_job(workload, api)  # type: ignore[arg-type]


IMPLEMENTATIONS = [
    Implementation(
        "ours: full",
        project="ours",
        module="transducer_toolkit",
        needs=("rnnt_loss",),
        distribution="transducer_toolkit",
        jobs=unpruned(make_full, packed=False),
    ),
    Implementation(
        "plain torch (k2's steps)",
        project="ours",
        module="transducer_toolkit",
        needs=("mutual_information_recursion", "get_rnnt_logprobs_pruned"),
        distribution="transducer_toolkit",
        jobs={"pruned": make_plain_pruned},
    ),
]
