# SPDX-License-Identifier: Apache-2.0
"""A training step of NeMo, SpeechBrain and ESPnet, with their losses and with our adapters.

    python -m benchmarks.frameworks lengths.npy  # 4 utterances of 200 frames and 40 labels
    python -m benchmarks.run --suite step --extra benchmarks.frameworks --peers nemo torchaudio \\
        --shapes lengths.npy --frames 800 --vocab-size 1024 --joiner-dim 640 --clock cpu

Run it in an environment with the project. If a project is not installed, its row says so. The
projections of the joint networks are identities, because the inputs of the suite are projected
already. PyPI has no CPU loss for SpeechBrain 1.1 and ESPnet, so their rows take torchaudio's loss,
which SpeechBrain 1.0 calls, too.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.jobs import Implementation, Job, Outcome, int32_indices, unpruned
from benchmarks.workloads import Workload

LENGTHS = [(200, 40)] * 8  # a batch begins in the middle of a corpus


def step(workload: Workload, make: Callable[[Workload], Any], *, blank_is_last: bool) -> Job:
    """Returns the job that computes the losses and the gradients of enc, pred, weight and bias.

    Args:
        workload: sizes and inputs.
        make: returns the output layer of a project, and a function that computes the losses from
            enc and pred with this layer.
        blank_is_last: the project's blank is the last symbol, so the rows of its layer are rolled.
    """
    enc, pred, weight, bias = workload.joiner_inputs()
    shift = -1 if blank_is_last else 0
    head, losses_of = make(workload)
    with torch.no_grad():
        head.weight.copy_(weight.roll(shift, 0))
        head.bias.copy_(bias.roll(shift, 0))
    inputs = enc.requires_grad_(), pred.requires_grad_(), head.weight, head.bias

    def run(_: None) -> Outcome:
        losses = losses_of(enc, pred)
        gradients = torch.autograd.grad(losses.sum(), inputs)
        rolled = [gradient.roll(-shift, 0) for gradient in gradients[2:]]
        return losses.detach(), (*gradients[:2], *rolled)

    return Job(run)


def nemo(workload: Workload, *, fused: bool) -> tuple[nn.Linear, Callable[..., Tensor]]:
    from nemo.collections.asr.losses.rnnt import RNNTLoss
    from nemo.collections.asr.modules import RNNTJoint

    from transducer_toolkit.compat.nemo import use_fused_loss

    blank, width = workload.vocab_size - 1, workload.joiner_dim
    sizes = {"encoder_hidden": width, "pred_hidden": width, "joint_hidden": width}
    model = nn.Module()
    model.joint = RNNTJoint({**sizes, "activation": "tanh"}, num_classes=blank)
    model.joint.enc, model.joint.pred = nn.Identity(), nn.Identity()
    model.loss = RNNTLoss(blank, reduction=None)
    if fused:
        use_fused_loss(model)
    targets, frames, labels = int32_indices(workload)
    targets = (targets - 1).clamp(min=0)

    def losses_of(enc: Tensor, pred: Tensor) -> Tensor:
        inputs = {
            "encoder_outputs": enc.transpose(1, 2),
            "decoder_outputs": pred.transpose(1, 2),
        }
        if fused:
            lengths = {"encoder_lengths": frames, "transcript_lengths": labels}
            return model.joint(**inputs, transcripts=targets, **lengths)[0]
        logits = model.joint(**inputs)
        lengths = {"input_lengths": frames, "target_lengths": labels}
        return model.loss(log_probs=logits, targets=targets, **lengths)

    return model.joint.joint_net[-1], losses_of


def speechbrain(workload: Workload, *, fused: bool) -> tuple[nn.Linear, Callable[..., Tensor]]:
    from speechbrain.nnet.linear import Linear
    from speechbrain.nnet.transducer.transducer_joint import Transducer_joint

    from transducer_toolkit.compat import speechbrain as ours

    loss_of = torchaudio_loss(workload)
    if fused:
        Linear, Transducer_joint = ours.Linear, ours.Transducer_joint
        criterion, indices = ours.TransducerLoss(0, "none"), int32_indices(workload)

        def loss_of(logits: Any) -> Tensor:
            return criterion(logits, *indices)

    joint = Transducer_joint(joint="sum", nonlinearity=nn.Tanh)
    output = Linear(n_neurons=workload.vocab_size, input_size=workload.joiner_dim)
    return output.w, lambda enc, pred: loss_of(output(joint(enc[:, :, None], pred[:, None])))


def espnet(workload: Workload, *, fused: bool) -> tuple[nn.Linear, Callable[..., Tensor]]:
    from espnet2.asr_transducer.joint_network import JointNetwork

    from transducer_toolkit.compat.espnet import use_fused_loss

    width = workload.joiner_dim
    model = nn.Module()
    model.joint_network = joint = JointNetwork(workload.vocab_size, width, width, width)
    joint.lin_enc, joint.lin_dec = nn.Identity(), nn.Identity()
    loss_of = torchaudio_loss(workload)
    if fused:
        use_fused_loss(model)
        indices = int32_indices(workload)

        def loss_of(logits: Any) -> Tensor:
            return logits.loss(*indices, 0, reduction="none")

    return joint.lin_out, lambda enc, pred: loss_of(joint(enc[:, :, None], pred[:, None]))


def own_loss(workload: Workload) -> Callable[[Tensor], Tensor]:
    """Returns the loss with torchaudio's signature, a function of padded logits."""
    from transducer_toolkit.compat.torchaudio import rnnt_loss

    indices = int32_indices(workload)
    return lambda logits: rnnt_loss(logits, *indices, blank=0, reduction="none")


def torchaudio_loss(workload: Workload) -> Callable[..., Tensor]:
    from torchaudio.functional import rnnt_loss

    indices = int32_indices(workload)
    return lambda logits: rnnt_loss(logits, *indices, blank=0, reduction="none")


def pair(
    name: str, make: Callable[..., Any], module: str, distribution: str, theirs: str
) -> list[Implementation]:
    """Returns two rows of a project: with its own loss and with the adapter."""

    def job(workload: Workload, fused: bool) -> Job:
        return step(
            workload,
            lambda workload: make(workload, fused=fused),
            blank_is_last=make is nemo,
        )

    return [
        Implementation(
            f"{name}: {'ours, fused' if fused else theirs}",
            project=make.__name__,
            module=module,
            distribution=distribution,
            jobs={"step": lambda workload, fused=fused: job(workload, fused)},
        )
        for fused in (False, True)
    ]


IMPLEMENTATIONS = [
    Implementation(
        "ours: torchaudio's signature",
        project="ours",
        module="transducer_toolkit",
        distribution="transducer_toolkit",
        jobs=unpruned(own_loss, packed=False),
    ),
    *pair("NeMo", nemo, "nemo.collections.asr", "nemo-toolkit", "its loss"),
    *pair("SpeechBrain", speechbrain, "speechbrain", "speechbrain", "torchaudio's loss"),
    *pair("ESPnet", espnet, "espnet2.asr_transducer", "espnet", "torchaudio's loss"),
]


if __name__ == "__main__":
    np.save(sys.argv[1], np.array(LENGTHS))
