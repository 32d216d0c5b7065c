# SPDX-License-Identifier: Apache-2.0
"""transformers: its TDT loss, and a training step of its Parakeet with its own or our loss.

In the training step, the whole model runs forward and backward, and AdamW takes a step of learning
rate zero, so that every run starts from the same weights.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks import tdt
from benchmarks.jobs import Implementation, Job, LossOfLogits, Outcome, int32_indices
from benchmarks.workloads import Workload

# 25 million parameters, fewer than those of the published models, so that a CPU can measure it.
SMALL_ENCODER = {
    "hidden_size": 256,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "intermediate_size": 1024,
    "subsampling_conv_channels": 64,
}
# 600 million parameters, as the published models of that name have: for a GPU.
PUBLISHED_ENCODER = {
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 8,
    "intermediate_size": 4096,
    "subsampling_conv_channels": 256,
}
WITHOUT_CHANCE = {
    "layerdrop": 0.0,
    "dropout": 0.0,
    "activation_dropout": 0.0,
    "attention_dropout": 0.0,
    "initializer_range": 0.1,
}
SUBSAMPLING = 8


def make_step(workload: Workload, kind: str, *, fused: bool) -> Job:
    import transformers

    from transducer_toolkit.compat.transformers import use_fused_loss

    torch.manual_seed(workload.seed)
    blank = workload.vocab_size - 1
    options = {"durations": list(tdt.DURATIONS)} if kind == "TDT" else {}
    encoder = PUBLISHED_ENCODER if workload.device == "cuda" else SMALL_ENCODER
    config = getattr(transformers, f"Parakeet{kind}Config")(
        vocab_size=workload.vocab_size,
        decoder_hidden_size=workload.joiner_dim,
        blank_token_id=blank,
        pad_token_id=blank,
        encoder_config={**encoder, **WITHOUT_CHANCE},
        **options,
    )
    with torch.device(workload.device):  # random numbers for all weights take seconds on a CPU
        model = getattr(transformers, f"ParakeetFor{kind}")(config)
    if fused:
        use_fused_loss(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    inputs = step_inputs(workload, blank)

    def run(_: None) -> Outcome:
        optimizer.zero_grad()
        losses = model(**inputs, reduction="none").loss
        losses.sum().backward()
        optimizer.step()
        head = model.joint.head
        projections = model.encoder_projector.weight, model.decoder.decoder_projector.weight
        gradients = [p.grad for p in (head.weight, head.bias, *projections)]
        return losses.detach(), tuple(grad.clone() for grad in gradients if grad is not None)

    return Job(run)


def step_inputs(workload: Workload, blank: int) -> dict[str, Any]:
    """Random features of as many frames as make the workload's encoder frames."""
    frames = [SUBSAMPLING * (num_frames - 1) + 1 for num_frames in workload.frames]
    generator = torch.Generator().manual_seed(workload.seed)
    features = torch.randn(len(frames), max(frames), 80, generator=generator)
    mask = torch.arange(max(frames)) < torch.tensor(frames)[:, None]
    labels = workload.targets().cpu() - 1  # the workload's blank is 0
    columns = torch.arange(labels.size(1))
    labels = labels.where(columns < torch.tensor(workload.symbols)[:, None], blank)
    start = torch.full((len(frames), 1), blank)
    inputs = {
        "input_features": features,
        "attention_mask": mask.long(),
        "labels": labels,
        "decoder_input_ids": torch.cat((start, labels), 1),
    }
    return {name: tensor.to(workload.device) for name, tensor in inputs.items()}


def make_tdt_loss(workload: Workload) -> LossOfLogits:
    from transformers.loss.loss_tdt import tdt_loss

    targets, *lengths = (tensor.long() for tensor in int32_indices(workload))
    durations = list(tdt.DURATIONS)

    def loss(logits: Tensor) -> Tensor:
        tokens, of_durations = logits.tensor_split([workload.vocab_size], -1)
        return tdt_loss(
            tokens, of_durations, targets, *lengths, 0, durations, tdt.SIGMA, reduction="none"
        )

    return loss


def _entry(name: str, project: str, *, fused: bool) -> Implementation:
    return Implementation(
        name,
        project=project,
        module="transformers",
        needs=("ParakeetForRNNT", "ParakeetForTDT"),
        distribution="transformers",
        jobs={
            "parakeet": lambda workload: make_step(workload, "RNNT", fused=fused),
            "parakeet_tdt": lambda workload: make_step(workload, "TDT", fused=fused),
        },
    )


IMPLEMENTATIONS = [
    Implementation(
        "transformers: tdt_loss",
        project="transformers",
        module="transformers.loss.loss_tdt",
        needs=("tdt_loss",),
        distribution="transformers",
        jobs={
            "tdt": lambda workload: tdt.step_job(
                workload, tdt.padded_logits, make_tdt_loss(workload)
            )
        },
    ),
    _entry("transformers: Parakeet", "transformers", fused=False),
    _entry("ours: Parakeet, fused loss", "ours", fused=True),
]
