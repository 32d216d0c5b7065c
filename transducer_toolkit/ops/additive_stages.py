# SPDX-License-Identifier: Apache-2.0
"""The compiled stages of the additive joiner (logits = am_t + lm_u), csrc/additive_scores.h."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from transducer_toolkit.ops import native


class AdditiveInputs(NamedTuple):
    """Tensors of :func:`~transducer_toolkit.ops.additive.additive_scores`.

    Attributes:
        contexts: (B, S + 1, V) float32 or float64, the predictor part of the logits; with a
            positive am_only_scale (B, S + 2, V), where the last row is the prior. -inf means
            probability zero.
        am: (B, T, V), same dtype and device, the encoder part of the logits.
        symbols: (B, S) int64 on the same device.
        boundary: (B, 4) int64, on the CPU or the same device.
    """

    contexts: Tensor
    am: Tensor
    symbols: Tensor
    boundary: Tensor


@dataclass(frozen=True)
class AdditiveOptions:
    """Options of :func:`~transducer_toolkit.ops.additive.additive_scores`.

    Attributes:
        blank: id of blank, in [0, V).
        combined_scale: weight of the log-probabilities of am and lm together, >= 0.
        lm_only_scale: weight of the log-probabilities of lm alone, >= 0.
        am_only_scale: weight of the log-probabilities of am and the prior, >= 0.
    """

    blank: int
    combined_scale: float
    lm_only_scale: float
    am_only_scale: float


class ScoreGrads(NamedTuple):
    """Upstream gradients of the scores, divided by a factor.

    Attributes:
        blank: (B, T, S + 1) float64, not much above 1.
        label: (B, T, S + 1) float64, not much above 1.
        factor: (B,) float64. Where it is 0, all gradients are, even those of NaN.
    """

    blank: Tensor
    label: Tensor
    factor: Tensor


class AdditiveStages:
    """The passes over an additive joiner; computes the exponentials of both sides at once.

    Args:
        inputs: the tensors, contiguous.
        options: blank and scales.
        with_scores: whether the scores will be computed.

    Attributes:
        lattices: (4, B) int64, the argument of LatticeBatch.of_grid. Undefined without the scores.
    """

    def __init__(
        self, inputs: AdditiveInputs, options: AdditiveOptions, *, with_scores: bool
    ) -> None:
        contexts, am, symbols, boundary = inputs
        boundary = native.to_device(boundary, am.device).contiguous()
        self._inputs = inputs._replace(boundary=boundary)
        self._am_exp, self._lm_exp = torch.empty_like(am), torch.empty_like(contexts)
        num_utterances = am.size(0)
        am_max, lm_max = am.new_empty(am.shape[:2]), am.new_empty(contexts.shape[:2])
        lm_sum = am.new_empty(contexts.shape[:2], dtype=native.SCORE_DTYPE)
        num_symbols = symbols.size(1)
        self.lattices = boundary.new_empty(4, num_utterances)
        self._terms = native.extension.AdditiveTerms(
            num_symbols=num_symbols,
            symbols=native.address(symbols),
            boundary=native.address(boundary),
            blank=options.blank,
            combined_scale=options.combined_scale,
            lm_only_scale=options.lm_only_scale,
            am_only_scale=options.am_only_scale,
        )
        self._exponentials = native.extension.AdditiveExponentials(
            am=native.address(self._am_exp),
            lm=native.address(self._lm_exp),
            am_max=native.address(am_max),
            lm_max=native.address(lm_max),
            lm_sum=native.address(lm_sum),
        )
        of_blank = lm_sum.new_empty(num_utterances, num_symbols + 1)
        of_label = lm_sum.new_empty(num_utterances, num_symbols)
        self._contexts = native.extension.AdditiveContexts(
            blank=native.address(of_blank) if with_scores else 0,
            label=native.address(of_label),
            lattices=native.address(self.lattices),
        )
        self._keep_alive = am_max, lm_max, lm_sum, of_blank, of_label
        with native.backend_of(am) as backend:
            backend.stages.additive_exponentials(
                self._cells(None),
                self._terms,
                **backend.queue,
                out=self._exponentials,
                contexts=self._contexts,
            )

    def _cells(self, product: Tensor | None) -> native.extension.AdditiveCells:
        contexts, am = self._inputs.contexts, self._inputs.am
        # Each of the V terms of a product may have lost up to `tiny`. For a product of at least
        # V * tiny / eps, the loss is at most one rounding error.
        limits = torch.finfo(am.dtype)
        return native.extension.AdditiveCells(
            dtype=native.DTYPES[am.dtype],
            num_utterances=am.size(0),
            num_frames=am.size(1),
            num_columns=contexts.size(1),
            vocab_size=am.size(2),
            am=native.address(am),
            lm=native.address(contexts),
            product=0 if product is None else native.address(product),
            threshold=am.size(2) * limits.tiny / limits.eps,
        )

    def scores(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Computes the scores of all cells.

        Returns:
            Blank scores and label scores (B, T, S + 1) float64, the latter with -inf in the last
            column; normalizers (B, T, columns) float64; products of the exponentials
            (B, T, columns).
        """
        am, symbols = self._inputs.am, self._inputs.symbols
        with torch.autocast(am.device.type, enabled=False):
            product = torch.bmm(self._am_exp, self._lm_exp.transpose(1, 2))
        normalizer = torch.empty_like(product, dtype=native.SCORE_DTYPE)
        size = am.size(0), am.size(1), symbols.size(1) + 1
        blank, label = normalizer.new_empty(size), normalizer.new_empty(size)
        with native.backend_of(am) as backend:
            backend.stages.additive_scores(
                self._cells(product),
                self._terms,
                exponentials=self._exponentials,
                contexts=self._contexts,
                **backend.queue,
                out=native.extension.AdditiveScoresOut(
                    normalizer=native.address(normalizer),
                    blank=native.address(blank),
                    label=native.address(label),
                ),
            )
        return blank, label, normalizer, product

    def gradients(
        self, product: Tensor, normalizer: Tensor, grads: ScoreGrads
    ) -> tuple[Tensor, Tensor]:
        """Returns the gradients of contexts and am.

        Args:
            product: as :meth:`scores` returned it.
            normalizer: as :meth:`scores` returned it.
            grads: the upstream gradients.
        """
        native_grads = native.extension.AdditiveScoreGrads(
            blank=native.address(grads.blank),
            label=native.address(grads.label),
            factor=native.address(grads.factor),
        )
        cells, device_type = self._cells(product), product.device.type
        weight, grad_normalizer = torch.empty_like(product), torch.empty_like(normalizer)
        with native.backend_of(product) as backend:
            backend.stages.additive_weights(
                cells,
                self._terms,
                grads=native_grads,
                **backend.queue,
                grad_normalizer=native.address(grad_normalizer),
                weight=native.address(weight),
            )
            with torch.autocast(device_type, enabled=False):
                grad_am = torch.bmm(weight, self._lm_exp)
                grad_lm = torch.bmm(weight.transpose(1, 2), self._am_exp)
            backend.stages.additive_gradients(
                cells,
                self._terms,
                exponentials=self._exponentials,
                grads=native_grads,
                saved=native.extension.AdditiveSaved(
                    normalizer=native.address(normalizer),
                    grad_normalizer=native.address(grad_normalizer),
                ),
                **backend.queue,
                grad_am=native.address(grad_am),
                grad_lm=native.address(grad_lm),
            )
        return grad_lm, grad_am
