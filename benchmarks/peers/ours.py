# SPDX-License-Identifier: Apache-2.0
"""transducer_toolkit: packed, in place, tiled logits, fused, pruned; greedy and beam search."""

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks import tdt
from benchmarks.decode import MAX_SYMBOLS_PER_FRAME, SearchInputs, decode_job
from benchmarks.jobs import (
    Implementation,
    Job,
    LogitsOfInputs,
    LossOfLogits,
    Outcome,
    pruned_job,
    step_job,
    step_job_of,
    unpruned,
)
from benchmarks.peers.k2_names import PRUNED_FUNCTIONS
from benchmarks.workloads import BEAM, Workload


def make_loss(workload: Workload, *, inplace: bool) -> LossOfLogits:
    from transducer_toolkit import transducer_loss

    shape, targets = workload.shape, workload.targets()
    indices = targets, shape.logit_lengths, shape.target_lengths
    return lambda logits: transducer_loss(
        logits, *indices, blank=0, reduction="none", inplace=inplace
    )


def make_logits(workload: Workload) -> LogitsOfInputs:
    from transducer_toolkit import join

    shape = workload.shape
    return lambda enc, pred, weight, bias: functional.linear(join(enc, pred, shape), weight, bias)


def make_tiled_logits(workload: Workload) -> LogitsOfInputs:
    from transducer_toolkit import joiner_logits

    shape = workload.shape
    return lambda enc, pred, weight, bias: joiner_logits(enc, pred, weight, bias, shape)


def tiled_step(workload: Workload) -> Job:
    return step_job(workload, make_tiled_logits(workload), make_loss(workload, inplace=True))


def fused_step(workload: Workload, precision: str = "auto") -> Job:
    from transducer_toolkit import fused_joiner_loss

    shape, targets = workload.shape, workload.targets()
    indices = targets, shape.logit_lengths, shape.target_lengths
    inputs = [tensor.requires_grad_() for tensor in workload.joiner_inputs()]

    def run(_: None) -> Outcome:
        losses: Tensor = fused_joiner_loss(
            *inputs, *indices, 0, reduction="none", precision=precision
        )
        return losses.detach(), torch.autograd.grad(losses.sum(), inputs)

    return Job(run)


def packed_tdt(workload: Workload) -> Job:
    from transducer_toolkit import join, tdt_loss

    shape, targets = workload.shape, workload.targets()
    indices = targets, shape.logit_lengths, shape.target_lengths
    return tdt.step_job(
        workload,
        lambda enc, pred, weight, bias: functional.linear(
            join(enc, pred, shape, activation="relu"), weight, bias
        ),
        lambda logits: tdt_loss(
            logits, *indices, 0, tdt.DURATIONS, sigma=tdt.SIGMA, reduction="none", inplace=True
        ),
    )


def fused_tdt(workload: Workload, precision: str = "auto") -> Job:
    from transducer_toolkit import fused_joiner_loss

    shape, targets = workload.shape, workload.targets()
    indices = targets, shape.logit_lengths, shape.target_lengths

    def losses_of(*inputs: Tensor) -> Tensor:
        losses: Tensor = fused_joiner_loss(
            *inputs,
            *indices,
            0,
            reduction="none",
            precision=precision,
            **tdt.OPTIONS,
        )
        return losses

    return step_job_of(tdt.joiner_inputs(workload), losses_of)


def make_pruned(workload: Workload) -> Job:
    import transducer_toolkit

    return pruned_job(workload, transducer_toolkit)


def make_fused_pruned(workload: Workload) -> Job:
    import transducer_toolkit

    return pruned_job(workload, transducer_toolkit, transducer_toolkit.fused_joiner_loss)


def greedy(inputs: SearchInputs) -> list[list[int]]:
    from transducer_toolkit.decoding import greedy_search

    found = greedy_search(*inputs, max_symbols_per_frame=MAX_SYMBOLS_PER_FRAME)
    return [hypothesis.tokens for hypothesis in found]


def make_beam(workload: Workload, topology: str) -> Job:
    from transducer_toolkit import decoding

    def search(inputs: SearchInputs) -> list[list[int]]:
        predictor, joiner, *encoded = inputs
        options = {"beam": BEAM, "max_symbols_per_frame": MAX_SYMBOLS_PER_FRAME}
        found = decoding.BeamSearch(predictor, joiner, topology=topology, **options)(*encoded)
        return [hypothesis.tokens for hypothesis in found]

    return decode_job(workload, search)


def _entry(
    name: str, needs: tuple[str, ...], module: str = "transducer_toolkit", **jobs: object
) -> Implementation:
    return Implementation(
        f"ours: {name}",
        project="ours",
        module=module,
        needs=needs,
        distribution="transducer_toolkit",
        jobs=jobs,  # type: ignore[arg-type]
    )


IMPLEMENTATIONS = [
    _entry(
        "packed",
        ("transducer_loss", "join"),
        **unpruned(
            lambda workload: make_loss(workload, inplace=False),
            packed=True,
            make_logits=make_logits,
        ),
    ),
    _entry(
        "packed, inplace",
        ("transducer_loss", "join"),
        **unpruned(
            lambda workload: make_loss(workload, inplace=True),
            packed=True,
            overwrites=True,
            make_logits=make_logits,
        ),
    ),
    _entry("tiled logits, inplace", ("transducer_loss", "joiner_logits"), step=tiled_step),
    _entry("fused", ("fused_joiner_loss",), step=fused_step),
    _entry(
        "fused, full precision",
        ("fused_joiner_loss",),
        step=lambda workload: fused_step(workload, precision="full"),
    ),
    _entry("TDT, packed, inplace", ("tdt_loss", "join"), tdt=packed_tdt),
    _entry("TDT, fused", ("fused_joiner_loss", "tdt_loss"), tdt=fused_tdt),
    _entry(
        "TDT, fused, full precision",
        ("fused_joiner_loss", "tdt_loss"),
        tdt=lambda workload: fused_tdt(workload, precision="full"),
    ),
    _entry("pruned", PRUNED_FUNCTIONS, pruned=make_pruned),
    _entry("fused, pruned", (*PRUNED_FUNCTIONS, "fused_joiner_loss"), pruned=make_fused_pruned),
    _entry(
        "greedy, batched",
        ("greedy_search",),
        module="transducer_toolkit.decoding",
        decode=lambda workload: decode_job(workload, greedy),
    ),
    *(
        _entry(
            f"beam {BEAM}, {topology}, batched",
            ("BeamSearch",),
            module="transducer_toolkit.decoding",
            decode=lambda workload, topology=topology: make_beam(workload, topology),
        )
        for topology in ("regular", "modified")
    ),
]
