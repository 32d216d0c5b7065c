# SPDX-License-Identifier: Apache-2.0
"""The stages of the coarse pass in plain torch, for packed batches."""

from __future__ import annotations

import torch
from torch import Tensor

from transducer_toolkit.ops.durations import PathSums, occupancies
from transducer_toolkit.ops.lattice import CellScores, LatticeBatch
from transducer_toolkit.ops.options import LossOptions
from transducer_toolkit.ops.stages import RowWeights


def logits_gradient(
    scores: CellScores, sums: PathSums, options: LossOptions
) -> tuple[Tensor, Tensor]:
    """The L1 norm of the gradient of each row's logits, and how sensitive it is."""
    limit = options.clamp if options.clamp > 0 else torch.inf
    use_blank, use_label, use_extra = sums.use_blank, sums.use_label, sums.use_extra
    blank, label = scores.blank.exp(), scores.label.exp()
    occupancy = use_blank + use_label
    extra = None if scores.extra is None else scores.extra.exp()
    if options.is_hat:
        share = (label / (1 - blank).clamp(min=torch.finfo(label.dtype).tiny)).clamp(max=1.0)
        of_labels = (1 - share) * use_label
        entries = [blank * occupancy - use_blank, of_labels, of_labels]
        spread = torch.minimum(blank, 1 - blank) * occupancy + of_labels
    else:
        largest, rest = torch.maximum(blank, label), 1 - blank - label
        if extra is not None and options.arcs.num_big_blanks:
            occupancy = occupancy + use_extra.sum(1)
            rest = rest - extra.sum(1)
            largest = torch.maximum(largest, extra.amax(1))
        entries = [blank * occupancy - use_blank, label * occupancy - use_label]
        entries.append(rest.clamp(min=0.0) * occupancy)
        spread = (1 - largest) * occupancy
    if extra is not None:
        if options.arcs.predicts_durations:
            spread = spread + (1 - extra.amax(1)) * occupancy
        entries += (extra * occupancy[:, None] - use_extra).unbind(1)
    size = sum(entry.abs().clamp(max=limit) for entry in entries)
    return size, size + spread


def row_weights(
    batch: LatticeBatch,
    scores: CellScores,
    sums: PathSums,
    options: LossOptions,
    weights: RowWeights,
    error: Tensor,
    is_fine: Tensor,
) -> Tensor:
    """stages.row_weights with the losses of `sums`."""
    size, sensitivity = logits_gradient(scores, sums, options)
    total = batch.per_utterance(size, "sum") / batch.path_lengths
    error = torch.where(error == 0, weights.unknown_error, error * weights.error_scale)
    error = error.clamp(min=weights.least_error)
    scale = error * (weights.exponent * error).exp() / total.clamp(min=weights.least_gradient)
    scale[~sums.losses.isfinite()] = torch.nan
    weight = sensitivity if weights.of_fine_rows else sum(occupancies(sums, options))
    is_wanted = is_fine if weights.of_fine_rows else ~is_fine
    return torch.where(is_wanted, weight * batch.per_row(scale), 0.0)
