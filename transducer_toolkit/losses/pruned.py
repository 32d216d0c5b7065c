# SPDX-License-Identifier: Apache-2.0
"""The transducer loss on a band of the lattice, with k2's names and arguments."""

from __future__ import annotations

from torch import Tensor

from transducer_toolkit.losses.full import LossAndGrads, k2_options, reduced_grid_loss
from transducer_toolkit.ops.grid import GridInputs, grid_logprobs


def rnnt_loss_pruned(
    logits: Tensor,
    symbols: Tensor,
    ranges: Tensor,
    termination_symbol: int,
    boundary: Tensor | None = None,
    rnnt_type: str = "regular",
    delay_penalty: float = 0.0,
    reduction: str = "mean",
    use_hat_loss: bool = False,
    return_grad: bool = False,
    *,
    fastemit_lambda: float = 0.0,
) -> Tensor | LossAndGrads:
    """Computes the transducer loss over the paths that stay within R symbols of each frame.

    The recursion runs on the ``(T, R)`` band, so time and memory do not depend on the number of
    symbols. Arcs that leave the band do not exist, so the loss is at least the full loss. It equals
    the full loss if the band contains all cells (R = S + 1).

    Args:
        logits: (B, T, R, V) joiner outputs of the band's cells, float16, bfloat16, float32 or
            float64, unnormalized. -inf means probability zero.
        symbols: (B, S) int32 or int64 in [0, V), on the device of logits.
        ranges: (B, T, R) int32 or int64; for each frame R consecutive columns in [0, S], for
            example from :func:`~transducer_toolkit.get_rnnt_prune_ranges`.
        termination_symbol: the blank, in [0, V).
        boundary: (B, 4) int32 or int64 rows ``[s_begin, t_begin, s_end, t_end]``, on the CPU or
            the device of logits; None for ``[0, 0, S, T]``. logits and symbols outside of the
            boundary may hold any value.
        rnnt_type: "regular", "modified" or "constrained".
        delay_penalty: >= 0; adds ``delay_penalty * ((t_end - 1) / 2 - t)`` to the score of every
            symbol at frame t.
        reduction: "none" (B,), "mean" over utterances, or "sum".
        use_hat_loss: normalize as a hybrid autoregressive transducer, as ``normalization="hat"`` of
            :func:`~transducer_toolkit.transducer_loss`.
        return_grad: also return posteriors. They have the shapes of the full lattice and are zero
            outside of the band.
        fastemit_lambda: as in :func:`~transducer_toolkit.transducer_loss`; k2 does not have it.

    Returns:
        As in :func:`~transducer_toolkit.rnnt_loss_simple`. If no path of an utterance stays in the
        band, its loss is +inf and its gradient zero.

    Raises:
        TypeError: if an argument is not a tensor, or has the wrong dtype.
        ValueError: if shapes, devices or options do not fit, or a value on the CPU is out of
            range; names the argument or the utterance.
        RuntimeError: if this build has no stages for the device, or on a second derivative.

    Example:
        >>> import torch
        >>> ranges = torch.tensor([[[0, 1], [0, 1], [1, 2], [1, 2]]])
        >>> symbols = torch.tensor([[1, 2]])
        >>> logits = torch.zeros(1, 4, 2, 5)
        >>> rnnt_loss_pruned(logits, symbols, ranges, termination_symbol=0)  # 6 log 5 - log 4
        tensor(8.2703)

    Source:
        F. Kuang et al., "Pruned RNN-T for fast, memory-efficient ASR training", 2022, section 3.
    """
    _require_ranges(ranges)
    options = k2_options(
        termination_symbol, rnnt_type, delay_penalty, fastemit_lambda, use_hat_loss
    )
    inputs = GridInputs(logits, symbols, boundary, ranges)
    return reduced_grid_loss(inputs, options, reduction=reduction, return_grad=return_grad)


def get_rnnt_logprobs_pruned(
    logits: Tensor,
    symbols: Tensor,
    ranges: Tensor,
    termination_symbol: int,
    boundary: Tensor | None = None,
    rnnt_type: str = "regular",
) -> tuple[Tensor, Tensor]:
    """Returns the scores of :func:`rnnt_loss_pruned` for ``mutual_information_recursion``.

    It is written in plain torch and makes a temporary tensor of the logits' size. The loss does not
    use it.

    Args:
        logits: (B, T, R, V), as in :func:`rnnt_loss_pruned`.
        symbols: (B, S), as in :func:`rnnt_loss_pruned`.
        ranges: (B, T, R), as in :func:`rnnt_loss_pruned`.
        termination_symbol: as in :func:`rnnt_loss_pruned`.
        boundary: as in :func:`rnnt_loss_pruned`.
        rnnt_type: as in :func:`rnnt_loss_pruned`.

    Returns:
        As in :func:`~transducer_toolkit.get_rnnt_logprobs`, but -inf outside of the band.

    Raises:
        TypeError, ValueError, RuntimeError: as in :func:`rnnt_loss_pruned`.

    Example:
        >>> import torch
        >>> ranges = torch.tensor([[[0, 1], [0, 1], [1, 2], [1, 2]]])
        >>> symbols = torch.tensor([[1, 2]])
        >>> px, py = get_rnnt_logprobs_pruned(torch.zeros(1, 4, 2, 5), symbols, ranges, 0)
        >>> px.isfinite().sum().item(), py.isfinite().sum().item()
        (6, 8)
    """
    _require_ranges(ranges)
    inputs = GridInputs(logits, symbols, boundary, ranges)
    inputs.check(termination_symbol)
    return grid_logprobs(inputs, k2_options(termination_symbol, rnnt_type))


def _require_ranges(ranges: object) -> None:
    if ranges is None:
        raise TypeError("ranges: expected a torch.Tensor, got None; rnnt_loss needs no ranges")
