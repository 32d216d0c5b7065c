# SPDX-License-Identifier: Apache-2.0
"""JointTiles: products of 16-bit tiles, and the vocabulary that is padded for them."""

import pytest
import torch

from tests.backends import Backend, of
from transducer_toolkit import LatticeShape, fused_joiner_loss
from transducer_toolkit.ops import fused_joiner, joint_tiles, native
from transducer_toolkit.ops.fused_joiner import FusedInputs, FusedPlan
from transducer_toolkit.ops.joint_tiles import JointTiles, JointWeights, _mm_to_float32
from transducer_toolkit.ops.lattice import LatticeBatch, Lengths
from transducer_toolkit.ops.options import FusedOptions
from transducer_toolkit.ops.stages import Joint


class Factor:
    """Stands for a matrix on a device."""

    def __init__(self, device):
        self.device = torch.device(device)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("has_out_dtype", [False, True])
def test_float32_product_is_asked_for_where_torch_has_it(monkeypatch, device, has_out_dtype):
    calls = []
    monkeypatch.setattr(torch, "mm", lambda *factors, **options: calls.append((factors, options)))
    monkeypatch.setattr(joint_tiles, "_MM_HAS_OUT_DTYPE", has_out_dtype)
    factors = Factor(device), Factor(device)
    _mm_to_float32(*factors)
    wanted = {"out_dtype": torch.float32} if has_out_dtype and device == "cuda" else {}
    assert calls == [(factors, wanted)]


def weight_gradient(dtype, device, monkeypatch):
    """Of 7 tiles and several panels, and the same sum in float64."""
    monkeypatch.setitem(joint_tiles.PANEL_BYTES, torch.device(device).type, 1)
    monkeypatch.setattr(joint_tiles, "MIN_PANEL_ROWS", 6)
    weight = torch.randn(20, 16, device=device, dtype=dtype)
    sides = Joint(weight[None], weight[None], "tanh")
    joint = JointTiles(sides, JointWeights(weight, None), None)
    joint.start_backward(frozenset({"weight"}))
    exact = torch.zeros(20, 16, dtype=torch.float64, device=device)
    for _ in range(7):
        hidden = torch.randn(64, 16, device=device, dtype=dtype)
        grad_logits = torch.randn(64, 20, device=device, dtype=dtype)
        joint.backward(None, hidden, grad_logits)
        exact += grad_logits.double().t() @ hidden.double()
    return joint._sums["weight"], exact


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_tile_products_add_up_in_float32(monkeypatch, dtype):
    """The CPU rounds each tile's product to 16 bits, and no sum of them."""
    grad, exact = weight_gradient(dtype, "cpu", monkeypatch)
    assert grad.dtype == torch.float32
    roundings = 7**0.5 * torch.finfo(dtype).eps
    assert (grad - exact).abs().max() < roundings * exact.abs().max()


@pytest.mark.skipif(
    Backend("cuda").missing is not None or not joint_tiles._MM_HAS_OUT_DTYPE,
    reason="needs a CUDA device and torch >= 2.8",
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_tile_products_are_not_rounded_to_16_bits_on_cuda(monkeypatch, dtype):
    grad, exact = weight_gradient(dtype, of("cuda").device, monkeypatch)
    assert (grad - exact).abs().max() < 1e-5 * exact.abs().max()


# --- the padded vocabulary ----------------------------------------------------------------------

FRAMES, SYMBOLS = [9, 1, 6], [4, 0, 5]


def inputs_of(vocab_size, dtype, bias=True, width=24):
    shape = LatticeShape.from_lengths(FRAMES, SYMBOLS)
    sizes = ((3, 9, width), (3, 6, width), (vocab_size, width), (vocab_size,))
    tensors = [torch.randn(size).to(dtype) for size in sizes]
    return shape, tensors if bias else tensors[:3], torch.randint(1, vocab_size, (3, 5))


def losses_and_grads(shape, tensors, targets, **options):
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    bias = leaves[3] if len(leaves) == 4 else None
    losses = fused_joiner_loss(
        *leaves[:3], bias, targets, *shape.lengths, 0, reduction="none", shape=shape, **options
    )
    return losses, torch.autograd.grad(losses.nansum(), leaves)


def with_padding(is_padded, run):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(joint_tiles, "VOCAB_MULTIPLE", {"cpu": 8} if is_padded else {})
        return run()


@pytest.mark.parametrize("backend", ["cpu", "emulated"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("vocab_size", [11, 500, 517])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tile_cells", [None, 17], ids=["kept logits", "tiles"])
def test_padded_vocabulary_changes_nothing(backend, dtype, vocab_size, bias, tile_cells):
    """The CPU's stages give the same bits of 16-bit numbers.

    torch may add up a wider product in another order. A lane of an emulated warp has other symbols
    to add up, so there float32 sums, and what is rounded to 16 bits after them, may be different
    numbers.
    """
    inputs = inputs_of(vocab_size, dtype, bias)
    run = lambda: losses_and_grads(*inputs, tile_cells=tile_cells)  # noqa: E731
    with Backend(backend).active():
        losses, grads = with_padding(False, run)
        padded_losses, padded_grads = with_padding(True, run)
    shape, tensors, targets = inputs
    _, exact = losses_and_grads(shape, [x.double() for x in tensors], targets)
    if backend == "cpu" and dtype in native.SIXTEEN_BIT:
        assert torch.equal(losses, padded_losses)
        assert all(torch.equal(*pair) for pair in zip(grads, padded_grads, strict=True))
    torch.testing.assert_close(losses, padded_losses, rtol=2e-6, atol=0)
    for grad, padded, true in zip(grads, padded_grads, exact, strict=True):
        assert grad.shape == padded.shape and grad.dtype == padded.dtype
        if dtype not in native.SIXTEEN_BIT:
            tolerance = 5e-6 if dtype == torch.float32 else 1e-12
            assert (padded - grad).norm() <= tolerance * grad.norm()
            continue
        worst = (grad.double() - true).abs().max()
        rounding = torch.finfo(dtype).eps * true.abs().max()
        assert (padded.double() - true).abs().max() <= worst + rounding


@pytest.mark.parametrize("backend", ["cpu", "emulated"])
def test_a_target_without_a_symbol_is_nan(backend):
    """V = 11 is padded to 16: targets 11 and 15 have a column, 16 has none."""
    shape, tensors, targets = inputs_of(11, torch.bfloat16)
    for wrong, dtype in ((11, torch.int64), (15, torch.int32), (16, torch.int64)):
        targets[2, 1] = wrong
        arguments = shape, tensors, targets.to(dtype)
        with Backend(backend).active():
            losses, _ = with_padding(
                True, lambda given=arguments: losses_and_grads(*given, validate=False)
            )
        assert losses.isnan().tolist() == [False, False, True]


def test_kept_logits_have_the_shape_that_the_fake_says():
    shape, tensors, targets = inputs_of(11, torch.bfloat16)
    inputs = FusedInputs(*tensors, targets, *shape.lengths)
    arguments = inputs, FusedOptions(0), FusedPlan(shape.num_cells, True, True)
    for is_padded, columns in ((False, 11), (True, 16)):
        for operator in (fused_joiner.operator.forward, fused_joiner.operator.fake):
            kept = with_padding(is_padded, lambda op=operator: op(*arguments).logits)
            assert kept.shape == (shape.num_cells, columns)


def test_joiner_logits_are_not_padded(monkeypatch):
    """They are handed out: their columns are the caller's."""
    monkeypatch.setattr(joint_tiles, "VOCAB_MULTIPLE", {"cpu": 8})
    _, (enc, pred, weight, bias), _ = inputs_of(11, torch.bfloat16)
    joint = JointTiles(Joint(enc, pred, "tanh"), JointWeights(weight, bias), None)
    assert joint.vocab_size == 11 and joint.weight is weight


# --- the size of a tile -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("memory_gib", "budget_mib"), [(80, 512), (32, 512), (16, 256), (8, 128), (2, 32)]
)
@pytest.mark.parametrize("beside_kept", [False, True])
def test_a_tile_takes_a_small_share_of_a_gpu(monkeypatch, memory_gib, budget_mib, beside_kept):
    class Properties:
        total_memory = memory_gib * 2**30

    class Logits:
        device = torch.device("cuda", 0)

        def element_size(self):
            return 4

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    cells = joint_tiles.automatic_tile_cells(Logits(), 2 * 512 + 500, beside_kept)
    assert cells == budget_mib * 2**20 // (4 * (2 * 512 + 500))


@pytest.mark.parametrize("pads_vocab", [False, True])
def test_a_large_weight_is_cast_in_panels(monkeypatch, pads_vocab):
    """Without a copy of all of it; the products are those of a weight that was cast as a whole."""
    shape, (enc, pred, weight, bias), targets = inputs_of(37, torch.float32, True)
    batch = LatticeBatch(
        Lengths(*shape.lengths),
        targets,
        num_rows=shape.num_cells,
        max_frames=enc.size(1),
        padded=False,
    )

    def run():
        tiles = JointTiles(
            Joint(enc, pred, "tanh"),
            JointWeights(weight, bias),
            batch,
            pads_vocab=pads_vocab,
            product_dtype=torch.bfloat16,
        )
        tiles.start_backward(frozenset(("enc", "pred", "weight", "bias")))
        for tile in tiles.tiles():
            hidden = tiles.hidden(tile)
            logits = tiles.logits(hidden).clone()
            tiles.backward(tile, hidden, logits.softmax(1))
        return tiles, logits, tiles.gradients()

    if pads_vocab:
        monkeypatch.setattr(joint_tiles, "VOCAB_MULTIPLE", {"cpu": 8})
    whole, logits, expected = run()
    assert whole.weight.dtype == torch.bfloat16
    monkeypatch.setattr(joint_tiles, "MIN_PANEL_ROWS", 8)
    monkeypatch.setitem(joint_tiles.PANEL_BYTES, "cpu", 1)
    monkeypatch.setitem(joint_tiles.NARROW_PANEL_BYTES, "cpu", 1)
    in_panels, same_logits, grads = run()
    assert in_panels.weight.dtype == torch.float32 and in_panels.weight[:37].equal(weight)
    in_panels.weight.fill_(-3.4e38)  # below the range of bfloat16
    assert all(in_panels._weight(panel).isfinite().all() for panel in in_panels._panels)
    torch.testing.assert_close(same_logits, logits)
    for name, grad in grads.items():
        assert (grad - expected[name]).norm() <= 1e-2 * expected[name].norm()
