# SPDX-License-Identifier: Apache-2.0
"""The transducer loss of padded logits, with k2's names and arguments."""

from __future__ import annotations

from torch import Tensor

from transducer_toolkit.ops import checks
from transducer_toolkit.ops.grid import GridInputs, grid_logprobs, grid_loss
from transducer_toolkit.ops.options import LossOptions
from transducer_toolkit.ops.topology import get_topology

LossAndGrads = tuple[Tensor, tuple[Tensor, Tensor]]


def rnnt_loss(
    logits: Tensor,
    symbols: Tensor,
    termination_symbol: int,
    boundary: Tensor | None = None,
    rnnt_type: str = "regular",
    delay_penalty: float = 0.0,
    reduction: str = "mean",
    return_grad: bool = False,
    *,
    use_hat_loss: bool = False,
    fastemit_lambda: float = 0.0,
) -> Tensor | LossAndGrads:
    """Computes the transducer loss of padded logits under k2's name and argument order.

    It runs the stages of :func:`~transducer_toolkit.transducer_loss`. The topologies are those of
    :func:`~transducer_toolkit.rnnt_loss_simple`; "modified" and "constrained" may end with a symbol
    on the last frame.

    Args:
        logits: (B, T, S + 1, V) joiner outputs, float16, bfloat16, float32 or float64,
            unnormalized. -inf means probability zero.
        symbols: (B, S) int32 or int64 in [0, V), on the device of logits.
        termination_symbol: the blank, in [0, V).
        boundary: (B, 4) int32 or int64 rows ``[s_begin, t_begin, s_end, t_end]``, on the CPU or
            the device of logits; None for ``[0, 0, S, T]``. logits and symbols outside of the
            boundary may hold any value.
        rnnt_type: "regular", "modified" or "constrained".
        delay_penalty: >= 0; adds ``delay_penalty * ((t_end - 1) / 2 - t)`` to the score of every
            symbol at frame t.
        reduction: "none" (B,), "mean" over utterances, or "sum".
        return_grad: also return posteriors.
        use_hat_loss: normalize as a hybrid autoregressive transducer, as ``normalization="hat"`` of
            :func:`~transducer_toolkit.transducer_loss`.
        fastemit_lambda: as in :func:`~transducer_toolkit.transducer_loss`; k2 does not have it.

    Returns:
        As in :func:`~transducer_toolkit.rnnt_loss_simple`.

    Raises:
        TypeError: if an argument is not a tensor, or has the wrong dtype.
        ValueError: if shapes, devices or options do not fit, or a value on the CPU is out of
            range; names the argument or the utterance.
        RuntimeError: if this build has no stages for the device, or on a second derivative.

    Example:
        >>> import torch
        >>> rnnt_loss(torch.zeros(1, 4, 3, 5), torch.tensor([[1, 2]]), termination_symbol=0)
        tensor(7.3540)

    Source:
        As in :func:`~transducer_toolkit.rnnt_loss_simple`.
    """
    options = k2_options(
        termination_symbol, rnnt_type, delay_penalty, fastemit_lambda, use_hat_loss
    )
    inputs = GridInputs(logits, symbols, boundary)
    return reduced_grid_loss(inputs, options, reduction=reduction, return_grad=return_grad)


def get_rnnt_logprobs_joint(
    logits: Tensor,
    symbols: Tensor,
    termination_symbol: int,
    boundary: Tensor | None = None,
    rnnt_type: str = "regular",
) -> tuple[Tensor, Tensor]:
    """Returns the scores of :func:`rnnt_loss` as arguments of ``mutual_information_recursion``.

    It is written in plain torch and makes a temporary tensor of the logits' size. The losses do not
    use it.

    Args:
        logits: (B, T, S + 1, V), as in :func:`rnnt_loss`.
        symbols: (B, S), as in :func:`rnnt_loss`.
        termination_symbol: as in :func:`rnnt_loss`.
        boundary: as in :func:`rnnt_loss`.
        rnnt_type: as in :func:`rnnt_loss`.

    Returns:
        As in :func:`~transducer_toolkit.get_rnnt_logprobs`.

    Raises:
        TypeError, ValueError, RuntimeError: as in :func:`rnnt_loss`.

    Example:
        >>> import torch
        >>> symbols = torch.tensor([[1, 2]])
        >>> px, py = get_rnnt_logprobs_joint(torch.zeros(1, 4, 3, 5), symbols, 0)
        >>> px.shape, py.shape
        (torch.Size([1, 2, 5]), torch.Size([1, 3, 4]))
    """
    inputs = GridInputs(logits, symbols, boundary)
    inputs.check(termination_symbol)
    return grid_logprobs(inputs, k2_options(termination_symbol, rnnt_type))


def k2_options(
    termination_symbol: int,
    rnnt_type: str,
    delay_penalty: float = 0.0,
    fastemit_lambda: float = 0.0,
    use_hat_loss: bool = False,
) -> LossOptions:
    """Returns the options of a k2-compatible loss.

    Raises:
        TypeError: if an option has the wrong type.
        ValueError: if an option is out of range; names it.
    """
    get_topology(rnnt_type, "rnnt_type", k2=True)
    checks.check_int(termination_symbol, "termination_symbol")
    checks.check_flag(use_hat_loss, "use_hat_loss")
    return LossOptions(
        blank=termination_symbol,
        topology=rnnt_type,
        delay_penalty=delay_penalty,
        fastemit_lambda=fastemit_lambda,
        blank_may_be_target=not use_hat_loss,
        normalization="hat" if use_hat_loss else "softmax",
    )


def reduced_grid_loss(
    inputs: GridInputs, options: LossOptions, *, reduction: str, return_grad: bool
) -> Tensor | LossAndGrads:
    """Returns the loss of :func:`rnnt_loss` and :func:`~transducer_toolkit.rnnt_loss_pruned`."""
    checks.check_reduction(reduction)
    checks.check_flag(return_grad, "return_grad")
    inputs.check(options.blank)
    losses, grads = grid_loss(inputs, options, return_grad=return_grad)
    loss = checks.reduce_losses(losses, reduction)
    return loss if grads is None else (loss, grads)
