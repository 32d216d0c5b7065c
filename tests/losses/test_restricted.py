# SPDX-License-Identifier: Apache-2.0
"""Losses whose labels must be emitted near their frames in an alignment."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.losses.helpers import ragged_batch, zero_padding
from tests.losses.test_fused_joiner import Case, check_same
from transducer_toolkit import (
    FusedJoinerLoss,
    LatticeShape,
    TransducerLoss,
    fused_joiner_loss,
    transducer_loss,
)
from transducer_toolkit.losses import reference
from transducer_toolkit.ops import joint_tiles, native, stages
from transducer_toolkit.ops.restriction import Restriction
from transducer_toolkit.ops.topology import TOPOLOGIES, get_topology

DURATIONS = ("tdt-0-1-3", "tdt-1-2", "tdt-2-3", "multi_blank-2-4")
ALL = (*TOPOLOGIES, *DURATIONS)
PLAIN = {**dict.fromkeys(TOPOLOGIES, 6), **dict.fromkeys(DURATIONS, 9)}  # columns of logits
both_backends = pytest.mark.usefixtures("stages")


def restricted_batch(topology, frames=(6, 1, 5, 7), symbols=(3, 0, 2, 3), **options):
    """A batch of labels 1 to 3 and an alignment with garbage in its padding."""
    columns, blank = PLAIN[topology], 0 if topology in TOPOLOGIES else 4
    batch = ragged_batch(list(frames), list(symbols), columns, blank=blank, **options)
    if topology.startswith("multi_blank"):
        batch.blank = blank = 8
    beyond = torch.arange(max(symbols)) >= batch.target_lengths[:, None]
    batch.targets = torch.randint(1, 4, batch.targets.shape).masked_fill(beyond, 10**8)
    if topology.startswith("tdt"):  # the durations behind the symbols
        batch.logits = batch.logits[..., : 6 + get_topology(topology).num_durations]
    step = max(1, get_topology(topology).label_durations[0])
    alignment = torch.zeros_like(batch.targets)
    for b, (count, labels) in enumerate(zip(frames, symbols, strict=True)):
        room = max(0, count - 1 - step * labels)
        offsets = torch.randint(0, room + 1, (labels,)).sort().values
        alignment[b, :labels] = offsets + step * torch.arange(labels)
    return batch, alignment.masked_fill(beyond, -(2**62))


def allowed_paths(paths, frames, left, right):
    """The paths, lists of (kind, t, u, ...), that emit each label near its frame."""
    for path in paths:
        labels = [(arc[1], frames[arc[2]]) for arc in path if arc[0] == "label"]
        if all(frame - left <= t <= frame + right for t, frame in labels):
            yield path


def enumerated(batch, logits, alignment, left, right, topology, delay_penalty=0.0):
    """Losses (B,) by the sum over all allowed paths."""
    name = "lattice_paths" if topology in TOPOLOGIES else "duration_paths"
    every_path, losses = getattr(reference, name), []
    for b, (count, labels) in enumerate(zip(*batch.shape.lengths, strict=True)):
        frames = alignment[b].tolist()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                reference,
                name,
                lambda *size, frames=frames: allowed_paths(every_path(*size), frames, left, right),
            )
            if topology in TOPOLOGIES:
                log_probs = logits[b, :count, : labels + 1].log_softmax(-1)
                arguments = batch.targets[b, :labels], batch.blank, topology, delay_penalty
                losses.append(reference.brute_force_loss(log_probs, *arguments))
                continue
            kind, *numbers = topology.split("-")
            durations = "durations" if kind == "tdt" else "big_blank_durations"
            row = slice(b, b + 1)
            loss = reference.reference_duration_loss(
                logits[row], batch.targets[row], count[None], labels[None], batch.blank,
                delay_penalty=delay_penalty, reduction="none", enumerate_paths=True,
                **{durations: tuple(int(number) for number in numbers)},
            )  # fmt: skip
            losses.append(loss[0])
    return torch.stack(losses)


def grad_of(losses, tensor):
    weights = torch.linspace(0.5, 2, len(losses), dtype=losses.dtype)
    return torch.autograd.grad((losses * weights).sum(), tensor, retain_graph=True)[0]


@both_backends
@pytest.mark.parametrize("topology", ALL)
@pytest.mark.parametrize("left, right", [(0, 0), (1, 0), (0, 2), (2, 1), (9, 9)])
@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_equals_the_sum_over_the_allowed_paths(topology, left, right, layout):
    lengths = {"frames": (8, 6, 5), "symbols": (3, 0, 2)} if topology == "tdt-2-3" else {}
    batch, alignment = restricted_batch(topology, **lengths)
    logits = batch.logits if layout == "padded" else batch.shape.pack(batch.logits)
    options = {"topology": topology, "delay_penalty": 0.2, "reduction": "none"}
    window = {"alignment": alignment, "left": left, "right": right}
    expected = enumerated(batch, batch.logits, alignment, left, right, topology, 0.2)
    if not expected.isfinite().all():  # durations that do not fill the frames
        b = int(expected.isinf().nonzero()[0])
        with pytest.raises(ValueError, match=rf"utterance {b}.* leaves no path"):
            transducer_loss(logits, *batch.index_arguments, **options, **window)
        options["validate"] = False
    actual = transducer_loss(logits, *batch.index_arguments, **options, **window)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
    finite = expected.isfinite()
    assert finite.any()
    wanted = zero_padding(batch, grad_of(expected[finite], batch.logits))
    found = zero_padding(batch, grad_of(actual[finite], batch.logits))
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-10)


@both_backends
@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize(
    "frames, symbols",
    [((1100, 3), (3, 1)), ((40, 560), (3, 545)), ((60, 1, 33), (30, 0, 20))],
    ids=["long", "more lanes than a block has", "ragged"],
)
def test_equals_labels_of_probability_zero(topology, frames, symbols):
    """The restriction written into log-probabilities: a label's is -inf where it is not allowed."""
    batch, alignment = restricted_batch(topology, frames, symbols)
    log_probs = batch.logits.detach().log_softmax(-1)
    frame = torch.arange(max(frames))[None, :, None]
    away = frame - alignment[:, None]
    allowed = (away >= -3) & (away <= 2)  # (B, T, U)
    index = batch.targets.clamp(max=5)[:, None, :, None].expand(-1, max(frames), -1, 1)
    label = log_probs[:, :, :-1].gather(3, index)
    log_probs[:, :, :-1].scatter_(3, index, label.masked_fill(~allowed[..., None], -torch.inf))
    log_probs.requires_grad_()
    options = {"topology": topology, "reduction": "none", "from_log_softmax": True}
    with native.emulated(SimpleNamespace(cuda=native.extension.cpu)):  # quicker, and the same loss
        expected = transducer_loss(log_probs, *batch.index_arguments, **options)
        wanted = zero_padding(batch, grad_of(expected, log_probs))
    plain = batch.logits.detach().log_softmax(-1).requires_grad_()
    window = {"alignment": alignment, "left": 3, "right": 2}
    actual = transducer_loss(plain, *batch.index_arguments, **options, **window)
    assert expected.isfinite().all()
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(zero_padding(batch, grad_of(actual, plain)), wanted)


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_wide_windows_restrict_nothing(topology):
    batch, alignment = restricted_batch(topology)
    plain = transducer_loss(batch.logits, *batch.index_arguments, topology=topology)
    for far in (7, 2**63 - 1):
        window = {"alignment": alignment.int() if far == 7 else alignment, "left": far}
        loss = transducer_loss(
            batch.logits, *batch.index_arguments, topology=topology, right=far, **window
        )
        assert torch.equal(loss, plain)


def case_of(topology, frames=(9, 1, 6, 12), symbols=(4, 0, 3, 2), **options):
    case = Case(list(frames), list(symbols), vocab_size=8, blank=0, **options)
    case.targets.clamp_(max=4)
    last = 2 if topology in TOPOLOGIES else 3
    case.alignment = torch.stack(
        [
            (torch.arange(max(symbols)) + torch.randint(0, max(1, t - u - last), ())).clamp(max=t)
            for t, u in zip(frames, symbols, strict=True)
        ]
    )
    return case


@both_backends
@pytest.mark.parametrize("topology", [*TOPOLOGIES, "tdt-0-1-2"])
@pytest.mark.parametrize("tile_cells", [None, 1, 5])
@pytest.mark.parametrize("keeps_logits", [True, False])
def test_fused_equals_unfused(topology, tile_cells, keeps_logits, monkeypatch):
    if not keeps_logits:
        monkeypatch.setattr(joint_tiles, "KEPT_LOGITS_BYTES", {})
    case = case_of(topology)
    options = {"topology": topology, "fastemit_lambda": 0.3, "delay_penalty": 0.1, "clamp": 0.4}
    if topology == "modified":
        options["normalization"] = "hat"
    window = {"alignment": case.alignment, "left": 1, "right": 2}
    logits = torch.tanh(case.enc[:, :, None] + case.pred[:, None]) @ case.weight.t() + case.bias
    arguments = case.targets, *case.lengths, case.blank
    expected = transducer_loss(logits, *arguments, reduction="none", **options, **window)
    actual = case.fused(tile_cells=tile_cells, **options, **window)
    check_same(case, actual, expected, 1e-12)


def test_fused_computes_the_cells_of_the_windows_alone(monkeypatch):
    monkeypatch.setattr(joint_tiles, "KEPT_LOGITS_BYTES", {})
    case = case_of("regular", (40, 25), (9, 4))
    seen, cell_scores = [], stages.cell_scores

    def count(logits, batch, tile, options, out):
        seen.append(logits.size(0))
        cell_scores(logits, batch, tile, options, out)

    monkeypatch.setattr(stages, "cell_scores", count)
    restriction = Restriction(case.alignment, 0, 3)
    windows = restriction.windows(case.shape.target_lengths, 40)
    sizes = windows[..., 1] - windows[..., 0]
    cells = int(sizes[0].sum() + sizes[1, :25].sum())
    assert cells < 0.5 * case.shape.num_cells
    _, parts = case.fused(alignment=case.alignment, right=3, return_parts=True, tile_cells=7)
    assert sum(seen) == cells
    assert parts.selected == 1 and 0 < parts.kept <= 1


@both_backends
@pytest.mark.parametrize("topology", ["regular", "modified", "tdt-0-1-2"])
def test_coarse_pass_stays_within_the_budget(topology, coarse_pass):
    results = []
    case = case_of(topology, (60, 35, 1, 48), (20, 9, 0, 14), width=24, dtype=torch.float32)
    for dtype in (torch.float32, torch.float64):
        leaves = [p.detach().to(dtype).requires_grad_() for p in case.parameters]
        loss = fused_joiner_loss(
            *leaves, case.targets, *case.lengths, case.blank, topology=topology, reduction="none",
            alignment=case.alignment, left=2, right=6,
            dropped_mass=1e-7 if dtype == torch.float32 else 0.0,
        )  # fmt: skip
        results.append([loss.detach(), *torch.autograd.grad(loss.sum(), leaves)])
    for mine, exact in zip(*results, strict=True):
        assert (mine.double() - exact).norm() <= 1e-5 * exact.norm()


def test_gradcheck():
    batch, alignment = restricted_batch("regular", padding=0.0)
    window = {"alignment": alignment, "left": 1, "right": 1}
    assert torch.autograd.gradcheck(
        lambda logits: transducer_loss(
            logits, *batch.index_arguments, reduction="none", delay_penalty=0.1, **window
        ),
        batch.logits,
    )
    case = case_of("modified")
    assert torch.autograd.gradcheck(
        lambda *parameters: fused_joiner_loss(
            *parameters, case.targets, *case.lengths, case.blank, topology="modified",
            alignment=case.alignment, left=2, right=2, dropped_mass=0.0, tile_cells=9,
        ),
        tuple(case.parameters),
    )  # fmt: skip


def test_modules_and_inplace_and_shape():
    batch, alignment = restricted_batch("regular")
    arguments = batch.index_arguments[:3]
    options = {"alignment": alignment, "left": 1, "right": 1}
    expected = transducer_loss(batch.logits, *arguments, 0, **options)
    criterion = TransducerLoss(0, left=1, right=1)
    packed = batch.packed()
    actual = criterion(packed, *arguments, alignment=alignment, shape=batch.shape)
    torch.testing.assert_close(actual, expected)
    (wanted,) = torch.autograd.grad(actual, packed)
    loss = transducer_loss(packed * 1.0, *arguments, 0, inplace=True, **options)
    assert torch.equal(torch.autograd.grad(loss, packed)[0], wanted)

    case = case_of("regular")
    joint = case.enc, case.pred, case.weight, case.bias, case.targets
    actual = FusedJoinerLoss(0, left=1, right=1)(*joint, *case.lengths, alignment=case.alignment)
    expected = fused_joiner_loss(
        *joint, *case.lengths, 0, alignment=case.alignment, left=1, right=1, shape=case.shape
    )
    assert torch.equal(actual, expected)


@both_backends
def test_numbers_outside_of_the_windows_do_not_count():
    batch, _ = restricted_batch("regular", (6, 6, 6), (3, 3, 3))
    window = {"alignment": torch.tensor([[1, 2, 4]] * 3), "left": 0, "right": 1}
    options = {"reduction": "none", **window}
    clean = transducer_loss(batch.logits, *batch.index_arguments, **options)
    logits = batch.logits.detach().clone()
    logits[0, 0, 1] = torch.nan  # label 1 is not emitted before frame 1
    logits[1, 4, 2] = torch.nan  # between label 2, before frame 4, and label 3, not before
    logits[2, 5, 3] = -torch.inf
    logits.requires_grad_()
    loss = transducer_loss(logits, *batch.index_arguments, **options)
    assert loss[0] == clean[0] and loss[1].isnan() and loss[2].isnan()
    grad = grad_of(loss, logits)
    assert torch.equal(grad[0], grad_of(clean, batch.logits)[0]) and grad[0].isfinite().all()
    assert grad[0, 0, 1].eq(0).all() and grad[1, 4, 2].isnan().all()


@both_backends
@pytest.mark.parametrize("topology", ALL)
def test_an_alignment_without_a_path_is_infinite_if_it_is_not_checked(topology):
    batch, _ = restricted_batch(topology, (9, 9, 9), (2, 2, 2))
    alignment = torch.tensor([[2, 5], [11, 12], [-9, -8]])
    options = {"topology": topology, "reduction": "none"}
    window = {"alignment": alignment, "left": 1, "right": 1}
    with pytest.raises(ValueError, match=r"alignment\[1, 0\] \(utterance 1 of 9 frames\)"):
        transducer_loss(batch.logits, *batch.index_arguments, **options, **window)
    loss = transducer_loss(
        batch.logits, *batch.index_arguments, **options, **window, validate=False
    )
    assert loss[0].isfinite() and loss[1] == torch.inf and loss[2] == torch.inf
    grad = torch.autograd.grad(loss[[0]].sum() + loss[1:].sum(), batch.logits)[0]
    assert grad[0].abs().sum() > 0 and not grad[1:].any()


@settings(max_examples=150, deadline=None)
@given(
    topology=st.sampled_from(ALL),
    num_frames=st.integers(1, 7),
    alignment=st.lists(st.integers(-2, 8), max_size=3).map(sorted),
    left=st.integers(0, 2),
    right=st.integers(0, 2),
)
def test_validation_finds_exactly_the_alignments_without_a_path(
    topology, num_frames, alignment, left, right
):
    row = get_topology(topology)
    if not row.is_feasible(num_frames, len(alignment)):
        return
    size = num_frames, len(alignment)
    if topology in TOPOLOGIES:
        paths = reference.lattice_paths(*size, topology)
    else:
        paths = reference.duration_paths(*size, row)
    has_path = any(True for _ in allowed_paths(paths, alignment, left, right))
    restriction = Restriction(torch.tensor([alignment], dtype=torch.int64), left, right)
    lengths = torch.tensor([num_frames]), torch.tensor([len(alignment)])
    if has_path:
        restriction.validate(*lengths, row)
    else:
        with pytest.raises(ValueError, match=r"utterance 0.* leaves no path"):
            restriction.validate(*lengths, row)


LENGTHS = torch.tensor([4]), torch.tensor([2])
ALIGNMENT = torch.tensor([[1, 2]])


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"alignment": [1, 2]}, TypeError, "alignment: expected a torch.Tensor, got list"),
        ({"alignment": ALIGNMENT.float()}, TypeError, "alignment: expected dtype int32, int64"),
        ({"alignment": ALIGNMENT[0]}, ValueError, r"alignment: expected shape \(1, 2\), that of"),
        ({"alignment": ALIGNMENT.to("meta")}, ValueError, "alignment: expected device cpu"),
        ({"left": 1}, ValueError, "left: expected 0 without alignment, got 1"),
        ({"right": 1}, ValueError, "right: expected 0 without alignment, got 1"),
        ({"alignment": ALIGNMENT, "left": -1}, ValueError, "left: expected at least 0, got -1"),
        ({"alignment": ALIGNMENT, "right": 0.5}, TypeError, "right: expected an int, got float"),
        (
            {"alignment": ALIGNMENT.flip(1)},
            ValueError,
            r"alignment\[0, 1\] \(utterance 0\): expected frames that do not decrease, got 1 after",
        ),
        (
            {"alignment": ALIGNMENT + 2},
            ValueError,
            r"alignment\[0, 1\] \(utterance 0 of 4 frames\): leaves no path in topology 'regular' "
            r"with left=0, right=0, got 4 after 3",
        ),
    ],
)
def test_bad_input(options, error, message):
    targets = torch.tensor([[1, 2]])
    with pytest.raises(error, match=message):
        transducer_loss(torch.zeros(1, 4, 3, 5), targets, *LENGTHS, 0, **options)
    joint = torch.zeros(1, 4, 8), torch.zeros(1, 3, 8), torch.zeros(5, 8), None
    with pytest.raises(error, match=message):
        fused_joiner_loss(*joint, targets, *LENGTHS, 0, **options)


def test_ranges_and_alignment_exclude_each_other():
    joint = torch.zeros(1, 4, 8), torch.zeros(1, 3, 8), torch.zeros(5, 8), None
    ranges = torch.arange(3).expand(1, 4, 3)
    with pytest.raises(ValueError, match="ranges: expected None with alignment, got a tensor"):
        fused_joiner_loss(
            *joint, torch.tensor([[1, 2]]), *LENGTHS, 0, ranges=ranges, alignment=ALIGNMENT
        )


def test_a_compiled_function_gets_an_error_that_says_what_to_do():
    shape = LatticeShape.from_lengths(*LENGTHS)
    joint = torch.zeros(1, 4, 8), torch.zeros(1, 3, 8), torch.zeros(5, 8), None

    @torch.compile(fullgraph=True, backend="eager")
    def loss(*joint):
        targets = torch.tensor([[1, 2]])
        return fused_joiner_loss(*joint, targets, *LENGTHS, 0, alignment=ALIGNMENT, shape=shape)

    with pytest.raises(Exception, match=r"alignment: torch\.compile"):
        loss(*joint)
