# SPDX-License-Identifier: Apache-2.0
"""JointTiles: products of 16-bit tiles, and the vocabulary that is padded for them."""

import pytest
import torch

from tests.backends import Backend, of
from transducer_toolkit import joint_tiles
from transducer_toolkit.joint_tiles import JointTiles, _mm_to_float32


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
    joint = JointTiles(weight[None], weight[None], weight, None, None, activation="tanh")
    joint.start_backward((False, False, True, False))
    exact = torch.zeros(20, 16, dtype=torch.float64, device=device)
    for _ in range(7):
        hidden = torch.randn(64, 16, device=device, dtype=dtype)
        grad_logits = torch.randn(64, 20, device=device, dtype=dtype)
        joint.backward(None, hidden, grad_logits)
        exact += grad_logits.double().t() @ hidden.double()
    return joint._grad_weight, exact


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
