# SPDX-License-Identifier: Apache-2.0
"""Transducer losses of an additive joiner, simple and smoothed, with k2's names and arguments."""

from __future__ import annotations

import torch
from torch import Tensor

from transducer_toolkit.ops import checks, native
from transducer_toolkit.ops.additive import AdditiveLossOptions, additive_losses, additive_scores
from transducer_toolkit.ops.additive_stages import AdditiveOptions
from transducer_toolkit.ops.recursion import append_one, posteriors_of_symbols_and_frames
from transducer_toolkit.ops.simple_scores import (
    SimpleInputs,
    SimpleOptions,
    additive_inputs,
    check_inputs,
)

LossAndGrads = tuple[Tensor, tuple[Tensor, Tensor]]


def rnnt_loss_simple(
    lm: Tensor,
    am: Tensor,
    symbols: Tensor,
    termination_symbol: int,
    boundary: Tensor | None = None,
    rnnt_type: str = "regular",
    delay_penalty: float = 0.0,
    reduction: str = "mean",
    return_grad: bool = False,
) -> Tensor | LossAndGrads:
    """Computes the transducer loss of ``logits[b, t, u] = am[b, t] + lm[b, u]`` without the logits.

    One batched matrix product computes the normalizers of all cells. The memory is therefore
    ``B * (T + U) * V`` and ``B * T * U`` instead of ``B * T * U * V``. Cells whose product
    underflows are computed again, term by term. Float32 products obey
    ``torch.set_float32_matmul_precision``; a precision below "highest" makes the loss less exact.

    With ``return_grad``, the function also returns posteriors, from which
    :func:`~transducer_toolkit.get_rnnt_prune_ranges` selects the cells of a pruned loss.

    ==============  ============================  ==============================================
    rnnt_type       a symbol at frame t leads to  score of the symbol
    ==============  ============================  ==============================================
    "regular"       frame t                       its log-probability
    "modified"      frame t + 1                   its log-probability
    "constrained"   frame t + 1                   its log-probability, plus that of the
                                                  termination symbol that follows it at frame t
    ==============  ============================  ==============================================

    Args:
        lm: (B, S + 1, V), predictor (language model) part of the unnormalized log-probabilities;
            float16, bfloat16, float32 or float64. 16-bit inputs are computed in float32. -inf means
            probability zero.
        am: (B, T, V), encoder (acoustic model) part; same dtype and device. Under autocast, the
            dtypes may differ; the wider one is used.
        symbols: (B, S) int32 or int64 in [0, V), on the device of am.
        termination_symbol: the blank, in [0, V).
        boundary: (B, 4) int32 or int64 rows ``[s_begin, t_begin, s_end, t_end]``, on the CPU or
            the device of am; None for ``[0, 0, S, T]``. lm, am and symbols outside of the boundary
            may hold any value. "modified" and "constrained" need at least as many frames as
            symbols.
        rnnt_type: "regular", "modified" or "constrained", see the table.
        delay_penalty: >= 0; adds ``delay_penalty * ((t_end - 1) / 2 - t)`` to the score of every
            symbol at frame t.
        reduction: "none" (B,), "mean" over utterances, or "sum".
        return_grad: also return posteriors.

    Returns:
        The loss in nats, float64 for float64 inputs and float32 otherwise. An utterance without a
        path has loss +inf and zero gradient. If the scores of an utterance contain NaN, +inf or a
        row of -inf, its loss is NaN; other utterances are not affected.

        With ``return_grad``, a pair of the loss and ``(px_grad, py_grad)``. px_grad contains the
        posteriors of the symbols, (B, S, T + 1) for "regular" and (B, S, T) otherwise. py_grad
        contains the posteriors of the termination symbols, (B, S + 1, T), except those that
        "constrained" adds after a symbol.

    Raises:
        TypeError: if an argument is not a tensor, or has the wrong dtype.
        ValueError: if shapes, devices or options do not fit, or a value on the CPU is out of
            range; names the argument or the utterance.
        RuntimeError: if this build has no stages for the device, or on a second derivative.

    Example:
        >>> lm, am = torch.zeros(1, 3, 5), torch.zeros(1, 4, 5)
        >>> symbols = torch.tensor([[1, 2]])
        >>> rnnt_loss_simple(lm, am, symbols, termination_symbol=0)  # 6 log 5 - log 10
        tensor(7.3540)
        >>> _, (px_grad, py_grad) = rnnt_loss_simple(
        ...     lm, am, symbols, termination_symbol=0, return_grad=True
        ... )
        >>> px_grad.shape, round(py_grad.sum().item(), 4)  # 4 frames, 4 termination symbols
        (torch.Size([1, 2, 5]), 4.0)

    Source:
        F. Kuang et al., "Pruned RNN-T for fast, memory-efficient ASR training", 2022, section 3;
        constrained: W. Kang et al., "Fast and parallel decoding for transducer", 2022; delay
        penalty: W. Kang et al., "Delay-penalized transducer for low-latency streaming ASR", 2022.
    """
    options = SimpleOptions(termination_symbol, rnnt_type, delay_penalty=delay_penalty)
    inputs = _inputs(lm, am, symbols, boundary)
    return _loss(inputs, options, reduction=reduction, return_grad=return_grad)


def rnnt_loss_smoothed(
    lm: Tensor,
    am: Tensor,
    symbols: Tensor,
    termination_symbol: int,
    lm_only_scale: float = 0.1,
    am_only_scale: float = 0.1,
    boundary: Tensor | None = None,
    rnnt_type: str = "regular",
    delay_penalty: float = 0.0,
    reduction: str = "mean",
    return_grad: bool = False,
) -> Tensor | LossAndGrads:
    """Computes :func:`rnnt_loss_simple` with smoothed log-probabilities.

    The log-probabilities are mixed with those of lm alone and of am alone::

        (1 - lm_only_scale - am_only_scale) * log_softmax(am_t + lm_u)
            + lm_only_scale * log_softmax(lm_u)
            + am_only_scale * log_softmax(am_t + log mean_{b,u} softmax(lm_u))

    The mixture trains lm and am to be predictive on their own, which improves the pruning ranges.

    The mean runs over all contexts (b, u) of the batch that are not padding. Gradients flow through
    it. If ``am_only_scale`` is not 0, the loss of an utterance therefore depends on the other
    utterances of its batch (under DDP, of the batch of its process).

    Args:
        lm: as in :func:`rnnt_loss_simple`.
        am: as in :func:`rnnt_loss_simple`.
        symbols: as in :func:`rnnt_loss_simple`.
        termination_symbol: as in :func:`rnnt_loss_simple`.
        lm_only_scale: weight of the log-probabilities of lm alone, >= 0.
        am_only_scale: weight of the log-probabilities of am alone, >= 0. The sum of both weights is
            at most 1.
        boundary: as in :func:`rnnt_loss_simple`.
        rnnt_type: as in :func:`rnnt_loss_simple`.
        delay_penalty: as in :func:`rnnt_loss_simple`.
        reduction: as in :func:`rnnt_loss_simple`.
        return_grad: as in :func:`rnnt_loss_simple`.

    Returns:
        As in :func:`rnnt_loss_simple`.

    Raises:
        TypeError: as in :func:`rnnt_loss_simple`.
        ValueError: as in :func:`rnnt_loss_simple`; also if a scale is negative or the sum of the
            scales is above 1.
        RuntimeError: as in :func:`rnnt_loss_simple`.

    Example:
        >>> lm, am = torch.zeros(1, 3, 5), torch.zeros(1, 4, 5)
        >>> rnnt_loss_smoothed(lm, am, torch.tensor([[1, 2]]), termination_symbol=0)
        tensor(7.3540)

    Source:
        F. Kuang et al., "Pruned RNN-T for fast, memory-efficient ASR training", 2022, section 3.4.
    """
    options = SimpleOptions(
        termination_symbol, rnnt_type, lm_only_scale, am_only_scale, delay_penalty
    )
    inputs = _inputs(lm, am, symbols, boundary)
    return _loss(inputs, options, reduction=reduction, return_grad=return_grad)


def get_rnnt_logprobs(
    lm: Tensor,
    am: Tensor,
    symbols: Tensor,
    termination_symbol: int,
    rnnt_type: str = "regular",
    boundary: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Returns the scores of :func:`rnnt_loss_simple` for ``mutual_information_recursion``.

    Args:
        lm: (B, S + 1, V), as in :func:`rnnt_loss_simple`.
        am: (B, T, V), as in :func:`rnnt_loss_simple`.
        symbols: (B, S), as in :func:`rnnt_loss_simple`.
        termination_symbol: as in :func:`rnnt_loss_simple`.
        rnnt_type: as in :func:`rnnt_loss_simple`.
        boundary: (B, 4) or None, as in :func:`rnnt_loss_simple`.

    Returns:
        The scores px of symbols and py of termination symbols, float64 for float64 inputs and
        float32 otherwise. Both are differentiable. px is (B, S, T + 1) for "regular", with -inf
        from frame t_end on, and (B, S, T) otherwise. py is (B, S + 1, T). For "constrained", px
        includes the score of the termination symbol that follows the symbol.

    Raises:
        TypeError, ValueError, RuntimeError: as in :func:`rnnt_loss_simple`.

    Example:
        >>> lm, am = torch.zeros(1, 3, 5), torch.zeros(1, 4, 5)
        >>> px, py = get_rnnt_logprobs(lm, am, torch.tensor([[1, 2]]), termination_symbol=0)
        >>> px.shape, py.shape
        (torch.Size([1, 2, 5]), torch.Size([1, 3, 4]))
    """
    inputs = _inputs(lm, am, symbols, boundary)
    return _logprobs(inputs, SimpleOptions(termination_symbol, rnnt_type))


def get_rnnt_logprobs_smoothed(
    lm: Tensor,
    am: Tensor,
    symbols: Tensor,
    termination_symbol: int,
    lm_only_scale: float = 0.1,
    am_only_scale: float = 0.1,
    boundary: Tensor | None = None,
    rnnt_type: str = "regular",
) -> tuple[Tensor, Tensor]:
    """Returns the scores of :func:`rnnt_loss_smoothed` for ``mutual_information_recursion``.

    As in k2, boundary comes before rnnt_type, unlike in :func:`get_rnnt_logprobs`.

    Args:
        lm: (B, S + 1, V), as in :func:`rnnt_loss_smoothed`.
        am: (B, T, V), as in :func:`rnnt_loss_smoothed`.
        symbols: (B, S), as in :func:`rnnt_loss_smoothed`.
        termination_symbol: as in :func:`rnnt_loss_smoothed`.
        lm_only_scale: as in :func:`rnnt_loss_smoothed`.
        am_only_scale: as in :func:`rnnt_loss_smoothed`.
        boundary: (B, 4) or None, as in :func:`rnnt_loss_smoothed`.
        rnnt_type: as in :func:`rnnt_loss_smoothed`.

    Returns:
        As in :func:`get_rnnt_logprobs`.

    Raises:
        TypeError, ValueError, RuntimeError: as in :func:`rnnt_loss_smoothed`.

    Example:
        >>> lm, am = torch.zeros(1, 3, 5), torch.zeros(1, 4, 5)
        >>> px, py = get_rnnt_logprobs_smoothed(lm, am, torch.tensor([[1, 2]]), 0)
        >>> px.shape, py.shape
        (torch.Size([1, 2, 5]), torch.Size([1, 3, 4]))
    """
    options = SimpleOptions(termination_symbol, rnnt_type, lm_only_scale, am_only_scale)
    return _logprobs(_inputs(lm, am, symbols, boundary), options)


def _inputs(lm: Tensor, am: Tensor, symbols: Tensor, boundary: Tensor | None) -> SimpleInputs:
    """Return the inputs; under autocast, lm and am are cast to the wider of their dtypes."""
    are_tensors = isinstance(lm, Tensor) and isinstance(am, Tensor)
    if are_tensors and lm.dtype != am.dtype and torch.is_autocast_enabled(am.device.type):
        dtype = torch.promote_types(lm.dtype, am.dtype)
        lm, am = lm.to(dtype), am.to(dtype)
    return SimpleInputs(lm, am, symbols, boundary)


def _loss(
    inputs: SimpleInputs, options: SimpleOptions, *, reduction: str, return_grad: bool
) -> Tensor | LossAndGrads:
    checks.check_reduction(reduction)
    checks.check_flag(return_grad, "return_grad")
    check_inputs(inputs, options.termination_symbol)
    checks.refuse_forward_mode(inputs.am, inputs.lm)
    tensors, scales = additive_inputs(inputs, options, inputs.whole_boundary())
    topology = options.topology
    loss_options = AdditiveLossOptions(
        **scales, topology=topology.name, delay_penalty=float(options.delay_penalty)
    )
    result = additive_losses(tensors, loss_options, with_uses=return_grad)
    dtype = native.compute_dtype(inputs.am.dtype)
    loss = checks.reduce_losses(result.losses.to(dtype), reduction)
    if not return_grad:
        return loss
    blank, label = result.use_blank.detach(), result.use_label.detach()[:, :, :-1]
    if topology.label_takes_blank:  # subtract the uses of blank scores by label arcs
        forced = torch.cat([torch.zeros_like(blank[:, :, :1]), label], 2)
        blank = blank - forced
    return loss, posteriors_of_symbols_and_frames(
        label, blank, dtype, behind_the_end=topology.labels_share_frames
    )


def _logprobs(inputs: SimpleInputs, options: SimpleOptions) -> tuple[Tensor, Tensor]:
    check_inputs(inputs, options.termination_symbol)
    boundary = inputs.whole_boundary()
    tensors, scales = additive_inputs(inputs, options, boundary)
    blank, label = additive_scores(tensors, AdditiveOptions(**scales))
    if options.topology.label_takes_blank:
        label = label + blank[:, :, 1:]
    if options.topology.labels_share_frames:
        label = append_one(label, 1, float("-inf"))
        frames = torch.arange(label.size(1), device=label.device)
        is_over = frames >= boundary[:, 3, None].to(label.device)  # (B, T + 1)
        label = label.masked_fill(is_over[:, :, None], float("-inf"))
    dtype = native.compute_dtype(inputs.am.dtype)
    px, py = (scores.transpose(1, 2).to(dtype).contiguous() for scores in (label, blank))
    return px, py
