# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from transducer_toolkit import Joiner, LatticeShape, fused_joiner_loss, join, joiner_logits
from transducer_toolkit.modules import AdditiveJoiner
from transducer_toolkit.modules.joiner import FORMULA
from transducer_toolkit.ops.join import _ACTIVATIONS
from transducer_toolkit.ops.native import ACTIVATIONS

pytestmark = pytest.mark.usefixtures("stages")

SHAPE = LatticeShape.from_lengths([4, 1, 3], [2, 0, 3])


def plain_join(enc, pred, shape, activation):
    return shape.pack(_ACTIVATIONS[activation](enc[:, :, None] + pred[:, None]))


def inputs(width, dtype=torch.float64, extra=0):
    enc = torch.randn(3, 4 + extra, width, dtype=dtype)
    pred = torch.randn(3, 4 + extra, width, dtype=dtype)
    return enc.requires_grad_(), pred.requires_grad_()


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("width", [1, 13, 300])
@pytest.mark.parametrize("extra", [0, 2])
def test_join_equals_plain_torch(activation, width, extra):
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 3e-6)):
        enc, pred = inputs(width, dtype, extra)
        expected = plain_join(enc, pred, SHAPE, activation)
        actual = join(enc, pred, SHAPE, activation=activation)
        torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)
        upstream = torch.randn_like(expected)
        torch.testing.assert_close(
            torch.autograd.grad(actual, (enc, pred), upstream),
            torch.autograd.grad(expected, (enc, pred), upstream),
            rtol=0,
            atol=4 * tolerance,
        )


@pytest.mark.parametrize("activation", ["tanh", "gelu", "silu", "identity"])
def test_join_gradcheck(activation):
    enc, pred = inputs(5)
    assert torch.autograd.gradcheck(
        lambda e, p: join(e, p, SHAPE, activation=activation), (enc, pred)
    )


def test_padding_is_never_read():
    enc, pred = inputs(6)
    expected = join(enc, pred, SHAPE)
    with torch.no_grad():
        enc[1, 1:] = pred[0, 3:] = pred[1, 1:] = float("nan")
    actual = join(enc, pred, SHAPE)
    assert torch.equal(actual, expected)
    grads = torch.autograd.grad(actual.sum(), (enc, pred))
    assert all(grad.isfinite().all() for grad in grads)
    assert grads[0][1, 1:].eq(0).all() and grads[1][1, 1:].eq(0).all()


def test_gradient_is_the_same_on_any_number_of_threads():
    grads = []
    enc, pred = inputs(300, torch.float32)
    for threads in (1, 3):
        torch.set_num_threads(threads)
        grads.append(torch.autograd.grad(join(enc, pred, SHAPE).sum(), (enc, pred)))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_join_opcheck_and_second_derivative():
    enc, pred = inputs(3)
    shape = *SHAPE.lengths, SHAPE.index(enc.device)
    arguments = enc, pred, *shape, "tanh", SHAPE.num_cells
    torch.library.opcheck(torch.ops.transducer_toolkit.join, arguments)
    with pytest.raises(RuntimeError, match="gradient of the gradient"):
        (grad,) = torch.autograd.grad(join(enc, pred, SHAPE).sum(), enc, create_graph=True)
        grad.sum().backward()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_joiner_forms_agree(activation):
    joiner = Joiner(5, 6, 7, 9, activation=activation).double()
    encoder_out = torch.randn(3, 4, 5, dtype=torch.float64)
    predictor_out = torch.randn(3, 4, 6, dtype=torch.float64)
    packed = joiner(encoder_out, predictor_out, SHAPE)
    assert packed.shape == (SHAPE.num_cells, joiner.vocab_size) == (SHAPE.num_cells, 9)
    padded = joiner.padded(encoder_out, predictor_out)
    assert padded.shape == (3, 4, 4, 9)
    torch.testing.assert_close(packed, SHAPE.pack(padded))
    torch.testing.assert_close(joiner.step(encoder_out[:, 2], predictor_out[:, 1]), padded[:, 2, 1])


def test_joiner_trains_every_parameter():
    joiner = Joiner(5, 6, 7, 9)
    joiner(torch.randn(3, 4, 5), torch.randn(3, 4, 6), SHAPE).square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in joiner.parameters())
    assert not hasattr(Joiner(5, 6, 7, 9, bias=False).output.bias, "grad")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"activation": "elu"}, ValueError, "activation: expected one of .* got 'elu'"),
        ({"enc": [1.0]}, TypeError, "enc: expected a torch.Tensor, got list"),
        ({"enc": torch.zeros(3, 3, 6)}, ValueError, r"enc: expected shape \(3, >= 4, D\)"),
        ({"pred": torch.zeros(2, 4, 6)}, ValueError, r"pred: expected shape \(3, >= 4, D\)"),
        ({"pred": torch.zeros(3, 4, 5)}, ValueError, "pred: expected width 6, that of enc, got 5"),
        (
            {"pred": torch.zeros(3, 4, 6).double()},
            TypeError,
            "enc, pred: expected the same dtype, one of float16",
        ),
        (
            {"enc": torch.zeros(3, 4, 6).int()},
            TypeError,
            "enc, pred: expected the same dtype, one of float16",
        ),
    ],
)
def test_bad_input(change, error, message):
    values = {"enc": torch.zeros(3, 4, 6), "pred": torch.zeros(3, 4, 6)} | change
    with pytest.raises(error, match=message):
        join(values.pop("enc"), values.pop("pred"), SHAPE, **values)


@pytest.mark.parametrize("size", ["encoder_dim", "predictor_dim", "vocab_size"])
def test_bad_sizes_are_named(size):
    sizes = {"encoder_dim": 5, "predictor_dim": 6, "vocab_size": 9}
    for make, more in ((Joiner, {"joiner_dim": 7}), (AdditiveJoiner, {})):
        assert make(**sizes, **more).encoder_dim == 5
        with pytest.raises(ValueError, match=f"{size}: expected at least 1, got 0"):
            make(**sizes | {size: 0}, **more)
    with pytest.raises(TypeError, match="joiner_dim: expected an int, got float"):
        Joiner(**sizes, joiner_dim=1.5)


@pytest.mark.parametrize("kinds", [("bfloat16", "float32"), ("float32", "float16")])
def test_autocast_casts_mixed_dtypes(kinds):
    exact = [x.detach() for x in inputs(16)]
    enc, pred = (x.to(getattr(torch, kind)) for x, kind in zip(exact, kinds, strict=True))
    weight = torch.randn(9, 16)
    for call in (
        lambda e, p: join(e, p, SHAPE),
        lambda e, p: joiner_logits(e, p, weight.to(e.dtype), None, SHAPE),
    ):
        with pytest.raises(TypeError, match="enc, pred: expected the same dtype"):
            call(enc, pred)
        with torch.autocast("cpu", torch.bfloat16):
            actual = call(enc, pred)
        assert actual.dtype == torch.bfloat16
        torch.testing.assert_close(actual.double(), call(*exact), rtol=3e-2, atol=0.15)
    with torch.autocast("cpu", torch.bfloat16):  # equal dtypes: a sum, which autocast leaves alone
        assert join(enc.float(), pred.float(), SHAPE).dtype == torch.float32


@pytest.mark.parametrize(
    ("weight", "bias", "message"),
    [
        (torch.zeros(4, 3), None, r"weight: expected shape \(V, 5\), D from enc"),
        (torch.zeros(4, 5), torch.zeros(3), r"bias: expected shape \(4,\), V from weight"),
        (torch.zeros(4, 5).long(), None, "weight: expected a floating dtype, got torch.int64"),
        (torch.zeros(4, 5, device="meta"), None, "weight: expected device cpu, that of enc"),
        (torch.zeros(4, 5), [0.0] * 4, "bias: expected a torch.Tensor, got list"),
    ],
)
def test_one_check_of_the_output_layer(weight, bias, message):
    enc, pred = torch.zeros(3, 4, 5), torch.zeros(3, 4, 5)
    with pytest.raises((TypeError, ValueError), match=message):
        joiner_logits(enc, pred, weight, bias, SHAPE)
    indices = torch.ones(3, 3, dtype=torch.int64), *SHAPE.lengths
    with pytest.raises((TypeError, ValueError), match=message):
        fused_joiner_loss(enc, pred, weight, bias, *indices, 0)


def test_an_input_of_another_device_and_dtype_is_named():
    enc, pred = torch.zeros(3, 4, 5), torch.zeros(3, 4, 5, dtype=torch.bfloat16, device="meta")
    with pytest.raises(TypeError, match="enc, pred: expected the same dtype"):
        joiner_logits(enc, pred, torch.zeros(4, 5), None, SHAPE)


@pytest.mark.parametrize("name", ["forward", "padded", "join_projected", "step", "project_encoder"])
def test_a_subclass_that_changes_a_part_of_the_formula_is_an_error(name):
    with pytest.raises(TypeError, match="Half: expected a subclass of Joiner that overrides"):
        type("Half", (Joiner,), {name: lambda self, *inputs: None})


def test_a_subclass_may_change_the_layers_or_all_of_the_formula():
    type("Layers", (Joiner,), {"__init__": lambda self: Joiner.__init__(self, 8, 4, 16, 10)})
    type("Formula", (Joiner,), dict.fromkeys(FORMULA, lambda self, *inputs: None))
