# SPDX-License-Identifier: Apache-2.0
"""The arguments of the simple and the smoothed loss, and what the additive joiner gets of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from transducer_toolkit.ops import checks, native
from transducer_toolkit.ops.additive_stages import AdditiveInputs
from transducer_toolkit.ops.boundary import boundary_or_everything, real_columns
from transducer_toolkit.ops.topology import TOPOLOGIES, Topology, get_topology


class SimpleInputs(NamedTuple):
    """Tensors of the losses of an additive joiner.

    Attributes:
        lm: (B, S + 1, V).
        am: (B, T, V).
        symbols: (B, S) integers.
        boundary: (B, 4) integers, or None.
    """

    lm: Tensor
    am: Tensor
    symbols: Tensor
    boundary: Tensor | None

    def whole_boundary(self) -> Tensor:
        """Returns the boundary (B, 4) int64; without one, that of the whole grid."""
        sizes = self.am.size(0), self.symbols.size(1), self.am.size(1)
        return boundary_or_everything(self.boundary, *sizes)


@dataclass(frozen=True)
class SimpleOptions:
    """The options of rnnt_loss_simple and rnnt_loss_smoothed.

    Raises:
        TypeError: if an option has the wrong type.
        ValueError: if an option is out of range; names it.
    """

    termination_symbol: int
    rnnt_type: str = "regular"
    lm_only_scale: float = 0.0
    am_only_scale: float = 0.0
    delay_penalty: float = 0.0

    def __post_init__(self) -> None:
        get_topology(self.rnnt_type, "rnnt_type", k2=True)
        checks.check_not_negative("delay_penalty", self.delay_penalty)
        for name in ("lm_only_scale", "am_only_scale"):
            scale = getattr(self, name)
            checks.check_number(scale, name)
            if not 0 <= scale <= 1:
                raise ValueError(f"{name}: expected a number in [0, 1], got {scale}")
        if self.lm_only_scale + self.am_only_scale > 1 + 1e-6:
            raise ValueError(
                "lm_only_scale, am_only_scale: expected a sum of at most 1, "
                f"got {self.lm_only_scale} + {self.am_only_scale}"
            )
        checks.check_int(self.termination_symbol, "termination_symbol")

    @property
    def topology(self) -> Topology:
        """The row of the topology table."""
        return TOPOLOGIES[self.rnnt_type]


def additive_inputs(
    inputs: SimpleInputs, options: SimpleOptions, boundary: Tensor
) -> tuple[AdditiveInputs, dict[str, Any]]:
    """Returns the inputs of the additive joiner's operators, and the fields of AdditiveOptions.

    Args:
        inputs: the tensors, checked.
        options: the options.
        boundary: (B, 4) int64.
    """
    dtype = native.compute_dtype(inputs.am.dtype)
    lm, am = inputs.lm.to(dtype), inputs.am.to(dtype)
    combined_scale = 1.0 - options.lm_only_scale - options.am_only_scale
    if combined_scale < 1e-6:  # rounding: the sum of the others may be slightly above or below 1
        combined_scale = 0.0
    contexts = lm
    if options.am_only_scale > 0:
        # Zero the padding before any reduction, because 0 * NaN is NaN.
        is_context = real_columns(boundary, lm.size(1), lm.device)  # (B, S + 1)
        real = _zero_padding(lm, is_context)
        prior = _log_mean_softmax(real, _log_sum_exp(real)[:, :, None], is_context)  # (V,)
        contexts = torch.cat([lm, prior.expand(lm.size(0), 1, -1)], 1)
    scales = {
        "blank": options.termination_symbol,
        "combined_scale": combined_scale,
        "lm_only_scale": float(options.lm_only_scale),
        "am_only_scale": float(options.am_only_scale),
    }
    symbols = inputs.symbols.detach().to(torch.int64)
    return AdditiveInputs(contexts, am, symbols, boundary), scales


def _zero_padding(rows: Tensor, is_real: Tensor) -> Tensor:
    """Returns rows (B, N, V) with zeros where is_real (B, N) is false.

    On the CPU, it returns rows itself if all are real.
    """
    if is_real.is_cpu and not torch.compiler.is_compiling() and bool(is_real.all()):
        return rows
    return rows.masked_fill(~is_real[:, :, None], 0.0)


def _log_sum_exp(rows: Tensor) -> Tensor:
    """Returns the logsumexp of rows (B, N, V) as (B, N) float64; NaN if the maximum is infinite."""
    top = rows.detach().amax(-1, keepdim=True)
    return (rows - top).exp().sum(-1).to(native.SCORE_DTYPE).log() + top.squeeze(-1)


def _log_mean_softmax(lm: Tensor, normalizer: Tensor, is_context: Tensor) -> Tensor:
    """Returns the log of the mean of softmax(lm) over all real contexts (b, u), (V,).

    Args:
        lm: (B, S + 1, V).
        normalizer: (B, S + 1, 1), logsumexp of lm.
        is_context: (B, S + 1) bool, false in padding.
    """
    log_probs = (lm - normalizer.to(lm.dtype)).masked_fill(~is_context[:, :, None], float("-inf"))
    top = log_probs.detach().amax((0, 1))
    # A symbol of probability zero in all contexts has top = -inf, and -inf - -inf is NaN.
    top = torch.where(top == float("-inf"), 0.0, top)
    total = (log_probs - top).exp().sum((0, 1))
    is_possible = total != 0  # true for NaN, so that NaN propagates
    # The inner where avoids the derivative of log(0), which would make the gradient NaN.
    log_total = torch.where(is_possible, total, 1.0).log()
    mean = log_total + top - is_context.sum().to(lm.dtype).log()
    return torch.where(is_possible, mean, float("-inf"))


def check_inputs(inputs: SimpleInputs, termination_symbol: int) -> None:
    """Checks types, shapes, dtypes and devices.

    Raises:
        TypeError: if an argument is not a tensor, or has the wrong dtype.
        ValueError: if a shape, a device or the termination symbol does not fit.
    """
    lm, am, symbols, boundary = inputs
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
        raise ValueError("symbols: expected at least 1 utterance, got B = 0")
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
    if not 0 <= termination_symbol < vocab_size:
        raise ValueError(
            f"termination_symbol: expected 0 <= termination_symbol < {vocab_size} (V of am), "
            f"got {termination_symbol}"
        )
    checks.check_boundary(boundary, num_utterances, am.device)
    native.require_supported_device(am.device)
