# SPDX-License-Identifier: Apache-2.0
"""Scores and losses of an additive joiner, from one batched product of exponentials."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from transducer_toolkit.ops import native, stages
from transducer_toolkit.ops.additive_stages import (
    AdditiveInputs,
    AdditiveOptions,
    AdditiveStages,
    ScoreGrads,
)
from transducer_toolkit.ops.boundary import check_symbols
from transducer_toolkit.ops.lattice import CellScores, LatticeBatch
from transducer_toolkit.ops.options import LossOptions
from transducer_toolkit.ops.registration import Backward, Derivative, NoPlan, Operator


@dataclass(frozen=True)
class AdditiveLossOptions(AdditiveOptions):
    """Options of :func:`additive_losses`: those of the scores, and those of the lattice.

    Attributes:
        topology: one of K2_TOPOLOGIES.
        delay_penalty: as in LossOptions, counted in frames of the tensor.
    """

    topology: str
    delay_penalty: float


class AdditivePlan(NamedTuple):
    """Whether to compute the posteriors. Every gradient needs them."""

    with_uses: bool


class AdditiveScores(NamedTuple):
    """Result of the operator of :func:`additive_scores`.

    Attributes:
        blank: (B, T, S + 1) float64, blank scores.
        label: (B, T, S + 1) float64, label scores, -inf in the last column.
        normalizer: (B, T, columns) float64, one column for each context.
        product: (B, T, columns), the product of the exponentials.
    """

    blank: Tensor
    label: Tensor
    normalizer: Tensor
    product: Tensor


class AdditiveLosses(NamedTuple):
    """Result of the operator of :func:`additive_losses`.

    Attributes:
        losses: (B,) float64, differentiable.
        use_blank: (B, T, S + 1) float64, expected uses of the blank scores; zero in padding.
        use_label: (B, T, S + 1) float64, expected uses of the label scores; zero in padding.
        normalizer: as in AdditiveScores.
        product: as in AdditiveScores.

    All but the losses have no elements unless the plan wants the uses.
    """

    losses: Tensor
    use_blank: Tensor
    use_label: Tensor
    normalizer: Tensor
    product: Tensor


def additive_scores(inputs: AdditiveInputs, options: AdditiveOptions) -> tuple[Tensor, Tensor]:
    """Returns blank and label scores without the logits ``am[b, t] + contexts[b, k]``.

    ::

        N[t, k]        = logsumexp_v(am[t, v] + contexts[k, v])
                       = log(exp(am - max am) @ exp(contexts - max contexts)^T)
                         + max am + max contexts
        score[t, u, v] = combined_scale * (am[t, v] + contexts[u, v] - N[t, u])
                         + lm_only_scale * log_softmax(contexts[u])[v]
                         + am_only_scale * (am[t, v] + contexts[S + 1, v] - N[t, S + 1])

    A term of scale zero is omitted. Rows outside of the boundary are taken for zeros and get no
    gradient.

    If am and a context have their maxima at different symbols, the product may underflow. The
    normalizer of such a cell, and its gradient, are computed again, term by term.

    Args:
        inputs: the tensors. Values on the CPU are checked.
        options: blank and the scales.

    Returns:
        Blank scores (B, T, S + 1) and label scores (B, T, S), float64, differentiable. A score is
        NaN if its row of am or contexts contains NaN or +inf, or if no term of the sum is finite,
        or if its symbol is not in [0, V).

    Example:
        >>> lm, am = torch.zeros(1, 2, 5), torch.ones(1, 3, 5)
        >>> blank, label = additive_scores(
        ...     AdditiveInputs(lm, am, torch.tensor([[4]]), torch.tensor([[0, 0, 1, 3]])),
        ...     AdditiveOptions(0, combined_scale=1.0, lm_only_scale=0.0, am_only_scale=0.0),
        ... )
        >>> blank.shape, label.shape, round(blank.exp()[0, 0, 0].item(), 4)
        (torch.Size([1, 3, 2]), torch.Size([1, 3, 1]), 0.2)
    """
    scores = scores_operator(_contiguous(inputs), options, NoPlan())
    return scores.blank, scores.label[:, :, :-1]


def additive_losses(
    inputs: AdditiveInputs, options: AdditiveLossOptions, *, with_uses: bool
) -> AdditiveLosses:
    """Returns the losses of the scores of :func:`additive_scores`, differentiable.

    Args:
        inputs: as in :func:`additive_scores`. An utterance without a path is an error, if the
            boundary is on the CPU.
        options: those of the scores and of the lattice.
        with_uses: the caller wants the posteriors.
    """
    needs_gradient = torch.is_grad_enabled() and (
        inputs.contexts.requires_grad or inputs.am.requires_grad
    )
    return operator(_contiguous(inputs), options, AdditivePlan(with_uses or needs_gradient))


def _contiguous(inputs: AdditiveInputs) -> AdditiveInputs:
    contexts, am, symbols, boundary = inputs
    return AdditiveInputs(
        contexts.contiguous(), am.contiguous(), symbols.contiguous(), boundary.contiguous()
    )


def _validate(inputs: AdditiveInputs, topology: str) -> None:
    check_symbols(
        inputs.symbols,
        inputs.boundary,
        max_frames=inputs.am.size(1),
        vocab_size=inputs.am.size(2),
        topology=topology,
    )


# --- scores ---------------------------------------------------------------------------------------


def _scores_forward(
    inputs: AdditiveInputs, options: AdditiveOptions, plan: NoPlan
) -> AdditiveScores:
    _validate(inputs, "")
    return AdditiveScores(*AdditiveStages(inputs, options, with_scores=True).scores())


def _scores_fake(inputs: AdditiveInputs, options: AdditiveOptions, plan: NoPlan) -> AdditiveScores:
    contexts, am, symbols, _ = inputs
    grid = am.size(0), am.size(1), symbols.size(1) + 1
    cells = am.size(0), am.size(1), contexts.size(1)
    return AdditiveScores(
        am.new_empty(grid, dtype=native.SCORE_DTYPE),
        am.new_empty(grid, dtype=native.SCORE_DTYPE),
        am.new_empty(cells, dtype=native.SCORE_DTYPE),
        am.new_empty(cells),
    )


def _scores_backward(call: Backward) -> dict[str, Tensor]:
    inputs, normalizer = call.inputs, call.outputs.normalizer
    size = *inputs.am.shape[:2], inputs.symbols.size(1) + 1
    blank, label = (
        grad if grad.numel() else normalizer.new_zeros(size) for grad in call.grads.values()
    )
    factor = torch.maximum(blank.abs().amax((1, 2)), label.abs().amax((1, 2)))
    scale = torch.where(factor > 0, factor, 1.0)[:, None, None]
    grads = ScoreGrads((blank / scale).contiguous(), (label / scale).contiguous(), factor)
    stage = AdditiveStages(inputs, call.options, with_scores=False)
    grad_contexts, grad_am = stage.gradients(call.outputs.product, normalizer, grads)
    return {"contexts": grad_contexts, "am": grad_am}


scores_operator = Operator(
    "additive_scores",
    (AdditiveInputs, AdditiveOptions, NoPlan, AdditiveScores),
    forward=_scores_forward,
    fake=_scores_fake,
    derivative=Derivative(
        backward=_scores_backward,
        of=("contexts", "am"),
        through=("blank", "label"),
        unsaved=("blank", "label"),
    ),
    functions="get_rnnt_logprobs, get_rnnt_logprobs_smoothed",
)


# --- losses ---------------------------------------------------------------------------------------


def _forward(
    inputs: AdditiveInputs, options: AdditiveLossOptions, plan: AdditivePlan
) -> AdditiveLosses:
    _validate(inputs, options.topology)
    stage = AdditiveStages(inputs, options, with_scores=True)
    blank, label, normalizer, product = stage.scores()
    lattices = stage.lattices
    del stage  # frees the exponentials
    losses, use_blank, use_label = stages.lattice(
        CellScores(blank, label, normalizer),
        LatticeBatch.of_grid(lattices, blank.size(1), blank.size(2) - 1),
        LossOptions(blank=0, topology=options.topology, delay_penalty=options.delay_penalty),
        with_uses=plan.with_uses,
        exact=inputs.am.dtype == torch.float64,
    )
    if not plan.with_uses:
        nothing = normalizer.new_empty(0), product.new_empty(0)
        return AdditiveLosses(losses, use_blank, use_label, *nothing)
    size = blank.shape
    return AdditiveLosses(losses, use_blank.view(size), use_label.view(size), normalizer, product)


def _fake(
    inputs: AdditiveInputs, options: AdditiveLossOptions, plan: AdditivePlan
) -> AdditiveLosses:
    losses = inputs.am.new_empty(inputs.am.size(0), dtype=native.SCORE_DTYPE)
    if plan.with_uses:
        blank, label, normalizer, product = _scores_fake(inputs, options, NoPlan())
        return AdditiveLosses(losses, blank, label, normalizer, product)
    empty = losses.new_empty
    return AdditiveLosses(losses, empty(0), empty(0), empty(0), inputs.am.new_empty(0))


def _backward(call: Backward) -> dict[str, Tensor]:
    saved = call.outputs
    factor = call.grads["losses"].neg().contiguous()
    grads = ScoreGrads(saved.use_blank, saved.use_label, factor)
    stage = AdditiveStages(call.inputs, call.options, with_scores=False)
    grad_contexts, grad_am = stage.gradients(saved.product, saved.normalizer, grads)
    return {"contexts": grad_contexts, "am": grad_am}


operator = Operator(
    "additive_losses",
    (AdditiveInputs, AdditiveLossOptions, AdditivePlan, AdditiveLosses),
    forward=_forward,
    fake=_fake,
    derivative=Derivative(
        backward=_backward,
        of=("contexts", "am"),
        through=("losses",),
        unsaved=("losses",),
    ),
    functions="rnnt_loss_simple, rnnt_loss_smoothed",
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
