# SPDX-License-Identifier: Apache-2.0
"""Every topology, normalization and restriction on a GPU, and its emulation, against float64."""

import pytest
import torch

from tests.backends import accelerated, of
from tests.losses.test_cuda_precision import (
    FRAMES,
    JOINT_NAMES,
    SYMBOLS,
    TOLERANCE,
    VOCAB_SIZE,
    WIDTH,
    check_all,
    loss_and_grads,
    on_backend,
)
from transducer_toolkit import (
    LatticeShape,
    fused_joiner_loss,
    multi_blank_loss,
    tdt_loss,
    transducer_loss,
)

BLANK = 20  # above the labels, below the columns of durations
PENALTIES = {"fastemit_lambda": 0.1, "delay_penalty": 0.2}
TDT = {"durations": (0, 1, 2, 4), "sigma": 0.05}
MULTI_BLANK = {"big_blank_durations": (2, 4), "sigma": 0.05}
RESTRICTED = {"left": 2, "right": 4}
HAT = {"normalization": "hat"}
# (loss of logits, its options, whether labels are tied to an alignment)
CASES = {
    "regular": (transducer_loss, PENALTIES, False),
    "modified": (transducer_loss, {"topology": "modified"}, False),
    "one_sym_per_frame": (transducer_loss, {"topology": "one_sym_per_frame"}, False),
    "hat": (transducer_loss, HAT, False),
    "restricted": (transducer_loss, PENALTIES, True),
    "restricted modified": (transducer_loss, {"topology": "modified"}, True),
    "tdt": (tdt_loss, {**TDT, **PENALTIES}, False),
    "tdt without 0": (tdt_loss, {"durations": (1, 2, 3)}, False),
    "tdt hat": (tdt_loss, {**TDT, **HAT}, False),
    "multi-blank": (multi_blank_loss, {**MULTI_BLANK, **PENALTIES}, False),
}
FUSED_ONLY = {
    "restricted tdt": (tdt_loss, {"durations": (0, 1, 2, 4)}, True),
    "restricted hat": (transducer_loss, HAT, True),
}
DTYPES = [torch.float64, torch.float32, torch.bfloat16]
TOLERANCES = {torch.float64: 1e-11, **TOLERANCE, torch.bfloat16: 2e-2}


def targets_and_alignment():
    """Labels below the big blanks, and frames that leave each label a choice."""
    targets = torch.randint(0, BLANK - 2, (len(SYMBOLS), max(SYMBOLS)))
    room = torch.tensor(FRAMES) / (torch.tensor(SYMBOLS) + 1)
    alignment = (room[:, None] * torch.arange(1, max(SYMBOLS) + 1)).long()
    return targets, alignment


def loss_options(case, device):
    """The loss of logits, targets and options, on a device."""
    loss_of, options, is_restricted = case
    targets, alignment = targets_and_alignment()
    if is_restricted:
        options = {**options, **RESTRICTED, "alignment": alignment}
    return loss_of, targets.to(device), options


def repeated(backend, run, inputs):
    """The losses and gradients; the same bits each time and in every order of threads."""
    results = []
    for order, seed in backend.orders[:3]:
        with backend.active(order, seed):
            there = [tensor.to(backend.device) for tensor in inputs]
            results.append([tensor.cpu() for tensor in loss_and_grads(run, there)])
    for result in results[1:]:
        assert all(torch.equal(*pair) for pair in zip(result, results[0], strict=True))
    return results[0]


@accelerated
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_loss_of_logits(name, dtype, packed, case):
    backend = of(name)
    shape = LatticeShape.from_lengths(FRAMES, SYMBOLS)
    padded = (2 * torch.randn(4, 25, 12, VOCAB_SIZE)).to(dtype)
    logits = shape.pack(padded) if packed else padded
    seed = torch.initial_seed()

    def run(logits):
        torch.manual_seed(seed)
        loss_of, targets, options = loss_options(CASES[case], logits.device)
        return loss_of(logits, targets, *shape.lengths, BLANK, reduction="none", **options)

    expected = loss_and_grads(run, [logits.double()])
    actual = repeated(backend, run, [logits])
    check_all(actual, expected, TOLERANCES[dtype], ("loss", "grad_logits"))


@accelerated
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tile_cells", [None, 100])
@pytest.mark.parametrize("case", [*CASES, *FUSED_ONLY])
def test_fused_joiner_loss(name, dtype, tile_cells, case):
    """All cells, so that float64 shows every digit."""
    backend = of(name)
    shape = LatticeShape.from_lengths(FRAMES, SYMBOLS)
    sizes = (4, 25, WIDTH), (4, 12, WIDTH), (VOCAB_SIZE, WIDTH), (VOCAB_SIZE,)
    inputs = [(0.7 * torch.randn(size)).to(dtype) for size in sizes]
    seed = torch.initial_seed()

    def run(*leaves):
        torch.manual_seed(seed)
        device = leaves[0].device
        _, targets, options = loss_options({**CASES, **FUSED_ONLY}[case], device)
        return fused_joiner_loss(
            *leaves, targets, *shape.lengths, BLANK,
            reduction="none", tile_cells=tile_cells, dropped_mass=0.0, **options,
        )  # fmt: skip

    expected = loss_and_grads(run, [tensor.double() for tensor in inputs])
    actual = repeated(backend, run, inputs)
    check_all(actual, expected, TOLERANCES[dtype], JOINT_NAMES)


@accelerated
@pytest.mark.parametrize("case", ["hat", "tdt", "multi-blank", "restricted"])
def test_coarse_pass(name, case, coarse_pass):
    backend = of(name)
    shape = LatticeShape.from_lengths(FRAMES, SYMBOLS)
    sizes = (4, 25, WIDTH), (4, 12, WIDTH), (VOCAB_SIZE, WIDTH), (VOCAB_SIZE,)
    inputs = [2 * torch.randn(size) for size in sizes]
    seed = torch.initial_seed()

    def run(*leaves):
        torch.manual_seed(seed)
        _, targets, options = loss_options(CASES[case], leaves[0].device)
        losses, parts = fused_joiner_loss(
            *leaves, targets, *shape.lengths, BLANK,
            reduction="none", return_parts=True, **options,
        )  # fmt: skip
        used.append(parts)
        return losses

    used = []
    expected = loss_and_grads(run, [tensor.double() for tensor in inputs])
    used.clear()
    actual = on_backend(backend, run, inputs)
    assert used[0].low > 0  # the coarse pass ran
    check_all(actual, expected, 2e-5, JOINT_NAMES)
