# SPDX-License-Identifier: Apache-2.0
"""fused_joiner_loss against the joiner and loss it fuses: values, four gradients, options."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from transducer_toolkit import FusedJoinerLoss, LatticeShape, fused_joiner_loss
from transducer_toolkit.ops import joint_tiles
from transducer_toolkit.ops.fused_joiner import FusedInputs, FusedPlan, operator
from transducer_toolkit.ops.join import _ACTIVATIONS
from transducer_toolkit.ops.logits_loss import LogitsInputs, logits_loss
from transducer_toolkit.ops.native import ACTIVATIONS
from transducer_toolkit.ops.options import FusedOptions, LossOptions
from transducer_toolkit.ops.topology import TOPOLOGIES

pytestmark = pytest.mark.usefixtures("stages", "logits_kept")

FRAMES, SYMBOLS, V, D = [7, 4, 9], [3, 0, 4], 11, 6


@pytest.fixture(scope="module", params=["few logits", "many logits"])
def logits_kept(request):
    """Whether backward finds the logits of forward, or makes them again."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "many logits":
            patch.setattr(joint_tiles, "KEPT_LOGITS_BYTES", {})
        yield


class Case:
    """Inputs of a fused loss, and the same loss by way of all logits."""

    def __init__(self, frames=FRAMES, symbols=SYMBOLS, *, dtype=torch.float64, scale=1.0, band=0,
                 bias=True, vocab_size=V, width=D, blank=2):  # fmt: skip
        self.shape = LatticeShape.from_lengths(frames, symbols)
        size, num_frames, columns = len(frames), max(frames), max(symbols) + 1
        self.enc = torch.randn(size, num_frames, width, dtype=dtype)
        self.pred = torch.randn(size, columns, width, dtype=dtype)
        self.weight = scale * torch.randn(vocab_size, width, dtype=dtype)
        self.bias = torch.randn(vocab_size, dtype=dtype) if bias else None
        self.targets = torch.randint(0, vocab_size - 1, (size, columns - 1))
        self.targets += self.targets >= blank
        self.blank = blank
        self.ranges = None
        if band:  # climbs from 0 to U + 1 - R along each utterance
            progress = torch.arange(num_frames) / (self.shape.logit_lengths[:, None] - 1).clamp(1)
            last = (self.shape.target_lengths[:, None] + 1 - band).clamp(min=0)
            start = (progress.clamp(max=1) * last).round().long()
            self.ranges = start[:, :, None] + torch.arange(band)
        for tensor in self.parameters:
            tensor.requires_grad_()

    @property
    def parameters(self):
        return [p for p in (self.enc, self.pred, self.weight, self.bias) if p is not None]

    @property
    def lengths(self):
        return self.shape.logit_lengths, self.shape.target_lengths

    def unfused(self, *, activation="tanh", topology="regular", dtype=None, **options):
        """(losses, gradients) by way of padded logits, in plain torch up to the loss."""
        enc, pred, weight = self.enc, self.pred, self.weight
        bias = self.bias
        if dtype is not None:
            enc, pred, weight = enc.to(dtype), pred.to(dtype), weight.to(dtype)
            bias = None if bias is None else bias.to(dtype)
        columns = pred[:, None].expand(-1, enc.size(1), -1, -1)
        if self.ranges is not None:
            index = self.ranges.clamp(max=pred.size(1) - 1)[..., None].expand(
                -1, -1, -1, enc.size(2)
            )
            columns = columns.gather(2, index)
        logits = functional.linear(
            _ACTIVATIONS[activation](enc[:, :, None] + columns), weight, bias
        )
        inputs = LogitsInputs(logits, self.targets, *self.lengths, ranges=self.ranges)
        return logits_loss(inputs, LossOptions(self.blank, topology, **options)).losses

    def fused(self, **options):
        joint = self.enc, self.pred, self.weight, self.bias
        options = {"reduction": "none", "dropped_mass": 0.0, "ranges": self.ranges} | options
        return fused_joiner_loss(*joint, self.targets, *self.lengths, self.blank, **options)


def check_same(case, actual, expected, tolerance):
    weights = torch.randn(len(actual), dtype=actual.dtype)
    torch.testing.assert_close(actual, expected.to(actual.dtype), rtol=tolerance, atol=tolerance)
    grads = torch.autograd.grad((actual * weights).sum(), case.parameters, retain_graph=True)
    wanted = torch.autograd.grad((expected * weights).sum(), case.parameters, retain_graph=True)
    for grad, want in zip(grads, wanted, strict=True):
        assert (grad - want).norm() <= tolerance * (1 + want.norm())


@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize("band", [0, 3])
@pytest.mark.parametrize("tile_cells", [None, 1, 5])
def test_float64_equals_unfused(topology, band, tile_cells):
    case = Case(band=band)
    options = {"topology": topology, "fastemit_lambda": 0.3, "delay_penalty": 0.1}
    check_same(case, case.fused(tile_cells=tile_cells, **options), case.unfused(**options), 1e-12)
    clamped = options | {"clamp": 0.05}
    check_same(case, case.fused(tile_cells=tile_cells, **clamped), case.unfused(**clamped), 1e-12)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bias", [False, True])
def test_activations_and_bias(activation, bias):
    case = Case(bias=bias)
    check_same(case, case.fused(activation=activation), case.unfused(activation=activation), 1e-12)


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 9), st.integers(0, 5)), min_size=1, max_size=4),
    topology=st.sampled_from(tuple(TOPOLOGIES)),
    band=st.integers(0, 4),
    tile_cells=st.sampled_from([None, 1, 4, 7]),
    scale=st.sampled_from([0.1, 3.0, 30.0]),
    dropped_mass=st.sampled_from([0.0, 1e-14]),
    seed=st.integers(0, 2**31),
)
def test_any_batch_equals_unfused(lengths, topology, band, tile_cells, scale, dropped_mass, seed):
    torch.manual_seed(seed)
    lengths = [(max(t, TOPOLOGIES[topology].min_frames(u)), u) for t, u in lengths]
    frames, symbols = ([pair[i] for pair in lengths] for i in (0, 1))
    case = Case(frames, symbols, scale=scale, band=min(band, max(symbols) + 1))
    expected = case.unfused(topology=topology)
    actual = case.fused(topology=topology, tile_cells=tile_cells, dropped_mass=dropped_mass)
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)
    finite = expected.isfinite()  # a band may leave no path: +inf, and no gradient from it
    if finite.any():
        check_same(case, actual[finite], expected[finite], 1e-10)


@pytest.mark.parametrize("band", [0, 3])
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_gradcheck(band, topology):
    case = Case([4, 3], [2, 1], band=min(band, 2), vocab_size=5, width=3)

    def loss_of(enc, pred, weight, bias):
        return fused_joiner_loss(
            enc, pred, weight, bias, case.targets, *case.lengths, case.blank, topology=topology,
            ranges=case.ranges, reduction="none", delay_penalty=0.2, dropped_mass=0.0, tile_cells=4,
        )  # fmt: skip

    assert torch.autograd.gradcheck(loss_of, case.parameters, atol=1e-8)


@pytest.mark.parametrize("scale", [1.0, 12.0])
def test_float32_gradients_are_within_1e_5_of_float64(scale):
    case = Case([120, 90], [30, 21], dtype=torch.float32, vocab_size=50, width=64, scale=scale / 8)
    exact = case.unfused(dtype=torch.float64).sum()
    wanted = torch.autograd.grad(exact, case.parameters)
    for dropped_mass, tolerance in ((0.0, 1e-5), (1e-6, 2e-5)):
        loss = case.fused(dropped_mass=dropped_mass).sum()
        assert loss.item() == pytest.approx(exact.item(), rel=1e-6)
        for grad, want in zip(torch.autograd.grad(loss, case.parameters), wanted, strict=True):
            assert (grad - want).norm() <= tolerance * want.norm()


@pytest.mark.parametrize("dropped_mass", [1e-6, 1e-3, 1e-1])
def test_filter_keeps_its_bound(dropped_mass):
    case = Case([60, 40], [12, 9], scale=4.0)
    upstream = torch.tensor([2.0, -5.0], dtype=torch.float64)
    exact = torch.autograd.grad((case.fused() * upstream).sum(), case.bias)[0]
    losses, kept = case.fused(dropped_mass=dropped_mass, return_kept=True)
    assert torch.equal(losses, case.fused())  # values do not depend on the filter
    (grad,) = torch.autograd.grad((losses * upstream).sum(), case.bias)
    mass = dropped_mass * torch.tensor([60 + 12, 40 + 9.0])
    assert 0 < kept < 1
    # The bias sums the logits' gradients, so its error is at most theirs in L1 norm.
    assert 0 < (grad - exact).abs().sum() <= (2 * mass * upstream.abs()).sum()


def test_kept_fraction():
    case = Case()
    assert case.fused(return_kept=True)[1] == 1
    with torch.no_grad():
        kept = case.fused(return_kept=True, dropped_mass=0.5)[1]
    assert 0 < kept < 1


def test_frozen_inputs_cost_nothing_and_change_nothing():
    case = Case()
    wanted = torch.autograd.grad(case.fused().sum(), case.parameters)
    for frozen in range(4):
        for index, tensor in enumerate(case.parameters):
            tensor.requires_grad_(index != frozen)
        active = [tensor for tensor in case.parameters if tensor.requires_grad]
        grads = torch.autograd.grad(case.fused().sum(), active)
        expected = [grad for index, grad in enumerate(wanted) if index != frozen]
        for grad, want in zip(grads, expected, strict=True):
            torch.testing.assert_close(grad, want)
    for tensor in case.parameters:
        tensor.requires_grad_(False)
    assert not case.fused().requires_grad


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_sixteen_bit(dtype, autocast):
    case = Case([30, 20], [8, 5], dtype=torch.float32, vocab_size=40, width=32, scale=0.2)
    exact = case.unfused(dtype=torch.float64)
    wanted = torch.autograd.grad(exact.sum(), case.parameters)
    if autocast:
        with torch.autocast("cpu", dtype=dtype):
            losses = case.fused(dropped_mass=1e-6)
        parameters = case.parameters
    else:
        for name in ("enc", "pred", "weight", "bias"):
            setattr(case, name, getattr(case, name).detach().to(dtype).requires_grad_())
        losses, parameters = case.fused(dropped_mass=1e-6), case.parameters
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses.double(), exact, rtol=2e-2, atol=0)
    # A loss scale of 65536 must not overflow float16, whose largest number is 65504.
    grads = torch.autograd.grad(65536.0 * losses.sum(), parameters)
    for grad, want, tensor in zip(grads, wanted, parameters, strict=True):
        assert grad.dtype == tensor.dtype
        if dtype == torch.float16 and not (autocast and tensor.shape[0] == 40):
            continue  # a scaled float16 gradient does not fit; that of a float32 weight does
        assert (grad / 65536 - want).norm() <= 4e-2 * want.norm()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("enc", "pred", "weight"),
    [
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.float32, torch.float16, torch.float32),
        (torch.float16, torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.float32, torch.float16),
    ],
)
def test_autocast_casts_mixed_dtypes_as_those_of_a_matrix_product(dtype, enc, pred, weight):
    case = Case([30, 20], [8, 5], dtype=torch.float32, vocab_size=40, width=32, scale=0.2)
    exact = case.unfused(dtype=torch.float64)
    for name, kind in (("enc", enc), ("pred", pred), ("weight", weight), ("bias", weight)):
        setattr(case, name, getattr(case, name).detach().to(kind).requires_grad_())
    if enc != pred:
        with pytest.raises(TypeError, match=r"pred: expected dtype .* that of enc"):
            case.fused()
    with torch.autocast("cpu", dtype=dtype):
        functional.linear(case.enc, case.weight), functional.linear(case.pred, case.weight)
        losses = case.fused()
    torch.testing.assert_close(losses.double(), exact, rtol=2e-2, atol=0)
    grads = torch.autograd.grad(losses.sum(), case.parameters)
    assert [grad.dtype for grad in grads] == [enc, pred, weight, weight]


def test_autocast_leaves_float64_alone():
    case = Case([3], [2])  # torch's autocast does not cast float64 either
    with torch.autocast("cpu", torch.bfloat16):
        assert case.fused().dtype == torch.float64
        case.pred = case.pred.detach().float()
        with pytest.raises(TypeError, match=r"pred: expected dtype torch\.float64, that of enc"):
            case.fused()


def test_opcheck_and_second_derivative():
    case = Case()
    joint = case.enc, case.pred, case.weight, case.bias
    inputs = FusedInputs(*joint, case.targets, *case.lengths)
    options = FusedOptions(case.blank, dropped_mass=0.0)
    for keep_logits in (False, True):
        plan = FusedPlan(case.shape.num_cells, keep_logits=keep_logits, with_uses=True)
        arguments = tuple(operator.flat(inputs, options, plan))
        torch.library.opcheck(torch.ops.transducer_toolkit.fused_joiner_loss, arguments)
    with pytest.raises(RuntimeError, match="gradient of the gradient"):
        (grad,) = torch.autograd.grad(case.fused().sum(), case.enc, create_graph=True)
        grad.sum().backward()


def test_one_graph_without_a_shape_says_what_to_pass():
    torch.compiler.reset()
    case = Case()

    def loss_of(enc):
        joint = enc, case.pred, case.weight, case.bias
        return fused_joiner_loss(*joint, case.targets, *case.lengths, case.blank)

    def with_module(enc):
        joint = enc, case.pred, case.weight, case.bias
        return FusedJoinerLoss(case.blank)(*joint, case.targets, *case.lengths)

    remedy = r"pass shape=LatticeShape.from_lengths\(logit_lengths, target_lengths\)"
    for function in (loss_of, with_module):
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        with pytest.raises(torch._dynamo.exc.Unsupported, match=remedy):
            compiled(case.enc)
    torch.compiler.reset()
    broken = torch.compile(loss_of, backend="aot_eager")  # its graph breaks before the call
    torch.testing.assert_close(broken(case.enc), loss_of(case.enc))


@pytest.mark.not_emulated  # the graph is the same
@pytest.mark.parametrize("band", [0, 3])
def test_one_graph_serves_batches_of_every_shape(band):
    torch.compiler.reset()

    def loss_of(case, *joint):
        return fused_joiner_loss(
            *joint, case.targets, *case.lengths, case.blank, ranges=case.ranges, shape=case.shape
        )

    compiled = torch.compile(loss_of, fullgraph=True, backend="aot_eager")
    for step in range(12):  # the limit of recompilations is 8
        case = Case([5 + step, 3], [2 + step % 5, 1], band=band)
        actual, expected = (f(case, *case.parameters) for f in (compiled, loss_of))
        torch.testing.assert_close(actual, expected)
        grads = (torch.autograd.grad(loss, case.parameters) for loss in (actual, expected))
        for grad, want in zip(*grads, strict=True):
            torch.testing.assert_close(grad, want)


def test_backward_twice_checkpointing_and_accumulation():
    case = Case()
    loss = case.fused().sum()
    first = torch.autograd.grad(loss, case.parameters, retain_graph=True)
    second = torch.autograd.grad(loss, case.parameters)
    recomputed = checkpoint(lambda enc: case.fused().sum() + 0 * enc.sum(), case.enc,
                            use_reentrant=False)  # fmt: skip
    third = torch.autograd.grad(recomputed, case.parameters)
    for a, b, c in zip(first, second, third, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)
    for _ in range(3):
        case.fused().sum().backward()
    for tensor, grad in zip(case.parameters, first, strict=True):
        torch.testing.assert_close(tensor.grad, 3 * grad)


def test_strides_int32_and_module_form():
    case = Case()
    expected = case.fused()
    case.enc = case.enc.detach().transpose(0, 2).contiguous().transpose(0, 2).requires_grad_()
    case.weight = case.weight.detach().t().contiguous().t().requires_grad_()
    assert not case.enc.is_contiguous() and not case.weight.is_contiguous()
    torch.testing.assert_close(case.fused(), expected)
    criterion = FusedJoinerLoss(blank=case.blank, reduction="sum", dropped_mass=0.0)
    indices = case.targets.int(), *(lengths.int() for lengths in case.lengths)
    loss = criterion(case.enc, case.pred, case.weight, case.bias, *indices)
    torch.testing.assert_close(loss, expected.sum())
    assert "dropped_mass=0.0" in repr(criterion)


# --- non-finite values and padding --------------------------------------------------------------


def test_padding_is_never_read():
    case = Case()
    expected = case.fused()
    wanted = torch.autograd.grad(expected.sum(), case.parameters)
    with torch.no_grad():
        for b, (t, u) in enumerate(zip(FRAMES, SYMBOLS, strict=True)):
            case.enc[b, t:] = case.pred[b, u + 1 :] = float("nan")
            case.targets[b, u:] = 10**8
    actual = case.fused()
    assert torch.equal(actual, expected)
    for grad, want in zip(torch.autograd.grad(actual.sum(), case.parameters), wanted, strict=True):
        torch.testing.assert_close(grad, want)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_one_bad_utterance_leaves_the_losses_of_others_alone(activation):
    case = Case(dtype=torch.float32)
    clean = case.fused(activation=activation)
    bad = torch.autograd.grad(clean[[0, 2]].sum(), case.parameters)
    with torch.no_grad():
        case.enc[1, 2] = float("nan")
    losses = case.fused(activation=activation)
    assert losses[1].isnan() and torch.equal(losses[[0, 2]], clean[[0, 2]])
    assert torch.autograd.grad(losses.sum(), case.enc, retain_graph=True)[0][1, 2].isnan().all()
    masked = torch.where(losses.isfinite(), losses, 0.0).sum()
    for grad, want in zip(torch.autograd.grad(masked, case.parameters), bad, strict=True):
        torch.testing.assert_close(grad, want, rtol=1e-5, atol=1e-6)


def test_no_surviving_path():
    case = Case(band=2)
    case.ranges[0] = torch.tensor([0, 1])  # the band never reaches symbol 3
    losses = case.fused()
    assert losses[0] == float("inf") and losses[1:].isfinite().all()
    grads = torch.autograd.grad(losses.sum(), case.parameters)
    assert all(grad.isfinite().all() for grad in grads) and grads[0][0].eq(0).all()


def test_invalid_lengths_without_validation_are_nan():
    case = Case()
    case.targets[0, 1] = 10**8
    losses = case.fused(validate=False)
    assert losses[0].isnan() and losses[1:].isfinite().all()


def test_shape_of_another_batch_is_refused():
    case = Case()
    for shape, error, message in (
        (
            LatticeShape.from_lengths([7], [3]),
            ValueError,
            "shape: expected 3 utterances, B of targets",
        ),
        ((FRAMES, SYMBOLS), TypeError, "shape: expected a LatticeShape, got tuple"),
        (
            LatticeShape.from_lengths([7, 4, 8], SYMBOLS),
            ValueError,
            "the logit_lengths of the call, got 8 and not 9 for utterance 2",
        ),
        (
            LatticeShape.from_lengths(FRAMES, [2, 0, 4]),
            ValueError,
            "the target_lengths of the call, got 2 and not 3 for utterance 0",
        ),
    ):
        with pytest.raises(error, match=message):
            case.fused(shape=shape, validate=False)


def test_forward_mode_is_refused():
    case = Case()
    enc = case.enc.detach()

    def loss_of(enc):
        case.enc = enc
        return case.fused().sum()

    with pytest.raises(RuntimeError, match="do not support forward-mode derivatives"):
        torch.func.jvp(loss_of, (enc,), (torch.ones_like(enc),))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"enc": torch.zeros(3, 9)}, ValueError, r"enc: expected shape \(B, T, D\)"),
        ({"pred": torch.zeros(3, 5, 7).double()}, ValueError, r"pred: expected shape \(3, U \+ 1"),
        ({"pred": torch.zeros(3, 4, 6).double()}, ValueError, r"\(3, 5, D\), .* a start symbol$"),
        ({"pred": torch.zeros(3, 3, 6).double()}, ValueError, r"got \(3, 3, 6\)$"),
        ({"pred": torch.zeros(3, 5, 6)}, TypeError, "pred: .* torch.float64, .*autocast"),
        ({"enc": torch.zeros(3, 8, 6).double()}, ValueError, r"1 to 8 \(the frames of enc\)"),
        ({"weight": torch.zeros(11, 5).double()}, ValueError, r"weight: expected shape \(V, 6\)"),
        ({"weight": torch.zeros(11, 6).half()}, TypeError, "weight: expected dtype"),
        ({"bias": torch.zeros(10).double()}, ValueError, r"bias: expected shape \(11,\)"),
        ({"targets": torch.full((3, 4), 11)}, ValueError, r"targets\[0, 0\] .* got 11"),
        ({"blank": 11}, ValueError, "blank: expected 0 <= blank < 11"),
    ],
)  # fmt: skip
def test_bad_tensors(change, error, message):
    case = Case()
    for name, value in change.items():
        setattr(case, name, value)
    with pytest.raises(error, match=message):
        case.fused()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"activation": "elu"}, "activation: expected one of"),
        ({"topology": "free"}, "topology: expected one of"),
        ({"dropped_mass": -1.0}, "dropped_mass: expected 0 <= dropped_mass < 1, got -1.0"),
        ({"dropped_mass": float("nan")}, "dropped_mass: expected"),
        ({"tile_cells": 0}, "tile_cells: expected None or an int of at least 1, got 0"),
        ({"tile_cells": 2.5}, "tile_cells: expected None or an int of at least 1, got 2.5"),
        ({"ranges": torch.zeros(3, 9, 0).long()}, r"ranges: expected shape \(3, 9, R\), R >= 1"),
        ({"ranges": torch.zeros(3, 8, 2).long()}, r"ranges: expected shape \(3, 9, R\)"),
        ({"ranges": torch.zeros(3, 9, 2).long()}, r"ranges\[0, 0\] \(utterance 0\): expected 2"),
        ({"reduction": "avg"}, "reduction: expected one of"),
        ({"fastemit_lambda": -0.1}, "fastemit_lambda: expected a finite number >= 0"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        Case().fused(**options)
    options = {name: value for name, value in options.items() if name != "ranges"}
    if options:
        options = {"reduction": "none"} | options
        with pytest.raises(ValueError, match=message):
            FusedJoinerLoss(blank=0, **options)
