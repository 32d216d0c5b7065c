# SPDX-License-Identifier: Apache-2.0
"""The compiled stages of the additive joiner (logits = am_t + lm_u).

The repair of normalizers runs on every device. The other stages run on the CPU only (see
:func:`runs_here`); each replaces several passes of PyTorch by one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from transducer_toolkit.ops import native


def runs_here(tensor: Tensor) -> bool:
    """Returns whether shifted_exp and AdditiveStages support the tensor's device (the CPU)."""
    with native.backend_of(tensor) as backend:
        return not backend.is_cuda


def lowest_product(scores: Tensor) -> float:
    """Returns the product of exponentials below which underflow makes it inaccurate."""
    # Each of the V terms may have lost up to `tiny`. For a product of at least V * tiny / eps, the
    # loss is at most one rounding error.
    limits = torch.finfo(scores.dtype)
    return scores.size(-1) * limits.tiny / limits.eps


def shifted_exp(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Returns exp(rows - max) of rows (B, N, V) with subnormals set to zero, and max (B, N)."""
    exponentials, maxima = torch.empty_like(rows), rows.new_empty(rows.shape[:-1])
    with native.backend_of(rows) as backend:
        native.extension.cpu.shifted_exp(
            dtype=native.DTYPES[rows.dtype],
            rows=native.address(rows),
            num_rows=maxima.numel(),
            size=rows.size(-1),
            **backend.queue,
            exponentials=native.address(exponentials),
            max=native.address(maxima),
        )
    return exponentials, maxima


class AdditiveInputs(NamedTuple):
    """Inputs of :func:`~transducer_toolkit.ops.additive.additive_scores`.

    Attributes:
        contexts: (B, S + 1, V) float32 or float64, the predictor part of the logits; with a
            positive am_only_scale (B, S + 2, V), where the last row is the prior. -inf means
            probability zero.
        am: (B, T, V), same dtype and device, the encoder part of the logits.
        symbols: (B, S) int64 in [0, V).
        context_blank: (B, S + 1) float64, the part of the blank scores that depends on u only.
        context_label: (B, S) float64, the part of the label scores that depends on u only.
    """

    contexts: Tensor
    am: Tensor
    symbols: Tensor
    context_blank: Tensor
    context_label: Tensor


@dataclass(frozen=True)
class AdditiveOptions:
    """Options of :func:`~transducer_toolkit.ops.additive.additive_scores`.

    Attributes:
        blank: id of blank, in [0, V).
        combined_scale: weight of the log-probabilities of am and lm together, >= 0.
        am_only_scale: weight of the log-probabilities of am and the prior, >= 0.
    """

    blank: int
    combined_scale: float
    am_only_scale: float


class AdditiveScores(NamedTuple):
    """Result of the operator of :func:`~transducer_toolkit.ops.additive.additive_scores`.

    Attributes:
        blank: (B, T, S + 1) float64, blank scores.
        label: (B, T, S) float64, label scores.
        normalizer: (B, T, columns) float64, one column for each context.
        product: (B, T, columns), the product of the exponentials.
    """

    blank: Tensor
    label: Tensor
    normalizer: Tensor
    product: Tensor


class AdditiveStages:
    """The passes over all cells of an additive joiner on the CPU (csrc/additive_scores.h).

    Args:
        inputs: the tensors.
        product: (B, T, columns), the product of the exponentials of am and contexts.
        options: blank and scales.
    """

    def __init__(self, inputs: AdditiveInputs, product: Tensor, options: AdditiveOptions) -> None:
        contexts, am, symbols, context_blank, context_label = inputs
        self._keep_alive = inputs
        self._product = product
        self._num_symbols = symbols.size(1)
        self._cells = _cells((am, contexts, product), lowest_product(am))
        self._terms = native.extension.AdditiveTerms(
            num_symbols=symbols.size(1),
            symbols=native.address(symbols),
            blank=options.blank,
            combined_scale=options.combined_scale,
            am_only_scale=options.am_only_scale,
            context_blank=native.address(context_blank),
            context_label=native.address(context_label),
        )

    def scores(self, am_max: Tensor, lm_max: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns normalizer (B, T, columns), blank scores and label scores in float64."""
        size, num_symbols = self._product.shape, self._num_symbols
        normalizer = self._product.new_empty(size, dtype=native.SCORE_DTYPE)
        blank = normalizer.new_empty(size[0], size[1], num_symbols + 1)
        label = normalizer.new_empty(size[0], size[1], num_symbols)
        with native.backend_of(blank) as backend:
            native.extension.cpu.additive_scores(
                self._cells,
                self._terms,
                am_max=native.address(am_max),
                lm_max=native.address(lm_max),
                **backend.queue,
                out=native.extension.AdditiveScoresOut(
                    normalizer=native.address(normalizer),
                    blank=native.address(blank),
                    label=native.address(label),
                ),
            )
        return normalizer, blank, label

    def weights(
        self, grad_blank: Tensor, grad_label: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Computes the left operand of the matrix products of backward.

        Returns:
            Gradient of the normalizer (B, T, columns) float64; scale (B,) float64; weight
            (B, T, columns), which is that gradient over scale and product; gradients of
            context_blank and context_label.
        """
        weight = torch.empty_like(self._product)
        grad_normalizer = torch.empty_like(self._product, dtype=native.SCORE_DTYPE)
        scale = grad_normalizer.new_empty(len(weight))
        grad_context_blank = grad_normalizer.new_empty(len(weight), self._num_symbols + 1)
        grad_context_label = grad_normalizer.new_empty(len(weight), self._num_symbols)
        with native.backend_of(weight) as backend:
            native.extension.cpu.additive_weights(
                self._cells,
                self._terms,
                grads=native.extension.AdditiveScoreGrads(
                    blank=native.address(grad_blank), label=native.address(grad_label)
                ),
                **backend.queue,
                out=native.extension.AdditiveWeightsOut(
                    grad_normalizer=native.address(grad_normalizer),
                    scale=native.address(scale),
                    grad_context_blank=native.address(grad_context_blank),
                    grad_context_label=native.address(grad_context_label),
                ),
                weight=native.address(weight),
            )
        return grad_normalizer, scale, weight, grad_context_blank, grad_context_label

    def gradients(self, **tensors: Tensor) -> None:
        """Turns the matrix products of backward into gradients, in place.

        Args:
            tensors: am_exp, lm_exp, normalizer, grad_blank, grad_label, grad_normalizer, scale,
                grad_am and grad_lm. grad_am and grad_lm hold the products and are overwritten by
                the gradients.
        """
        addresses = {name: native.address(tensor) for name, tensor in tensors.items()}
        take = addresses.pop
        exponentials = native.extension.AdditiveExponentials(am=take("am_exp"), lm=take("lm_exp"))
        grads = native.extension.AdditiveScoreGrads(
            blank=take("grad_blank"), label=take("grad_label")
        )
        saved = native.extension.AdditiveSaved(
            normalizer=take("normalizer"),
            grad_normalizer=take("grad_normalizer"),
            scale=take("scale"),
        )
        with native.backend_of(self._product) as backend:
            native.extension.cpu.additive_gradients(
                self._cells,
                self._terms,
                exponentials=exponentials,
                grads=grads,
                saved=saved,
                **backend.queue,
                **addresses,  # grad_am and grad_lm
            )


def _cells(
    joint: tuple[Tensor, Tensor, Tensor], threshold: float
) -> native.extension.AdditiveCells:
    am, lm, product = joint
    return native.extension.AdditiveCells(
        dtype=native.DTYPES[am.dtype],
        num_utterances=am.size(0),
        num_frames=am.size(1),
        num_columns=lm.size(1),
        vocab_size=am.size(2),
        am=native.address(am),
        lm=native.address(lm),
        product=native.address(product),
        threshold=threshold,
    )


def repair_normalizer(
    joint: tuple[Tensor, Tensor, Tensor], threshold: float, normalizer: Tensor
) -> None:
    """Overwrites `normalizer` with logsumexp(am_t + lm_u) in cells whose product < threshold.

    Args:
        joint: am (B, T, V), lm (B, U + 1, V) and product (B, T, U + 1), float32 or float64.
        threshold: the result of :func:`lowest_product`.
        normalizer: (B, T, U + 1) float64.
    """
    with native.backend_of(joint[0]) as backend:
        backend.stages.repair_normalizer(
            _cells(joint, threshold), **backend.queue, normalizer=native.address(normalizer)
        )


def repair_normalizer_backward(
    joint: tuple[Tensor, Tensor, Tensor],
    threshold: float,
    normalizer: Tensor,
    grad: Tensor,
    grads: tuple[Tensor, Tensor],
) -> None:
    """Adds grad * softmax(am_t + lm_u) of cells whose product < threshold to the gradients.

    Args:
        joint: as in :func:`repair_normalizer`.
        threshold: as in :func:`repair_normalizer`.
        normalizer: the result of :func:`repair_normalizer`.
        grad: (B, T, U + 1) float64, the gradient of the normalizer.
        grads: the gradients of am and lm, with the shapes of am and lm.
    """
    with native.backend_of(joint[0]) as backend:
        backend.stages.repair_normalizer_backward(
            _cells(joint, threshold),
            normalizer=native.address(normalizer),
            grad=native.address(grad),
            **backend.queue,
            grad_am=native.address(grads[0]),
            grad_lm=native.address(grads[1]),
        )
