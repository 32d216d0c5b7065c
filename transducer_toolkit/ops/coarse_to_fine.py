# SPDX-License-Identifier: Apache-2.0
"""Precision follows occupancy: which rows of a batch are computed in which precision.

The occupancy of a cell says how much an error of its scores and of its gradient matters. So a loss
computes all cells in low precision first (coarse), computes those again in full precision that
matter (fine), and uses low precision for the others in backward, too. docs/precision.md explains
the budget. All functions here work on whole batches.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from transducer_toolkit.ops import native, stages
from transducer_toolkit.ops.durations import PathSums, occupancies, path_sums
from transducer_toolkit.ops.joint_tiles import are_logits_few, within_share_of_device
from transducer_toolkit.ops.lattice import CellScores, LatticeBatch
from transducer_toolkit.ops.options import FusedOptions

# The range of bfloat16 is that of float32, so nothing overflows that float32 can hold.
COARSE_DTYPE = torch.bfloat16
# Bound of the sum over the cells that backward computes in low precision of (sensitivity * error of
# the coarse scores), relative to the L1 norm of the gradient of the utterance's logits. TF32 itself
# errs by about 1e-3, so it gets a larger budget.
LOW_BUDGET = 3.5e-6
TF32_LOW_BUDGET = 3.5e-5
# The same for (occupancy * error of the coarse scores) of the cells that are not refined. It is
# much smaller because an error of one score changes the occupancies of a whole path.
COARSE_BUDGET = LOW_BUDGET / 50
# The check after a refinement allows this much more than the selection, so that it rarely fails.
CHECK_SLACK = 4.0
# Each time that the check fails, the next selection is stricter by this factor, so that it ends.
STRICTER_BY = 10.0
# Rows that are refined first, evenly spaced, to measure the error of the coarse scores before the
# selection. The largest error of all selected rows is larger than that of the sample.
NUM_SAMPLES = 256
MIN_SAMPLE_STEP = 64
SAMPLE_MARGIN = 1.5
# Error of an utterance without a sample.
EXPECTED_ERROR = 0.01
# Error of a product in bfloat16, relative to the largest term.
PRODUCT_ERROR = 2.0**-8
# Gradients below this part of (T + U) are not resolved by float32 either.
LOWEST_GRADIENT = 1e-2
# Smaller products are not worth it: the join and the log-sum-exp take longer (V * D).
MIN_WEIGHT_SIZE = 2**14
# Rows whose gradients are measured at once, so that temporary numbers stay in the cache.
ROWS_AT_ONCE = {"cpu": 2**14}
# On a GPU the coarse path has 340 to 510 launches instead of 70 to 95. On an H100 whose host takes
# 13 us for each, a product of 0.37e12 operations was not worth it on a peaky lattice: 13.7 instead
# of 11.4 ms, of which the device worked 5.0 instead of 10.6. With TF32 it was never worth it.
MIN_GPU_OPERATIONS = 2**40
# Memory for the logits of the fine pass, which backward reuses if all of them fit.
FINE_LOGITS_BYTES = {"cpu": 4 * 2**20, "cuda": 512 * 2**20}
# Read once, because torch.compile cannot trace it. Not in every torch from 2.4 on.
_CPU_HAS_BFLOAT16 = bool(getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)())


def pays(enc: Tensor, vocab_size: int, num_rows: int) -> bool:
    """Returns whether a coarse pass makes the loss faster.

    It does for float32 inputs, if the logits of the batch are too many to be kept, the output layer
    is large enough, and the processor multiplies bfloat16 matrices faster than float32.
    """
    weight_size = vocab_size * enc.size(-1)
    if enc.dtype != torch.float32 or weight_size < MIN_WEIGHT_SIZE:
        return False
    if enc.device.type == "cuda" and (
        torch.backends.cuda.matmul.allow_tf32 or 2 * num_rows * weight_size < MIN_GPU_OPERATIONS
    ):
        return False
    return not are_logits_few(enc, vocab_size, num_rows) and has_fast_bfloat16(enc.device)


def has_fast_bfloat16(device: torch.device) -> bool:
    """Returns whether the processor has instructions for products of bfloat16 matrices."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).major >= 8
    return _CPU_HAS_BFLOAT16


def num_fine_logits(enc: Tensor, vocab_size: int) -> int:
    """Returns the number of rows whose fine logits are kept at most."""
    budget = within_share_of_device(FINE_LOGITS_BYTES.get(enc.device.type, 0), enc.device)
    return budget // (vocab_size * enc.element_size())


def low_budget(device: torch.device) -> float:
    is_tf32 = device.type == "cuda" and torch.backends.cuda.matmul.allow_tf32
    return TF32_LOW_BUDGET if is_tf32 else LOW_BUDGET


class Refined(NamedTuple):
    """Result of :func:`refine`.

    Attributes:
        sums: losses and uses of all rows.
        is_fine: (rows,) bool, whether the scores of a row are fine.
        error: (B,) float64, the largest error that was found among the coarse scores.
    """

    sums: PathSums
    is_fine: Tensor
    error: Tensor


def refine(
    batch: LatticeBatch,
    scores: CellScores,
    options: FusedOptions,
    score_rows: Callable[[Tensor], None],
    has_scores: Tensor | None = None,
) -> Refined:
    """Computes the losses from coarse scores, of which it replaces those that matter.

    It refines a sample of the rows to measure the errors of the coarse scores. It selects all rows
    but those that may hold COARSE_BUDGET, has them computed in full precision, and runs the lattice
    again. The new occupancies and the errors that it found check the selection: while an
    utterance's other rows may hold more than the budget, they are selected next. Rows with NaN and
    utterances without a finite loss are always selected, so low precision alone never decides that
    an utterance has no loss.

    Args:
        batch: the lattices.
        scores: coarse scores of all rows; changed.
        options: of the loss.
        score_rows: computes the fine scores of rows (N,) and writes them to `scores`.
        has_scores: (rows,) bool, the scores of the other rows are -inf; None if there are none.
    """
    is_fine = torch.zeros_like(scores.blank, dtype=torch.bool)
    deviation = native.mapped(
        batch.num_rows, like=scores.blank
    ).zero_()  # of the coarse scores from the fine ones

    def make_fine(rows: Tensor) -> Tensor:
        """Refines rows; returns the largest deviation of each utterance."""
        parts = [scores.blank, scores.label]
        if scores.extra is not None:
            parts.append(scores.extra)
        before = [part[rows] for part in parts]
        score_rows(rows)
        is_fine.index_fill_(0, rows, True)
        after = [part[rows] for part in parts]
        found = [
            (now - then).abs_().masked_fill_(now == then, 0.0)  # both may be -inf
            for now, then in zip(after, before, strict=True)
        ]
        largest = torch.maximum(*found[:2])
        for of_extra in found[2:]:  # an arc has the errors of its symbol and of its duration
            largest += of_extra.amax(1)
        deviation.index_copy_(0, rows, largest.nan_to_num_(nan=torch.inf))
        return batch.per_utterance(deviation, "max")

    if has_scores is None:
        step = max(MIN_SAMPLE_STEP, batch.num_rows // NUM_SAMPLES)
        sample = torch.arange(0, batch.num_rows, step, device=is_fine.device)
    else:
        rows = has_scores.nonzero().flatten()
        sample = rows[:: max(MIN_SAMPLE_STEP, rows.numel() // NUM_SAMPLES)].contiguous()
    error = make_fine(sample)
    error = error.mul_(SAMPLE_MARGIN).masked_fill_(error == 0, EXPECTED_ERROR)
    budget = low_budget(is_fine.device) * (COARSE_BUDGET / LOW_BUDGET)
    stricter = budget
    is_check = False
    while True:
        sums = path_sums(scores, batch, options, with_uses=True, exact=False)
        # exp: the probability of a path through several coarse rows has the errors of all of them.
        strictness = error * (10 * error).exp() / _gradient_size(batch, scores, sums, options)
        strictness.masked_fill_(~sums.losses.isfinite(), torch.nan)
        blank, label = occupancies(sums, options)
        weight = native.mapped(batch.num_rows, like=blank)
        torch.add(blank, label, out=weight)
        weight.mul_(batch.per_row(strictness)).masked_fill_(is_fine, 0.0)
        rows, num_rows = _heaviest_rows(weight, batch, CHECK_SLACK * budget if is_check else budget)
        if int(num_rows) == 0:
            return Refined(sums, is_fine, error)
        if is_check:  # failed; to select only as many as it asks for would fail many times
            stricter /= STRICTER_BY
            rows, num_rows = _heaviest_rows(weight, batch, stricter)
        del sums  # frees its memory before the next ones
        error = make_fine(rows[: int(num_rows)])
        is_check = True


def _heaviest_rows(weight: Tensor, batch: LatticeBatch, budget: float) -> tuple[Tensor, Tensor]:
    """Lists all rows but those whose weights add up to ``budget * (T_b + U_b)``.

    Returns:
        Rows as of :func:`stages.kept_rows`, and how many they are, a scalar.
    """
    # The sum of both arguments counts.
    rows, counts = stages.kept_rows(weight, weight, batch, dropped_mass=2 * budget)
    return rows, counts.sum()


def _logits_gradient(
    scores: CellScores, sums: PathSums, options: FusedOptions, *, is_sensitive: bool
) -> tuple[Tensor, Tensor]:
    """Returns the L1 norm of the gradient of each row's logits, and how sensitive it is.

    The sensitivity bounds the change of the gradient by an error of 1 in the logits. It has no
    elements unless `is_sensitive`.
    """
    limit = options.clamp if options.clamp > 0 else torch.inf
    sizes = native.mapped(scores.blank.numel(), like=scores.blank)
    sensitivities = native.mapped(sizes.numel() if is_sensitive else 0, like=sizes)
    rows_at_once = ROWS_AT_ONCE.get(sizes.device.type, sizes.numel())
    for begin in range(0, sizes.numel(), rows_at_once):
        rows = slice(begin, begin + rows_at_once)
        entries, spread = _entries(rows, scores, sums, options)
        size = sizes[rows].zero_()
        for entry in entries:
            entry = entry.abs_().clamp_(max=limit)
            size += entry if entry.dim() == 1 else entry.sum(1)
        if is_sensitive:
            torch.add(size, spread, out=sensitivities[rows])
    return sizes, sensitivities


def _entries(
    rows: slice, scores: CellScores, sums: PathSums, options: FusedOptions
) -> tuple[list[Tensor], Tensor]:
    """Returns entries of the gradient of the rows' logits, and how much a softmax can change them.

    An entry is (rows,) or (rows, K); entries of one sign may be summed up.
    """
    use_blank, use_label, use_extra = sums.use_blank[rows], sums.use_label[rows], sums.use_extra
    blank, label = scores.blank[rows].exp(), scores.label[rows].exp()
    occupancy = use_blank + use_label
    extra = None if scores.extra is None else scores.extra[rows].exp()
    if options.is_hat:
        # The labels share what blank leaves, and have a gradient only where a label is used.
        share = label.div_((1 - blank).clamp_(min=torch.finfo(label.dtype).tiny)).clamp_(max=1.0)
        of_labels = (1 - share).mul_(use_label)
        entries = [blank * occupancy - use_blank, of_labels.clone(), of_labels.clone()]
        spread = torch.minimum(blank, 1 - blank).mul_(occupancy).add_(of_labels)
    else:
        largest, rest = torch.maximum(blank, label), (1 - blank).sub_(label)
        entries = []
        if extra is not None and options.arcs.num_big_blanks:
            occupancy += use_extra[rows].sum(1)
            rest -= extra.sum(1)
            torch.maximum(largest, extra.amax(1), out=largest)
        entries.append(blank.mul_(occupancy).sub_(use_blank))
        entries.append(label.mul_(occupancy).sub_(use_label))
        entries.append(rest.clamp_(min=0.0).mul_(occupancy))
        spread = largest.neg_().add_(1.0).mul_(occupancy)
    if extra is not None:
        if options.arcs.predicts_durations:  # they are another softmax
            spread += (1 - extra.amax(1)).mul_(occupancy)
        entries.append(extra.mul_(occupancy[:, None]).sub_(use_extra[rows]))
    return entries, spread


def _gradient_size(
    batch: LatticeBatch, scores: CellScores, sums: PathSums, options: FusedOptions
) -> Tensor:
    """Returns the L1 norm of the gradient of each utterance's logits, over T_b + U_b."""
    size, _ = _logits_gradient(scores, sums, options, is_sensitive=False)
    return batch.per_utterance(size, "sum").div_(batch.path_lengths).clamp_(min=LOWEST_GRADIENT)


class Visit(NamedTuple):
    """The rows that backward visits.

    Attributes:
        rows: (rows,) int64: num_full rows, then num_low rows, then zeros.
        num_full: scalar, rows to compute in full precision.
        num_low: scalar, rows to compute in low precision.
    """

    rows: Tensor
    num_full: Tensor
    num_low: Tensor


def plan_backward(
    batch: LatticeBatch, scores: CellScores, options: FusedOptions, refined: Refined
) -> Visit:
    """Divides the rows that backward visits by the precision that they need.

    Only refined rows get full precision.

    Args:
        batch: the lattices.
        scores: the scores that :func:`refine` left.
        options: of the loss.
        refined: result of :func:`refine`.
    """
    rows, num_full = _rows_of_full_precision(batch, scores, options, refined)
    count = int(num_full)
    use_blank, use_label = (
        use.index_fill(0, rows[:count], 0.0) for use in occupancies(refined.sums, options)
    )
    low_rows, counts = stages.kept_rows(
        use_blank, use_label, batch, dropped_mass=options.dropped_mass
    )
    del use_blank, use_label  # temporary numbers of all rows would add up
    num_low = counts.sum()
    rows[count:] = low_rows[: batch.num_rows - count]
    del low_rows
    places = torch.arange(batch.num_rows, device=rows.device)
    rows.masked_fill_(places >= num_full + num_low, 0)
    return Visit(rows, num_full, num_low)


def _rows_of_full_precision(
    batch: LatticeBatch, scores: CellScores, options: FusedOptions, refined: Refined
) -> tuple[Tensor, Tensor]:
    """Lists rows as :func:`_heaviest_rows` does: those to compute in full precision."""
    size, weight = _logits_gradient(scores, refined.sums, options, is_sensitive=True)
    total = batch.per_utterance(size, "sum").div_(batch.path_lengths).clamp_(min=LOWEST_GRADIENT)
    del size
    error = refined.error.clamp(min=PRODUCT_ERROR)
    strictness = error * (2 * error).exp() / total
    weight.mul_(batch.per_row(strictness)).masked_fill_(~refined.is_fine, 0.0)
    return _heaviest_rows(weight, batch, low_budget(weight.device))
