# SPDX-License-Identifier: Apache-2.0
import inspect

import pytest
import torch

from tests.losses.helpers import ragged_batch
from transducer_toolkit.compat import torchaudio as ours

torchaudio = pytest.importorskip("torchaudio", exc_type=ImportError)


def arguments(**options):
    batch = ragged_batch([6, 4], [3, 2], 7, dtype=torch.float32, blank=6, padding=0.0)
    targets = batch.targets.clamp(max=5)
    tensors = batch.logits, *(x.int() for x in (targets, batch.logit_lengths, batch.target_lengths))
    return tensors


def test_signatures_are_identical():
    theirs = inspect.signature(torchaudio.functional.rnnt_loss).parameters
    mine = inspect.signature(ours.rnnt_loss).parameters
    assert [(p.name, p.default) for p in mine.values()] == [
        (p.name, p.default) for p in theirs.values()
    ]
    theirs = inspect.signature(torchaudio.transforms.RNNTLoss).parameters
    mine = inspect.signature(ours.RNNTLoss).parameters
    assert [(p.name, p.default) for p in mine.values()] == [
        (p.name, p.default) for p in theirs.values()
    ]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"blank": 6},
        {"blank": -1, "clamp": 0.05},
        {"reduction": "sum"},
        {"reduction": "none"},
        {"fused_log_softmax": False},
    ],
)
def test_equals_torchaudio(options):
    logits, *indices = arguments()
    if not options.get("fused_log_softmax", True):
        logits = logits.detach().log_softmax(-1).requires_grad_()
    results = []
    for loss_of in (
        torchaudio.functional.rnnt_loss,
        ours.rnnt_loss,
        lambda *tensors, **options: ours.RNNTLoss(**options)(*tensors),
    ):
        loss = loss_of(logits, *indices, **options)
        results.append((loss, *torch.autograd.grad((3 * loss).sum(), logits)))
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bit_logits_give_float32_losses(dtype, reduction):
    logits, *indices = arguments()
    logits = logits.detach().to(dtype).requires_grad_()
    loss = ours.rnnt_loss(logits, *indices, reduction=reduction)
    exact = ours.rnnt_loss(logits.double(), *indices, reduction=reduction)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), exact, rtol=1e-6, atol=0)
    assert torch.autograd.grad(loss.sum(), logits)[0].dtype == dtype
    if dtype == torch.float16:  # torchaudio takes no bfloat16, and rounds each loss to float16
        theirs = torchaudio.functional.rnnt_loss(logits, *indices, reduction=reduction)
        torch.testing.assert_close(loss, theirs.float(), rtol=2e-3, atol=0)


def test_the_sum_of_float16_losses_does_not_overflow():
    logits, *indices = arguments()
    many = logits.detach().half().repeat(5000, 1, 1, 1)
    indices = [x.repeat(5000, *(1,) * (x.dim() - 1)) for x in indices]
    assert torchaudio.functional.rnnt_loss(many, *indices, reduction="sum").isinf()
    total = ours.rnnt_loss(many, *indices, reduction="sum")
    one = ours.rnnt_loss(logits.detach().half(), *(x[:2] for x in indices), reduction="sum")
    torch.testing.assert_close(total, 5000 * one, rtol=1e-4, atol=0)


def test_float64_logits_give_float64_losses():
    logits, *indices = arguments()
    assert ours.RNNTLoss()(logits.double(), *indices).dtype == torch.float64


def test_wrong_rank():
    logits, *indices = arguments()
    with pytest.raises(ValueError, match=r"logits: expected shape \(B, T, U \+ 1, V\)"):
        ours.rnnt_loss(logits.flatten(0, 2), *indices)
