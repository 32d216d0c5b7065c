# SPDX-License-Identifier: Apache-2.0
"""Scores of all cells of an additive joiner from one batched product of exponentials."""

from __future__ import annotations

import torch
from torch import Tensor

from transducer_toolkit.ops import additive_stages, native


def additive_scores(
    contexts: Tensor,
    am: Tensor,
    symbols: Tensor,
    context_blank: Tensor,
    context_label: Tensor,
    *,
    blank: int,
    combined_scale: float,
    am_only_scale: float,
) -> tuple[Tensor, Tensor]:
    """Blank and label scores, without the logits ``am[b, t] + contexts[b, k]``; differentiable.

    ::

        N[t, k]     = logsumexp_v(am[t, v] + contexts[k, v])
                    = log(exp(am - max am) @ exp(contexts - max contexts)^T) + max am + max contexts
        common      = -combined_scale * N[t, u] - am_only_scale * N[t, S + 1]
        blank[t, u] = am_scale * am[t, blank]      + context_blank[u] + common
        label[t, u] = am_scale * am[t, symbols[u]] + context_label[u] + common

    with ``am_scale = combined_scale + am_only_scale``; a term of scale zero is left out. Where the
    product has lost digits to underflow (am and a context have their maxima at different symbols)
    the cell is computed again, term by term, in value and in gradient.

    Args:
        contexts: (B, S + 1, V) float32 or float64, and with an am_only_scale one row more. -inf
            means probability zero.
        am: (B, T, V), same dtype and device.
        symbols: (B, S) int64 in [0, V).
        context_blank: (B, S + 1) float64.
        context_label: (B, S) float64.
        blank: in [0, V).
        combined_scale: >= 0.
        am_only_scale: >= 0.

    Returns:
        (B, T, S + 1) and (B, T, S) float64. NaN where am or contexts hold NaN or +inf, or nothing
        in the sum is finite.

    Example:
        >>> lm, am = torch.zeros(1, 2, 5), torch.ones(1, 3, 5)
        >>> nothing = torch.zeros(1, 2, dtype=torch.float64)
        >>> blank, label = additive_scores(
        ...     lm, am, torch.tensor([[4]]), nothing, nothing[:, :1],
        ...     blank=0, combined_scale=1.0, am_only_scale=0.0,
        ... )
        >>> blank.shape, label.shape, round(blank.exp()[0, 0, 0].item(), 4)
        (torch.Size([1, 3, 2]), torch.Size([1, 3, 1]), 0.2)
    """
    blank_score, label_score, _, _ = torch.ops.transducer_toolkit.additive_scores(
        contexts.contiguous(),
        am.contiguous(),
        symbols,
        context_blank.contiguous(),
        context_label.contiguous(),
        blank,
        combined_scale,
        am_only_scale,
    )
    return blank_score, label_score


def _shifted_exp(rows: Tensor) -> tuple[Tensor, Tensor]:
    """exp(rows - max), subnormals as zero (they would slow the product down), and max (B, N)."""
    if additive_stages.runs_here(rows):
        return additive_stages.shifted_exp(rows)
    maxima = rows.amax(-1, keepdim=True)
    exponentials = (rows - maxima).exp_()
    return _flush(exponentials), maxima.squeeze(-1)


def _flush(values: Tensor) -> Tensor:
    """Subnormals become zero, in place; NaN stays."""
    return torch.ops.aten.hardshrink.out(values, torch.finfo(values.dtype).tiny, out=values)


def _forward(
    contexts: Tensor,
    am: Tensor,
    symbols: Tensor,
    context_blank: Tensor,
    context_label: Tensor,
    blank: int,
    combined_scale: float,
    am_only_scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Scores of blank and labels, the normaliser, and the product of exponentials."""
    with torch.autocast(am.device.type, enabled=False):
        am_exp, am_max = _shifted_exp(am)
        lm_exp, lm_max = _shifted_exp(contexts)
        product = torch.bmm(am_exp, lm_exp.transpose(1, 2))
    if additive_stages.runs_here(am):
        stages = additive_stages.AdditiveStages(
            *(contexts, am, product, symbols, context_blank, context_label),
            blank=blank,
            combined_scale=combined_scale,
            am_only_scale=am_only_scale,
        )
        normaliser, blank_score, label_score = stages.scores(am_max, lm_max)
        return blank_score, label_score, normaliser, product

    # V-free from here, so in float64: scores are differences of large numbers.
    score, num_symbols = native.SCORE_DTYPE, symbols.size(1)
    normaliser = product.to(score).log()
    normaliser += am_max.to(score)[:, :, None] + lm_max.to(score)[:, None, :]
    lowest = additive_stages.lowest_product(am)
    additive_stages.repair_normaliser(am, contexts, product, lowest, normaliser)
    common = normaliser.new_zeros(am.size(0), am.size(1), num_symbols + 1)
    if combined_scale != 0:
        common -= combined_scale * normaliser[:, :, : num_symbols + 1]
    if am_only_scale != 0:
        common -= am_only_scale * normaliser[:, :, -1:]
    blank_score = common + context_blank[:, None]
    label_score = common[:, :, :-1] + context_label[:, None]
    if combined_scale + am_only_scale != 0:
        am_label = pick_rows(am.transpose(1, 2), symbols).transpose(1, 2)
        blank_score += (combined_scale + am_only_scale) * am[:, :, blank, None].to(score)
        label_score += (combined_scale + am_only_scale) * am_label.to(score)
    return blank_score, label_score, normaliser, product


torch.library.custom_op(
    "transducer_toolkit::additive_scores",
    _forward,
    mutates_args=(),
    schema="(Tensor contexts, Tensor am, Tensor symbols, Tensor context_blank, "
    "Tensor context_label, int blank, float combined_scale, float am_only_scale) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
)


@torch.library.register_fake("transducer_toolkit::additive_scores")
def _forward_fake(contexts, am, symbols, context_blank, context_label, *options):
    size = am.size(0), am.size(1)
    widths = symbols.size(1) + 1, symbols.size(1), contexts.size(1)
    scores = (context_blank.new_empty(*size, width) for width in widths)
    return *scores, am.new_empty(*size, contexts.size(1))


def _backward(
    contexts: Tensor,
    am: Tensor,
    symbols: Tensor,
    context_blank: Tensor,
    context_label: Tensor,
    normaliser: Tensor,
    product: Tensor,
    grad_blank: Tensor,
    grad_label: Tensor,
    blank: int,
    combined_scale: float,
    am_only_scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of contexts, am, context_blank and context_label."""
    grad_blank, grad_label = grad_blank.contiguous(), grad_label.contiguous()
    if additive_stages.runs_here(am):
        stages = additive_stages.AdditiveStages(
            *(contexts, am, product, symbols, context_blank, context_label),
            blank=blank,
            combined_scale=combined_scale,
            am_only_scale=am_only_scale,
        )
        grad, scale, weight, grad_context_blank, grad_context_label = stages.weights(
            grad_blank, grad_label
        )
        (am_exp, _), (lm_exp, _) = _shifted_exp(am), _shifted_exp(contexts)
        with torch.autocast(am.device.type, enabled=False):
            grad_am = torch.bmm(weight, lm_exp)
            grad_lm = torch.bmm(weight.transpose(1, 2), am_exp)
        stages.gradients(
            am_exp=am_exp,
            lm_exp=lm_exp,
            normaliser=normaliser,
            grad_blank=grad_blank,
            grad_label=grad_label,
            grad_normaliser=grad,
            scale=scale,
            grad_am=grad_am,
            grad_lm=grad_lm,
        )
        return grad_lm, grad_am, grad_context_blank, grad_context_label

    of_cell = torch.cat([grad_blank[:, :, :-1] + grad_label, grad_blank[:, :, -1:]], 2)
    grad = -combined_scale * of_cell
    if am_only_scale != 0:
        grad = torch.cat([grad, -am_only_scale * of_cell.sum(2, keepdim=True)], 2)
    # An upstream gradient of 10^30 over a product near the threshold would overflow float32.
    scale = grad.abs().amax((1, 2), keepdim=True)
    is_idle = scale == 0
    scale = torch.where(scale > 0, scale, 1.0)
    lowest = additive_stages.lowest_product(am)
    weight = torch.where((product < lowest) | (grad == 0), 0.0, grad / scale / product).to(am.dtype)
    (am_exp, _), (lm_exp, _) = _shifted_exp(am), _shifted_exp(contexts)
    with torch.autocast(am.device.type, enabled=False):
        grad_am = torch.bmm(weight, lm_exp).mul_(am_exp)
        grad_lm = torch.bmm(weight.transpose(1, 2), am_exp).mul_(lm_exp)
    scale = scale.to(am.dtype)
    # Nothing asked for (a NaN loss that was masked out): zero, not 0 * NaN.
    grad_am, grad_lm = (_flush(x.mul_(scale)).masked_fill_(is_idle, 0) for x in (grad_am, grad_lm))
    am_scale = combined_scale + am_only_scale
    if am_scale != 0:
        grad_am[:, :, blank] += (am_scale * grad_blank.sum(2)).to(am.dtype)
        utterances = torch.arange(len(am), device=am.device)[:, None]
        picked = (am_scale * grad_label).transpose(1, 2).to(am.dtype)
        # Indexing, not scatter_add: on CUDA it adds in the same order each time.
        grad_am.transpose(1, 2).index_put_((utterances, symbols), picked, accumulate=True)
    additive_stages.repair_normaliser_backward(
        am, contexts, product, lowest, normaliser, grad.contiguous(), grad_am, grad_lm
    )
    return grad_lm, grad_am, grad_blank.sum(1), grad_label.sum(1)


torch.library.custom_op(
    "transducer_toolkit::additive_scores_backward",
    _backward,
    mutates_args=(),
    schema="(Tensor contexts, Tensor am, Tensor symbols, Tensor context_blank, "
    "Tensor context_label, Tensor normaliser, Tensor product, Tensor grad_blank, "
    "Tensor grad_label, int blank, float combined_scale, float am_only_scale) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
)


@torch.library.register_fake("transducer_toolkit::additive_scores_backward")
def _backward_fake(contexts, am, symbols, context_blank, context_label, *arguments):
    return tuple(torch.empty_like(x) for x in (contexts, am, context_blank, context_label))


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:5], *output[2:])
    ctx.options = inputs[5:]


def _differentiate(ctx, grad_blank, grad_label, *_):
    grad_lm, grad_am, *grad_context = torch.ops.transducer_toolkit.additive_scores_backward(
        *ctx.saved_tensors, grad_blank, grad_label, *ctx.options
    )
    return grad_lm, grad_am, None, *grad_context, None, None, None


def _refuse_second_derivative(ctx, *grads):
    raise RuntimeError(
        "rnnt_loss_simple, rnnt_loss_smoothed, get_rnnt_logprobs: the gradient of the gradient "
        "(create_graph=True) is not implemented"
    )


torch.library.register_autograd(
    "transducer_toolkit::additive_scores", _differentiate, setup_context=_setup_context
)
torch.library.register_autograd(
    "transducer_toolkit::additive_scores_backward", _refuse_second_derivative
)


def pick_rows(rows: Tensor, index: Tensor) -> Tensor:
    """``out[b, i] = rows[b, index[b, i]]``; an index may come several times.

    On CUDA the backwards of ``gather`` and ``index_select`` add with atomics, in whatever order
    they arrive; that of indexing sorts first. On the CPU ``index_select`` copies whole rows, where
    there are such: several times as fast as ``gather``.

    Args:
        rows: (B, N, D).
        index: (B, M) int64 in [0, N).

    Returns:
        (B, M, D).

    Example:
        >>> pick_rows(torch.tensor([[[1.0], [2.0]]]), torch.tensor([[1, 0, 1]])).flatten()
        tensor([2., 1., 2.])
    """
    if rows.is_cuda:
        utterances = torch.arange(rows.size(0), device=rows.device)[:, None]
        return rows[utterances, index]
    if rows.is_contiguous():
        first = torch.arange(rows.size(0), device=rows.device)[:, None] * rows.size(1)
        picked = rows.flatten(0, 1).index_select(0, (first + index).flatten())
        return picked.view(*index.shape, rows.size(2))
    return rows.gather(1, index[:, :, None].expand(-1, -1, rows.size(2)))
