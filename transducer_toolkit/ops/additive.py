# SPDX-License-Identifier: Apache-2.0
"""The scores of all cells of an additive joiner, from one batched product of exponentials."""

from __future__ import annotations

import torch
from torch import Tensor

from transducer_toolkit.ops import additive_stages, native
from transducer_toolkit.ops.additive_stages import AdditiveInputs, AdditiveOptions, AdditiveScores
from transducer_toolkit.ops.registration import Backward, Derivative, NoPlan, Operator


def additive_scores(inputs: AdditiveInputs, options: AdditiveOptions) -> tuple[Tensor, Tensor]:
    """Returns blank and label scores without the logits ``am[b, t] + contexts[b, k]``.

    ::

        N[t, k]     = logsumexp_v(am[t, v] + contexts[k, v])
                    = log(exp(am - max am) @ exp(contexts - max contexts)^T) + max am + max contexts
        common      = -combined_scale * N[t, u] - am_only_scale * N[t, S + 1]
        blank[t, u] = am_scale * am[t, blank]      + context_blank[u] + common
        label[t, u] = am_scale * am[t, symbols[u]] + context_label[u] + common

    with ``am_scale = combined_scale + am_only_scale``. A term of scale zero is omitted.

    If am and a context have their maxima at different symbols, the product may underflow. The
    normalizer of such a cell, and its gradient, are computed again, term by term.

    Args:
        inputs: the tensors.
        options: blank and the two scales.

    Returns:
        Blank scores (B, T, S + 1) and label scores (B, T, S), float64, differentiable. A score is
        NaN if its row of am or contexts contains NaN or +inf, or if no term of the sum is finite.

    Example:
        >>> lm, am = torch.zeros(1, 2, 5), torch.ones(1, 3, 5)
        >>> nothing = torch.zeros(1, 2, dtype=torch.float64)
        >>> blank, label = additive_scores(
        ...     AdditiveInputs(lm, am, torch.tensor([[4]]), nothing, nothing[:, :1]),
        ...     AdditiveOptions(blank=0, combined_scale=1.0, am_only_scale=0.0),
        ... )
        >>> blank.shape, label.shape, round(blank.exp()[0, 0, 0].item(), 4)
        (torch.Size([1, 3, 2]), torch.Size([1, 3, 1]), 0.2)
    """
    contiguous = AdditiveInputs(
        inputs.contexts.contiguous(),
        inputs.am.contiguous(),
        inputs.symbols,
        inputs.context_blank.contiguous(),
        inputs.context_label.contiguous(),
    )
    scores = operator(contiguous, options, NoPlan())
    return scores.blank, scores.label


def _shifted_exp(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Returns exp(rows - max) and max (B, N). Subnormals, which slow products down, become 0."""
    if additive_stages.runs_here(rows):
        return additive_stages.shifted_exp(rows)
    maxima = rows.amax(-1, keepdim=True)
    exponentials = (rows - maxima).exp_()
    return _flush(exponentials), maxima.squeeze(-1)


def _flush(values: Tensor) -> Tensor:
    """Sets subnormals to zero in place. NaN stays NaN."""
    return torch.ops.aten.hardshrink.out(values, torch.finfo(values.dtype).tiny, out=values)


def _forward(inputs: AdditiveInputs, options: AdditiveOptions, plan: NoPlan) -> AdditiveScores:
    contexts, am, symbols, context_blank, context_label = inputs
    with torch.autocast(am.device.type, enabled=False):
        am_exp, am_max = _shifted_exp(am)
        lm_exp, lm_max = _shifted_exp(contexts)
        product = torch.bmm(am_exp, lm_exp.transpose(1, 2))
    if additive_stages.runs_here(am):
        stages = additive_stages.AdditiveStages(inputs, product, options)
        normalizer, blank_score, label_score = stages.scores(am_max, lm_max)
        return AdditiveScores(blank_score, label_score, normalizer, product)

    # In float64, because scores are differences of large numbers. No tensor below has an axis V.
    score, num_symbols = native.SCORE_DTYPE, symbols.size(1)
    normalizer = product.to(score).log()
    normalizer += am_max.to(score)[:, :, None] + lm_max.to(score)[:, None, :]
    lowest = additive_stages.lowest_product(am)
    additive_stages.repair_normalizer((am, contexts, product), lowest, normalizer)
    common = normalizer.new_zeros(am.size(0), am.size(1), num_symbols + 1)
    if options.combined_scale != 0:
        common -= options.combined_scale * normalizer[:, :, : num_symbols + 1]
    if options.am_only_scale != 0:
        common -= options.am_only_scale * normalizer[:, :, -1:]
    blank_score = common + context_blank[:, None]
    label_score = common[:, :, :-1] + context_label[:, None]
    am_scale = options.combined_scale + options.am_only_scale
    if am_scale != 0:
        am_label = pick_rows(am.transpose(1, 2), symbols).transpose(1, 2)
        blank_score += am_scale * am[:, :, options.blank, None].to(score)
        label_score += am_scale * am_label.to(score)
    return AdditiveScores(blank_score, label_score, normalizer, product)


def _fake(inputs: AdditiveInputs, options: AdditiveOptions, plan: NoPlan) -> AdditiveScores:
    contexts, am, symbols = inputs.contexts, inputs.am, inputs.symbols
    size = am.size(0), am.size(1)
    like = inputs.context_blank
    return AdditiveScores(
        like.new_empty(*size, symbols.size(1) + 1),
        like.new_empty(*size, symbols.size(1)),
        like.new_empty(*size, contexts.size(1)),
        am.new_empty(*size, contexts.size(1)),
    )


def _backward(call: Backward) -> dict[str, Tensor]:
    inputs, options = call.inputs, call.options
    contexts, am, symbols = inputs.contexts, inputs.am, inputs.symbols
    normalizer, product = call.outputs.normalizer, call.outputs.product
    columns = {"blank": symbols.size(1) + 1, "label": symbols.size(1)}
    grad_blank, grad_label = (
        grad.contiguous() if grad.numel() else normalizer.new_zeros(*am.shape[:2], columns[name])
        for name, grad in call.grads.items()
    )
    if additive_stages.runs_here(am):
        stages = additive_stages.AdditiveStages(inputs, product, options)
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
            normalizer=normalizer,
            grad_blank=grad_blank,
            grad_label=grad_label,
            grad_normalizer=grad,
            scale=scale,
            grad_am=grad_am,
            grad_lm=grad_lm,
        )
        return {
            "contexts": grad_lm,
            "am": grad_am,
            "context_blank": grad_context_blank,
            "context_label": grad_context_label,
        }

    of_cell = torch.cat([grad_blank[:, :, :-1] + grad_label, grad_blank[:, :, -1:]], 2)
    grad = -options.combined_scale * of_cell
    if options.am_only_scale != 0:
        grad = torch.cat([grad, -options.am_only_scale * of_cell.sum(2, keepdim=True)], 2)
    # Scaled, because an upstream gradient of 1e30 divided by a product near the threshold would
    # overflow float32.
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
    # An utterance with upstream gradient 0, such as a masked NaN loss, gets gradient 0. The
    # products would give 0 * NaN = NaN.
    grad_am, grad_lm = (_flush(x.mul_(scale)).masked_fill_(is_idle, 0) for x in (grad_am, grad_lm))
    am_scale = options.combined_scale + options.am_only_scale
    if am_scale != 0:
        grad_am[:, :, options.blank] += (am_scale * grad_blank.sum(2)).to(am.dtype)
        utterances = torch.arange(len(am), device=am.device)[:, None]
        picked = (am_scale * grad_label).transpose(1, 2).to(am.dtype)
        # Indexing, because scatter_add on CUDA adds in a random order.
        grad_am.transpose(1, 2).index_put_((utterances, symbols), picked, accumulate=True)
    additive_stages.repair_normalizer_backward(
        (am, contexts, product), lowest, normalizer, grad.contiguous(), (grad_am, grad_lm)
    )
    return {
        "contexts": grad_lm,
        "am": grad_am,
        "context_blank": grad_blank.sum(1),
        "context_label": grad_label.sum(1),
    }


operator = Operator(
    "additive_scores",
    (AdditiveInputs, AdditiveOptions, NoPlan, AdditiveScores),
    forward=_forward,
    fake=_fake,
    derivative=Derivative(
        backward=_backward,
        of=("contexts", "am", "context_blank", "context_label"),
        through=("blank", "label"),
        unsaved=("blank", "label"),
    ),
    functions="rnnt_loss_simple, rnnt_loss_smoothed, get_rnnt_logprobs",
)


def pick_rows(rows: Tensor, index: Tensor) -> Tensor:
    """Returns ``out[b, i] = rows[b, index[b, i]]``. The same index may occur several times.

    On CUDA, the function uses indexing, whose backward adds in a fixed order. The backwards of
    ``gather`` and ``index_select`` add with atomics, in a random order. On the CPU, it uses
    ``index_select`` for contiguous rows, which copies whole rows and is several times as fast as
    ``gather``.

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
