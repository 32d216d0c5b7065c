# SPDX-License-Identifier: Apache-2.0
"""Log-normaliser of every cell of an additive joiner, without its logits."""

from __future__ import annotations

import torch
from torch import Tensor

from transducer_toolkit import native


def simple_normaliser(lm: Tensor, am: Tensor) -> Tensor:
    """``logsumexp_v(am[b, t, v] + lm[b, u, v])`` as one batched matrix product; differentiable.

    ::

        log(exp(am - max am) @ exp(lm - max lm)^T) + max am + max lm

    Where the product has lost digits to underflow (am and lm have their maxima at different
    symbols) the cell is computed again, term by term, in value and in gradient.

    Args:
        lm: (B, U + 1, V) float32 or float64. -inf means probability zero.
        am: (B, T, V), same dtype and device.

    Returns:
        (B, T, U + 1) float64. NaN where am or lm hold NaN or +inf, or nothing in the sum is finite.

    Example:
        >>> simple_normaliser(torch.zeros(1, 2, 5), torch.ones(1, 3, 5)).shape
        torch.Size([1, 3, 2])
    """
    normaliser: Tensor = torch.ops.transducer_toolkit.simple_normaliser(
        lm.contiguous(), am.contiguous()
    )[0]
    return normaliser


def _flush(values: Tensor) -> Tensor:
    """Subnormals become zero, in place; NaN stays."""
    return torch.ops.aten.hardshrink.out(values, torch.finfo(values.dtype).tiny, out=values)


def _probabilities(scores: Tensor) -> Tensor:
    """exp(scores - max), subnormals as zero: they would slow the product down many times."""
    probabilities = (scores - scores.amax(-1, keepdim=True)).exp_()
    return _flush(probabilities)


def _threshold(scores: Tensor) -> float:
    # Each of V products may have lost up to `tiny`: above this they are one rounding error.
    limits = torch.finfo(scores.dtype)
    return scores.size(-1) * limits.tiny / limits.eps


def _forward(lm: Tensor, am: Tensor) -> tuple[Tensor, Tensor]:
    """The normaliser (B,T,U+1) float64, and the product of exponentials."""
    with torch.autocast(am.device.type, enabled=False):
        product = torch.bmm(_probabilities(am), _probabilities(lm).transpose(1, 2))
    # V-free from here, so in float64: scores are differences of large numbers.
    lm_max, am_max = (x.amax(-1, keepdim=True).to(native.SCORE_DTYPE) for x in (lm, am))
    normaliser = product.to(native.SCORE_DTYPE).log() + (am_max + lm_max.transpose(1, 2))
    native.repair_normaliser(am, lm, product, _threshold(am), normaliser)
    return normaliser, product


torch.library.custom_op(
    "transducer_toolkit::simple_normaliser",
    _forward,
    mutates_args=(),
    schema="(Tensor lm, Tensor am) -> (Tensor, Tensor)",
)


@torch.library.register_fake("transducer_toolkit::simple_normaliser")
def _forward_fake(lm, am):
    shape = (am.size(0), am.size(1), lm.size(1))
    return am.new_empty(shape, dtype=native.SCORE_DTYPE), am.new_empty(shape)


def _backward(
    lm: Tensor, am: Tensor, normaliser: Tensor, product: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor]:
    # An upstream gradient of 10^30 over a product near the threshold would overflow float32.
    scale = grad.abs().amax((1, 2), keepdim=True)
    scale = torch.where(scale > 0, scale, 1.0)
    grad = (grad / scale).contiguous()
    threshold = _threshold(am)
    weight = torch.where(product < threshold, 0.0, grad / product).to(am.dtype)
    am_probs, lm_probs = _probabilities(am), _probabilities(lm)
    with torch.autocast(am.device.type, enabled=False):
        grad_am = torch.bmm(weight, lm_probs).mul_(am_probs)
        grad_lm = torch.bmm(weight.transpose(1, 2), am_probs).mul_(lm_probs)
    native.repair_normaliser_backward(
        am, lm, product, threshold, normaliser, grad, grad_am, grad_lm
    )
    # Nothing asked for (a NaN loss that was masked out): zero, not 0 * NaN.
    is_idle = (grad == 0).all(-1, keepdim=True).all(-2, keepdim=True)
    scale = scale.to(am.dtype)
    grad_lm, grad_am = (_flush(x.mul_(scale)) for x in (grad_lm, grad_am))
    if not is_idle.is_cpu or bool(is_idle.any()):  # only on the CPU is looking free
        grad_lm.masked_fill_(is_idle, 0.0)
        grad_am.masked_fill_(is_idle, 0.0)
    return grad_lm, grad_am


torch.library.custom_op(
    "transducer_toolkit::simple_normaliser_backward",
    _backward,
    mutates_args=(),
    schema="(Tensor lm, Tensor am, Tensor normaliser, Tensor product, Tensor grad) "
    "-> (Tensor, Tensor)",
)


@torch.library.register_fake("transducer_toolkit::simple_normaliser_backward")
def _backward_fake(lm, am, normaliser, product, grad):
    return torch.empty_like(lm), torch.empty_like(am)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs, *output)


def _differentiate(ctx, grad, _):
    return torch.ops.transducer_toolkit.simple_normaliser_backward(*ctx.saved_tensors, grad)


def _refuse_second_derivative(ctx, *grads):
    raise RuntimeError(
        "simple_normaliser: the gradient of the gradient (create_graph=True) is not implemented"
    )


torch.library.register_autograd(
    "transducer_toolkit::simple_normaliser", _differentiate, setup_context=_setup_context
)
torch.library.register_autograd(
    "transducer_toolkit::simple_normaliser_backward", _refuse_second_derivative
)
