# SPDX-License-Identifier: Apache-2.0
"""The transducer loss of an additive joiner, plain and smoothed; names and arguments are k2's."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from transducer_toolkit import native
from transducer_toolkit.losses import checks
from transducer_toolkit.losses.boundary import (
    boundary_or_everything,
    check_boundary,
    check_rnnt_type,
    checked_symbols,
    real_columns,
    real_frames,
)
from transducer_toolkit.losses.mutual_information import (
    _posteriors_of_symbols_and_frames,
    lattice_losses,
)
from transducer_toolkit.losses.reduction import check_reduction, reduce_losses
from transducer_toolkit.losses.simple_normaliser import simple_normaliser

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
    ``B * (T + U) * V`` and ``B * T * U`` instead of ``B * T * U * V``. The posteriors that
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
        >>> px_grad.shape, py_grad.sum()  # 4 frames, 4 termination symbols
        (torch.Size([1, 2, 5]), tensor(4.))

    Source:
        F. Kuang et al., "Pruned RNN-T for fast, memory-efficient ASR training", 2022, section 3;
        constrained: W. Kang et al., "Fast and parallel decoding for transducer", 2022; delay
        penalty: W. Kang et al., "Delay-penalized transducer for low-latency streaming ASR", 2022.
    """
    return _loss(
        *(lm, am, symbols, termination_symbol, 0.0, 0.0),
        *(boundary, rnnt_type, delay_penalty, reduction, return_grad),
    )


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
    return _loss(
        *(lm, am, symbols, termination_symbol, lm_only_scale, am_only_scale),
        *(boundary, rnnt_type, delay_penalty, reduction, return_grad),
    )


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
    return _logprobs(
        *(lm, am, symbols, termination_symbol, 0.0, 0.0),
        *(boundary, rnnt_type),
    )


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
    return _logprobs(
        *(lm, am, symbols, termination_symbol, lm_only_scale, am_only_scale),
        *(boundary, rnnt_type),
    )


def _loss(
    lm: Tensor,
    am: Tensor,
    symbols: Tensor,
    termination_symbol: int,
    lm_only_scale: float,
    am_only_scale: float,
    boundary: Tensor | None,
    rnnt_type: str,
    delay_penalty: float,
    reduction: str,
    return_grad: bool,
) -> Tensor | LossAndGrads:
    check_reduction(reduction)
    if not 0 <= delay_penalty < math.inf:
        raise ValueError(f"delay_penalty: expected a finite number >= 0, got {delay_penalty}")
    _check_arguments(
        lm, am, symbols, termination_symbol, lm_only_scale, am_only_scale, boundary, rnnt_type
    )
    boundary = boundary_or_everything(boundary, am.size(0), symbols.size(1), am.size(1))
    needs_gradient = torch.is_grad_enabled() and (lm.requires_grad or am.requires_grad)
    blank, label = _scores(
        *(lm, am, symbols, termination_symbol, lm_only_scale, am_only_scale),
        *(boundary, rnnt_type, rnnt_type),
    )
    if delay_penalty > 0:
        label = label + _delay_penalty(boundary.to(am.device), am.size(1), delay_penalty)
    losses, blank_posteriors, label_posteriors = lattice_losses(
        blank,
        label,
        boundary,
        # The forced blank is in the label score by now.
        topology="modified" if rnnt_type == "constrained" else rnnt_type,
        open_end=False,
        with_posteriors=return_grad or needs_gradient,
    )
    dtype = native.compute_dtype(am.dtype)
    loss = reduce_losses(losses.to(dtype), reduction)
    if not return_grad:
        return loss
    if rnnt_type == "regular":  # no symbol after the last frame
        label_posteriors = torch.nn.functional.pad(label_posteriors, (0, 0, 0, 1))
    return loss, _posteriors_of_symbols_and_frames(label_posteriors, blank_posteriors, dtype)


def _logprobs(
    lm: Tensor,
    am: Tensor,
    symbols: Tensor,
    termination_symbol: int,
    lm_only_scale: float,
    am_only_scale: float,
    boundary: Tensor | None,
    rnnt_type: str,
) -> tuple[Tensor, Tensor]:
    _check_arguments(
        lm, am, symbols, termination_symbol, lm_only_scale, am_only_scale, boundary, rnnt_type
    )
    boundary = boundary_or_everything(boundary, am.size(0), symbols.size(1), am.size(1))
    blank, label = _scores(
        *(lm, am, symbols, termination_symbol, lm_only_scale, am_only_scale),
        *(boundary, rnnt_type, ""),
    )
    if rnnt_type == "regular":
        label = torch.nn.functional.pad(label, (0, 0, 0, 1), value=float("-inf"))
        frames = torch.arange(label.size(1), device=label.device)
        is_over = frames >= boundary[:, 3, None].to(label.device)  # (B, T + 1)
        label = label.masked_fill(is_over[:, :, None], float("-inf"))
    dtype = native.compute_dtype(am.dtype)
    px, py = (scores.transpose(1, 2).to(dtype).contiguous() for scores in (label, blank))
    return px, py


def _delay_penalty(boundary: Tensor, max_frames: int, delay_penalty: float) -> Tensor:
    """(B, T, 1) float64: delay_penalty * ((t_end - 1) / 2 - t)."""
    frames = torch.arange(max_frames, device=boundary.device)
    middle = (boundary[:, 3, None, None] - 1).to(native.SCORE_DTYPE) / 2
    return delay_penalty * (middle - frames[:, None])


def _scores(
    lm: Tensor,
    am: Tensor,
    symbols: Tensor,
    termination_symbol: int,
    lm_only_scale: float,
    am_only_scale: float,
    boundary: Tensor,
    rnnt_type: str,
    feasible_topology: str,
) -> tuple[Tensor, Tensor]:
    """Blank scores (B, T, S + 1) and label scores (B, T, S), float64, constrained sum included."""
    symbols, is_invalid = checked_symbols(
        symbols,
        boundary,
        max_frames=am.size(1),
        vocab_size=am.size(2),
        topology=feasible_topology,
    )
    # Zeroed before any product or reduction: 0 * NaN is NaN.
    is_context = real_columns(boundary, lm.size(1), lm.device)  # (B, S + 1)
    is_frame = real_frames(boundary, am.size(1), am.device)  # (B, T)
    dtype = native.compute_dtype(am.dtype)
    lm = lm.to(dtype).masked_fill(~is_context[:, :, None], 0.0)
    am = am.to(dtype).masked_fill(~is_frame[:, :, None], 0.0)

    # What blank and labels pick from lm (B, S + 1 or S, broadcast over T), and from am (B, T, ...).
    score = native.SCORE_DTYPE
    lm_blank = lm[:, None, :, termination_symbol].to(score)  # (B, 1, S + 1)
    lm_label = lm[:, :-1].gather(2, symbols[:, :, None]).transpose(1, 2).to(score)  # (B, 1, S)
    am_blank = am[:, :, termination_symbol, None].to(score)  # (B, T, 1)
    am_label = am.gather(2, symbols[:, None, :].expand(-1, am.size(1), -1)).to(score)  # (B, T, S)

    blank: Tensor | float = 0.0
    label: Tensor | float = 0.0
    combined_scale = 1.0 - lm_only_scale - am_only_scale
    # A scale of zero leaves its term out: 0 * -inf would be NaN.
    if combined_scale > 0:
        normaliser = simple_normaliser(lm, am)  # (B, T, S + 1)
        blank = blank + combined_scale * (am_blank + lm_blank - normaliser)
        label = label + combined_scale * (am_label + lm_label - normaliser[:, :, :-1])
    if lm_only_scale > 0 or am_only_scale > 0:
        # (B, 1, S + 1): every maximum is 0 here, so nothing underflows that matters.
        lm_normaliser = simple_normaliser(lm, am.new_zeros(am.size(0), 1, am.size(2)))
    if lm_only_scale > 0:
        blank = blank + lm_only_scale * (lm_blank - lm_normaliser)
        label = label + lm_only_scale * (lm_label - lm_normaliser[:, :, :-1])
    if am_only_scale > 0:
        unigram = _log_mean_softmax(lm, lm_normaliser.transpose(1, 2), is_context)  # (V,)
        rows = unigram.expand(am.size(0), 1, -1)
        am_normaliser = simple_normaliser(rows, am)  # (B, T, 1)
        prior_blank, prior_label = unigram[termination_symbol].to(score), unigram[symbols].to(score)
        blank = blank + am_only_scale * (am_blank + prior_blank - am_normaliser)
        label = label + am_only_scale * (am_label + prior_label[:, None, :] - am_normaliser)
    assert isinstance(blank, Tensor) and isinstance(label, Tensor)
    # lm_only alone does not depend on the frame.
    blank = blank.expand(-1, am.size(1), -1)
    label = label.expand(-1, am.size(1), -1)
    if is_invalid is not None:
        label = label.masked_fill(is_invalid[:, None, :], float("nan"))
    if rnnt_type == "constrained":
        label = label + blank[:, :, 1:]
    return blank, label


def _log_mean_softmax(lm: Tensor, normaliser: Tensor, is_context: Tensor) -> Tensor:
    """log of the mean of softmax(lm) over the real (b, u): (B,U+1,V), (B,U+1,1), (B,U+1) -> (V,)"""
    log_probs = (lm - normaliser.to(lm.dtype)).masked_fill(~is_context[:, :, None], float("-inf"))
    top = log_probs.detach().amax((0, 1))
    top = torch.where(top == float("-inf"), 0.0, top)  # a symbol that no context allows
    total = (log_probs - top).exp().sum((0, 1))
    is_possible = total != 0  # NaN is kept
    # The inner where keeps the derivative of log(0) out of the gradient.
    log_total = torch.where(is_possible, total, 1.0).log()
    mean = log_total + top - is_context.sum().to(lm.dtype).log()
    return torch.where(is_possible, mean, float("-inf"))


def _check_arguments(
    lm: Tensor,
    am: Tensor,
    symbols: Tensor,
    termination_symbol: int,
    lm_only_scale: float,
    am_only_scale: float,
    boundary: Tensor | None,
    rnnt_type: str,
) -> None:
    check_rnnt_type(rnnt_type)
    for name, scale in (("lm_only_scale", lm_only_scale), ("am_only_scale", am_only_scale)):
        if not 0 <= scale <= 1:
            raise ValueError(f"{name}: expected a number from 0 to 1, got {scale}")
    if lm_only_scale + am_only_scale > 1 + 1e-6:
        raise ValueError(
            "lm_only_scale, am_only_scale: expected a sum of at most 1, "
            f"got {lm_only_scale} + {am_only_scale}"
        )
    for name, tensor in (("lm", lm), ("am", am)):
        checks.check_tensor(tensor, name)
        checks.check_dtype(tensor, name, native.SUPPORTED_DTYPES)
        if tensor.dim() != 3:
            axes = "(B, S + 1, V)" if name == "lm" else "(B, T, V)"
            raise ValueError(f"{name}: expected shape {axes}, got {tuple(tensor.shape)}")
    if am.dtype != lm.dtype:
        raise TypeError(f"am: expected dtype {lm.dtype}, that of lm, got {am.dtype}")
    if am.device != lm.device:
        raise ValueError(f"am: expected device {lm.device}, that of lm, got {am.device}")
    checks.check_tensor(symbols, "symbols")
    checks.check_dtype(symbols, "symbols", checks.INDEX_DTYPES)
    if symbols.dim() != 2:
        raise ValueError(f"symbols: expected shape (B, S), got {tuple(symbols.shape)}")
    if symbols.size(0) == 0:
        raise ValueError("symbols: expected at least one utterance, got B = 0")
    if symbols.device != am.device:
        raise ValueError(f"symbols: expected device {am.device}, that of am, got {symbols.device}")
    num_utterances, num_symbols = symbols.shape
    vocab_size = am.size(2)
    if tuple(lm.shape) != (num_utterances, num_symbols + 1, vocab_size):
        raise ValueError(
            f"lm: expected shape ({num_utterances}, {num_symbols + 1}, {vocab_size}), B and S + 1 "
            f"from symbols {tuple(symbols.shape)}, V from am, got {tuple(lm.shape)}"
        )
    if am.size(0) != num_utterances or am.size(1) == 0:
        raise ValueError(
            f"am: expected shape ({num_utterances}, T, V) with T >= 1, B from symbols, "
            f"got {tuple(am.shape)}"
        )
    if not isinstance(termination_symbol, int):
        raise TypeError(
            f"termination_symbol: expected an int, got {type(termination_symbol).__name__}"
        )
    if not 0 <= termination_symbol < vocab_size:
        raise ValueError(
            f"termination_symbol: expected 0 <= termination_symbol < {vocab_size} (V of am), "
            f"got {termination_symbol}"
        )
    check_boundary(boundary, num_utterances, am.device)
    native.require_supported_device(am.device)
