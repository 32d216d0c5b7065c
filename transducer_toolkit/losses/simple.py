# SPDX-License-Identifier: Apache-2.0
"""The transducer loss of an additive joiner, plain and smoothed; names and arguments are k2's."""

from __future__ import annotations

import torch
from torch import Tensor

from transducer_toolkit.ops import checks, native
from transducer_toolkit.ops.recursion import (
    DenseScores,
    RecursionOptions,
    append_one,
    lattice_losses,
    posteriors_of_symbols_and_frames,
)
from transducer_toolkit.ops.simple_scores import (
    SimpleInputs,
    SimpleOptions,
    check_inputs,
    scores_of_cells,
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
    """Transducer loss of the joiner ``logits[b, t, u] = am[b, t] + lm[b, u]``, without the logits.

    The normaliser of every cell comes from one batched matrix product, so memory is
    ``B * (T + U) * V`` and ``B * T * U`` instead of ``B * T * U * V``. (Float32 products obey
    ``torch.set_float32_matmul_precision``; below "highest" the loss is that much less exact.) Cells
    whose product underflows are computed again, term by term. The posteriors that
    `return_grad` adds tell :func:`~transducer_toolkit.get_rnnt_prune_ranges` which cells matter.

    ==============  =======================================  ===================================
    rnnt_type       a symbol at frame t leads to             its score
    ==============  =======================================  ===================================
    "regular"       frame t                                  its log-probability
    "modified"      frame t + 1                              its log-probability
    "constrained"   frame t + 1                              plus that of the termination symbol
                                                             after it, at frame t
    ==============  =======================================  ===================================

    Args:
        lm: (B, S + 1, V), predictor (language model) part of the unnormalised log-probabilities;
            float16, bfloat16, float32 or float64 (16 bits are computed in float32). -inf means
            probability zero.
        am: (B, T, V), encoder (acoustic) part; same dtype and device.
        symbols: (B, S) int32 or int64 in [0, V), on the device of am.
        termination_symbol: the blank, in [0, V).
        boundary: (B, 4) int32 or int64 rows ``[s_begin, t_begin, s_end, t_end]``, on the CPU or
            the device of am; None means ``[0, 0, S, T]``. What lm, am and symbols hold outside
            does not matter. "modified" and "constrained" need at least as many frames as symbols.
        rnnt_type: see above.
        delay_penalty: >= 0; adds ``delay_penalty * ((t_end - 1) / 2 - t)`` to the score of every
            symbol at frame t.
        reduction: "none" (B,), "mean" over utterances, or "sum".
        return_grad: also return posteriors.

    Returns:
        The loss in nats, float64 for float64 inputs and float32 otherwise; with `return_grad` the
        pair of it and ``(px_grad, py_grad)``: the posteriors of symbols, (B, S, T + 1) for
        "regular" and (B, S, T) otherwise, and of termination symbols, (B, S + 1, T) (for
        "constrained" without the forced ones). No path: +inf and zero gradient. NaN, +inf or a row
        of -inf: NaN for that utterance only.

    Raises:
        TypeError: not a tensor, or a wrong dtype.
        ValueError: arguments that do not fit, and impossible values on the CPU; names the argument
            or utterance, what was expected and what came.
        RuntimeError: no stage for this device in this build; a second derivative.

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
    inputs = SimpleInputs(lm, am, symbols, boundary)
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
    """:func:`rnnt_loss_simple` with log-probabilities mixed with those of lm alone and am alone.

    ::

        (1 - lm_only_scale - am_only_scale) * log_softmax(am_t + lm_u)
            + lm_only_scale * log_softmax(lm_u)
            + am_only_scale * log_softmax(am_t + log mean_{b,u} softmax(lm_u))

    The mean is over all contexts (b, u) of the batch that are not padding, and is differentiated
    too. So with ``am_only_scale != 0`` an utterance's loss depends on the others of its batch
    (under DDP: of this process); otherwise it does not. This keeps lm and am meaningful by
    themselves, which the pruning ranges need.

    Args:
        lm: as in :func:`rnnt_loss_simple`.
        am: likewise.
        symbols: likewise.
        termination_symbol: likewise.
        lm_only_scale: >= 0.
        am_only_scale: >= 0; the two add up to at most 1.
        boundary: as in :func:`rnnt_loss_simple`; and so on.
        rnnt_type: likewise.
        delay_penalty: likewise.
        reduction: likewise.
        return_grad: likewise.

    Returns:
        As :func:`rnnt_loss_simple`.

    Raises:
        TypeError: as there.
        ValueError: as there, and scales that are negative or add up to more than 1.
        RuntimeError: as there.

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
    inputs = SimpleInputs(lm, am, symbols, boundary)
    return _loss(inputs, options, reduction=reduction, return_grad=return_grad)


def get_rnnt_logprobs(
    lm: Tensor,
    am: Tensor,
    symbols: Tensor,
    termination_symbol: int,
    rnnt_type: str = "regular",
    boundary: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Scores of :func:`rnnt_loss_simple` in the form of ``mutual_information_recursion``.

    Args:
        lm: (B, S + 1, V), as in :func:`rnnt_loss_simple`.
        am: (B, T, V), likewise.
        symbols: (B, S), likewise.
        termination_symbol: likewise.
        rnnt_type: likewise.
        boundary: (B, 4) or None, likewise.

    Returns:
        px (B, S, T + 1) for "regular", -inf from frame t_end on, or (B, S, T) otherwise; py
        (B, S + 1, T). float64 for float64 inputs and float32 otherwise; differentiable. For
        "constrained" px has the following termination symbol's score in it.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`rnnt_loss_simple`.

    Example:
        >>> lm, am = torch.zeros(1, 3, 5), torch.zeros(1, 4, 5)
        >>> px, py = get_rnnt_logprobs(lm, am, torch.tensor([[1, 2]]), termination_symbol=0)
        >>> px.shape, py.shape
        (torch.Size([1, 2, 5]), torch.Size([1, 3, 4]))
    """
    inputs = SimpleInputs(lm, am, symbols, boundary)
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
    """Scores of :func:`rnnt_loss_smoothed` in the form of ``mutual_information_recursion``.

    Args:
        lm: (B, S + 1, V), as in :func:`rnnt_loss_smoothed`.
        am: (B, T, V), likewise.
        symbols: (B, S), likewise.
        termination_symbol: likewise.
        lm_only_scale: likewise.
        am_only_scale: likewise.
        boundary: (B, 4) or None, likewise.
        rnnt_type: likewise. The order of these two is not that of :func:`get_rnnt_logprobs`, as in
            k2.

    Returns:
        As :func:`get_rnnt_logprobs`.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`rnnt_loss_smoothed`.

    Example:
        >>> lm, am = torch.zeros(1, 3, 5), torch.zeros(1, 4, 5)
        >>> px, py = get_rnnt_logprobs_smoothed(lm, am, torch.tensor([[1, 2]]), 0)
        >>> px.shape, py.shape
        (torch.Size([1, 2, 5]), torch.Size([1, 3, 4]))
    """
    options = SimpleOptions(termination_symbol, rnnt_type, lm_only_scale, am_only_scale)
    return _logprobs(SimpleInputs(lm, am, symbols, boundary), options)


def _loss(
    inputs: SimpleInputs, options: SimpleOptions, *, reduction: str, return_grad: bool
) -> Tensor | LossAndGrads:
    checks.check_reduction(reduction)
    checks.check_flag(return_grad, "return_grad")
    check_inputs(inputs, options.termination_symbol)
    lm, am = inputs.lm, inputs.am
    checks.refuse_forward_mode(am, lm)
    boundary = inputs.whole_boundary()
    needs_gradient = torch.is_grad_enabled() and (lm.requires_grad or am.requires_grad)
    blank, label = scores_of_cells(inputs, options, boundary, must_be_feasible=True)
    if options.delay_penalty > 0:
        label = label + _delay_penalty(boundary.to(am.device), am.size(1), options.delay_penalty)
    topology = options.topology
    # The label scores of "constrained" include the forced blank by now.
    rest = "modified" if topology.label_takes_blank else topology.name
    losses, blank_posteriors, label_posteriors = lattice_losses(
        DenseScores(blank, label, boundary),
        RecursionOptions(rest, open_end=False, exact=am.dtype == torch.float64),
        with_posteriors=return_grad or needs_gradient,
    )
    dtype = native.compute_dtype(am.dtype)
    loss = checks.reduce_losses(losses.to(dtype), reduction)
    if not return_grad:
        return loss
    if topology.labels_share_frames:  # k2 has a column for symbols after the last frame
        label_posteriors = append_one(label_posteriors, 1)
    return loss, posteriors_of_symbols_and_frames(label_posteriors, blank_posteriors, dtype)


def _logprobs(inputs: SimpleInputs, options: SimpleOptions) -> tuple[Tensor, Tensor]:
    check_inputs(inputs, options.termination_symbol)
    boundary = inputs.whole_boundary()
    blank, label = scores_of_cells(inputs, options, boundary, must_be_feasible=False)
    if options.topology.labels_share_frames:
        label = append_one(label, 1, float("-inf"))
        frames = torch.arange(label.size(1), device=label.device)
        is_over = frames >= boundary[:, 3, None].to(label.device)  # (B, T + 1)
        label = label.masked_fill(is_over[:, :, None], float("-inf"))
    dtype = native.compute_dtype(inputs.am.dtype)
    px, py = (scores.transpose(1, 2).to(dtype).contiguous() for scores in (label, blank))
    return px, py


def _delay_penalty(boundary: Tensor, max_frames: int, delay_penalty: float) -> Tensor:
    """(B, T, 1) float64: delay_penalty * ((t_end - 1) / 2 - t)."""
    frames = torch.arange(max_frames, device=boundary.device)
    middle = (boundary[:, 3, None, None] - 1).to(native.SCORE_DTYPE) / 2
    return delay_penalty * (middle - frames[:, None])
