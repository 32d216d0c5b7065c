# SPDX-License-Identifier: Apache-2.0
"""fused_joiner_loss of TDT and multi-blank transducers: against logits, in two precisions."""

import itertools

import pytest
import torch

from tests.losses.test_durations import TDT, grad_of, topology_of
from tests.losses.test_fused_joiner import Case, check_same
from transducer_toolkit import FusedJoinerLoss, fused_joiner_loss, tdt_loss
from transducer_toolkit.losses.reference import reference_duration_loss
from transducer_toolkit.ops import joint_tiles
from transducer_toolkit.ops.fused_joiner import FusedInputs, FusedPlan, operator
from transducer_toolkit.ops.logits_loss import LogitsInputs, logits_loss
from transducer_toolkit.ops.options import FusedOptions, LossOptions

pytestmark = pytest.mark.usefixtures("stages")

MULTI_BLANK = {"big_blank_durations": (4, 2)}
KINDS = [TDT, {"durations": (1, 2, 3)}, MULTI_BLANK]


class DurationCase(Case):
    """Labels 0 to 3, symbol 4 without use, big blanks 5 and 6, blank 7, then durations."""

    def __init__(self, kind, frames=(9, 5, 14), symbols=(3, 0, 5), **options):
        self.kind = kind
        columns = 8 + len(kind.get("durations", ()))
        super().__init__(list(frames), list(symbols), vocab_size=columns, blank=7, **options)
        self.targets.clamp_(max=3)

    def unfused(self, **options):
        return super().unfused(topology=topology_of(self.kind).name, **options)

    def fused(self, **options):
        return super().fused(**self.kind, **options)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("band", [0, 3])
@pytest.mark.parametrize("tile_cells", [None, 5])
@pytest.mark.parametrize("keeps_logits", [True, False])
def test_float64_equals_unfused(kind, band, tile_cells, keeps_logits, monkeypatch):
    if not keeps_logits:
        monkeypatch.setattr(joint_tiles, "KEPT_LOGITS_BYTES", {})
    case = DurationCase(kind, band=band)
    options = {"sigma": 0.1, "fastemit_lambda": 0.3, "delay_penalty": 0.1}
    for more in ({}, {"clamp": 0.05}):
        actual = case.fused(tile_cells=tile_cells, **options, **more)
        check_same(case, actual, case.unfused(**options, **more), 1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_a_band_leaves_out_the_paths_outside(kind):
    case = DurationCase(kind, band=3)
    num_frames, columns = case.enc.size(1), case.pred.size(1)
    logits = torch.randn(3, num_frames, columns, case.weight.size(0), dtype=torch.float64)
    banded = logits.gather(2, case.ranges[..., None].expand(-1, -1, -1, logits.size(3)))
    banded.requires_grad_()
    indices = case.targets, *case.lengths
    actual = logits_loss(
        LogitsInputs(banded, *indices, ranges=case.ranges),
        LossOptions(case.blank, topology_of(kind).name, validate=False),
    ).losses
    exists = torch.zeros(3, num_frames, columns, dtype=torch.bool)
    exists.scatter_(2, case.ranges, True)
    masked = logits.clone()
    masked[..., 4][~exists] = 1e9  # a symbol that is neither label nor blank takes everything
    masked.requires_grad_()
    expected = reference_duration_loss(masked, *indices, case.blank, **kind, reduction="none")
    torch.testing.assert_close(actual, expected)
    finite = expected.isfinite()
    assert finite.sum() >= 2
    wanted = grad_of(expected[finite], masked)
    found = torch.zeros_like(wanted).scatter_(
        2, case.ranges[..., None].expand_as(banded), grad_of(actual, banded)
    )
    for b, (frames, symbols) in enumerate(zip(*case.lengths, strict=True)):
        inside = slice(0, int(frames)), slice(0, int(symbols) + 1)
        torch.testing.assert_close(found[b][inside], wanted[b][inside], atol=1e-10, rtol=0)


def relative_errors(case, **options):
    """Relative errors of loss and gradients in float32 against float64."""
    results = []
    for dtype in (torch.float32, torch.float64):
        leaves = [p.detach().to(dtype).requires_grad_() for p in case.parameters]
        settings = {"reduction": "none", "ranges": case.ranges, **case.kind, **options}
        if dtype == torch.float64:
            settings["dropped_mass"] = 0.0
        loss = fused_joiner_loss(*leaves, case.targets, *case.lengths, case.blank, **settings)
        results.append([loss.detach(), *torch.autograd.grad(loss.sum(), leaves)])
    return [float((a.double() - b).norm() / b.norm()) for a, b in zip(*results, strict=True)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale, band", [(0.3, 0), (1.0, 0), (4.0, 0), (1.0, 4)])
def test_coarse_pass_stays_within_the_budget(kind, scale, band, coarse_pass):
    case = DurationCase(
        kind, (60, 35, 1, 48), (20, 9, 0, 14), scale=scale, band=band, width=24, dtype=torch.float32
    )
    options = {"sigma": 0.05}
    assert max(relative_errors(case, **options)) < 1e-5
    loss, parts = fused_joiner_loss(
        *case.parameters, case.targets, *case.lengths, case.blank, ranges=case.ranges,
        return_parts=True, **case.kind, **options,
    )  # fmt: skip
    assert 0 < parts.full <= parts.selected <= 1 and parts.kept <= 1 and loss.isfinite()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("multiple", [1, 8])
def test_every_dtype_with_a_padded_vocabulary(kind, dtype, multiple, monkeypatch):
    monkeypatch.setattr(joint_tiles, "VOCAB_MULTIPLE", {"cpu": multiple})
    case = DurationCase(kind, width=8)
    leaves = [p.detach().to(dtype).requires_grad_() for p in case.parameters]
    same = [p.detach().double().requires_grad_() for p in leaves]
    results = []
    for parameters in (leaves, same):
        loss = fused_joiner_loss(
            *parameters, case.targets, *case.lengths, case.blank, reduction="none", **kind
        )
        results.append([loss, *torch.autograd.grad(loss.sum(), parameters)])
    for actual, expected in zip(*results, strict=True):
        assert actual.shape == expected.shape
        error = (actual.double() - expected).norm() / expected.norm()
        assert error < 20 * torch.finfo(dtype).eps


@pytest.mark.parametrize("kind", KINDS)
def test_bad_values_spoil_their_utterance_only(kind, coarse_pass):
    case = DurationCase(kind, dtype=torch.float32)
    losses = case.fused()
    case.enc.data[1, 2, 0] = torch.nan
    spoilt = case.fused()
    assert spoilt[1].isnan() and not spoilt[[0, 2]].isnan().any()
    torch.testing.assert_close(spoilt[[0, 2]], losses[[0, 2]])
    kept = (spoilt * torch.tensor([1.0, 0.0, 1.0])).nan_to_num(0.0)
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(kept.sum(), case.parameters))


def test_an_impossible_duration(coarse_pass):
    case = DurationCase(TDT, dtype=torch.float32)
    case.bias.data[-1] = -torch.inf
    fewer = {"durations": TDT["durations"][:-1]}
    leaves = [case.enc, case.pred, case.weight[:-1], case.bias[:-1]]
    expected = fused_joiner_loss(
        *leaves, case.targets, *case.lengths, case.blank, reduction="none", **fewer
    )
    torch.testing.assert_close(case.fused(), expected)
    assert all(torch.isfinite(g).all() for g in torch.autograd.grad(case.fused().sum(), leaves[:2]))


def test_module_form_and_the_loss_of_logits():
    case = DurationCase(TDT)
    criterion = FusedJoinerLoss(blank=7, durations=TDT["durations"], sigma=0.05, activation="relu")
    actual = criterion(*case.parameters, case.targets, *case.lengths)
    hidden = torch.relu(case.enc[:, :, None] + case.pred[:, None])
    logits = hidden @ case.weight.t() + case.bias
    expected = tdt_loss(logits, case.targets, *case.lengths, 7, TDT["durations"], sigma=0.05)
    torch.testing.assert_close(actual, expected)
    assert "durations=(0, 1, 2, 4)" in repr(criterion)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("is_coarse", [False, True])
def test_opcheck(kind, is_coarse):
    case = DurationCase(kind, dtype=torch.float32)
    inputs = FusedInputs(*case.parameters, case.targets, *case.lengths)
    plan = FusedPlan(case.shape.num_cells, keep_logits=True, with_uses=True, is_coarse=is_coarse)
    options = FusedOptions(case.blank, topology_of(kind).name)
    arguments = operator.flat(inputs, options, plan)
    torch.library.opcheck(
        torch.ops.transducer_toolkit.fused_joiner_loss,
        tuple(arguments),
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"durations": (0, 1), "big_blank_durations": (2,)},
            "topology: expected 'regular' with big",
        ),
        ({"durations": (0, 1), "topology": "modified"}, "topology: expected 'regular'"),
        ({"sigma": 0.1}, "sigma: expected 0 without durations"),
        ({"durations": tuple(range(9))}, "blank: expected 0 <= blank < 3"),
    ],
)
def test_bad_options(options, message):
    case = DurationCase(TDT)
    joint = case.parameters
    with pytest.raises(ValueError, match=message):
        fused_joiner_loss(*joint, case.targets, *case.lengths, case.blank, **options)


def test_kinds_do_not_mix():
    """Every kind gives another loss on the same numbers: no option is ignored."""
    case = DurationCase(TDT)
    losses = [
        fused_joiner_loss(*case.parameters, case.targets, *case.lengths, 7, **kind).item()
        for kind in ({}, TDT, MULTI_BLANK, {**TDT, "sigma": 0.1})
    ]
    assert all(abs(a - b) > 1e-3 for a, b in itertools.combinations(losses, 2))
