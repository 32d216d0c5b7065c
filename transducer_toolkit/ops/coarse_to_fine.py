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
from transducer_toolkit.ops.lattice import CellScores, LatticeBatch, RowTile
from transducer_toolkit.ops.options import FusedOptions

# The range of bfloat16 is that of float32, so nothing overflows that float32 can hold.
COARSE_DTYPE = torch.bfloat16
# Bound of the sum over the cells that backward computes in low precision of (sensitivity * error of
# the coarse scores), relative to the L1 norm of the gradient of the utterance's logits. TF32 itself
# errs by about 1e-3, so it gets a larger budget.
LOW_BUDGET = 3.5e-7
TF32_LOW_BUDGET = 3.5e-6
# The same for (occupancy * error of the coarse scores) of the cells that are not refined. It is
# much smaller because an error of one score changes the occupancies of a whole path.
COARSE_BUDGET = LOW_BUDGET / 5
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
# Gradients below this part of (T + U) are not resolved by float32 either. With 1e-2, a batch whose
# only utterance had a loss of 1e-4 got gradients that were wrong by 11 %.
LOWEST_GRADIENT = 1e-4
# Smaller products are not worth it: the join and the log-sum-exp take longer (V * D).
MIN_WEIGHT_SIZE = 2**14
# Operations of the forward product from which on a coarse pass is worth it on a GPU, by the
# arithmetic of float32 products; None: never. On an H100, 2**38.4 operations took 12.6 instead of
# 19.9 ms (peaky: 7.4 instead of 11.3), and 2**37.8 hardly less than without. With TF32, the coarse
# pass was slower for 2**38.4 operations (8.9 instead of 7.3 ms) and for 2**40.8 (13.8 and 13.1).
MIN_GPU_OPERATIONS = {"float32": 2**38, "tf32": None}
# Memory for the logits of the fine pass that backward uses again; the others are computed twice.
FINE_LOGITS_BYTES = {"cpu": 2 * 2**20, "cuda": 512 * 2**20}
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
    if enc.device.type == "cuda":
        arithmetic = "tf32" if torch.backends.cuda.matmul.allow_tf32 else "float32"
        least = MIN_GPU_OPERATIONS[arithmetic]
        if least is None or 2 * num_rows * weight_size < least:
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
        places: (rows,) int64, how many rows were refined before this one; -1 for a coarse row.
        error: (B,) float64, the largest error that was found among the coarse scores.
        is_sample: whether only the sample was refined, which may have missed larger errors.
        num_fine: the number of refined rows.
    """

    sums: PathSums
    places: Tensor
    error: Tensor
    is_sample: bool
    num_fine: int

    @property
    def is_fine(self) -> Tensor:
        """(rows,) bool, whether the scores of a row are fine."""
        return self.places >= 0


def refine(
    batch: LatticeBatch,
    scores: CellScores,
    options: FusedOptions,
    score_rows: Callable[[Tensor, CellScores, int], None],
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
        score_rows: computes the fine scores of rows (N,) and writes them to the second argument.
            The third is the number of rows that were refined before.
        has_scores: (rows,) bool, the scores of the other rows are -inf; None if there are none.
    """
    like = scores.blank
    places = native.mapped(batch.num_rows, like=like).view(torch.int64).fill_(-1)
    error = like.new_zeros(batch.num_utterances)
    extra = None
    if scores.extra is not None:
        extra = native.mapped(scores.extra.numel(), like=like).view_as(scores.extra)
    fine_blank, fine_label = (native.mapped(batch.num_rows, like=like) for _ in range(2))
    fine = CellScores(fine_blank, fine_label, scores.normalizer, extra)
    num_fine = 0

    def make_fine(rows: Tensor) -> None:
        nonlocal num_fine
        score_rows(rows, fine, num_fine)
        tile = RowTile(0, rows.numel(), rows)
        stages.replace_scores(
            scores, fine, batch, tile, first_place=num_fine, places=places, error=error
        )
        num_fine += tile.size

    if has_scores is None:
        step = max(MIN_SAMPLE_STEP, batch.num_rows // NUM_SAMPLES)
        make_fine(torch.arange(0, batch.num_rows, step, device=like.device))
    else:
        rows = has_scores.nonzero().flatten()
        make_fine(rows[:: max(MIN_SAMPLE_STEP, rows.numel() // NUM_SAMPLES)].contiguous())
    budget = low_budget(like.device) * (COARSE_BUDGET / LOW_BUDGET)
    stricter = budget
    is_sample = True
    sums = None
    while True:
        sums = path_sums(scores, batch, options, with_uses=True, exact=False, before=sums)
        refined = Refined(sums, places, error, is_sample, num_fine)
        # The exponent: a path through several coarse rows has the errors of all of them.
        weight = _weights(
            batch, scores, options, refined, of_fine_rows=False, exponent=10.0, loss=sums.losses
        )
        kept = _heaviest_rows(weight, batch, budget if is_sample else CHECK_SLACK * budget)
        num_rows = int(kept.total)
        if num_rows == 0:
            return refined
        if not is_sample:  # the check failed; a selection that is hardly stricter would fail again
            stricter /= STRICTER_BY
            kept = _heaviest_rows(weight, batch, stricter)
            num_rows = int(kept.total)
        rows = kept.rows[:num_rows]
        del refined, kept, weight  # frees their memory before the next ones
        make_fine(rows)
        is_sample = False


def _heaviest_rows(
    weight: Tensor, batch: LatticeBatch, budget: float, total: Tensor | None = None
) -> stages.KeptRows:
    """Lists all rows but those whose weights add up to ``budget * (T_b + U_b)``."""
    # The sum of both arguments counts.
    return stages.kept_rows(weight, weight, batch, dropped_mass=2 * budget, total=total)


def _weights(
    batch: LatticeBatch,
    scores: CellScores,
    options: FusedOptions,
    refined: Refined,
    *,
    of_fine_rows: bool,
    exponent: float,
    least_error: float = 0.0,
    loss: Tensor | None = None,
) -> Tensor:
    """Calls :func:`stages.row_weights` with the error that the refined rows show."""
    return stages.row_weights(
        scores,
        refined.sums[1:],
        batch,
        options,
        stages.RowWeights(
            of_fine_rows=of_fine_rows,
            error_scale=SAMPLE_MARGIN if refined.is_sample else 1.0,
            unknown_error=EXPECTED_ERROR if refined.is_sample else 0.0,
            least_error=least_error,
            exponent=exponent,
            least_gradient=LOWEST_GRADIENT,
        ),
        loss=loss,
        error=refined.error,
        places=refined.places,
    )


class Visit(NamedTuple):
    """The rows that backward visits, in lists whose other elements are undefined.

    Attributes:
        full: (rows,) int64, rows to compute in full precision.
        low: (rows,) int64, rows to compute in low precision.
    """

    full: Tensor
    low: Tensor


def plan_backward(
    batch: LatticeBatch,
    scores: CellScores,
    options: FusedOptions,
    refined: Refined,
    counts: Tensor,
) -> Visit:
    """Divides the rows that backward visits by the precision that they need.

    Only refined rows get full precision.

    Args:
        batch: the lattices.
        scores: the scores that :func:`refine` left.
        options: of the loss.
        refined: result of :func:`refine`.
        counts: (2,) int64, the numbers of both kinds of rows are written to it.
    """
    weight = _weights(
        batch, scores, options, refined, of_fine_rows=True, exponent=2.0, least_error=PRODUCT_ERROR
    )
    full = _heaviest_rows(weight, batch, low_budget(weight.device), counts[0])
    low = stages.kept_rows(
        *occupancies(refined.sums, options),
        batch,
        dropped_mass=options.dropped_mass,
        taken=full,
        total=counts[1],
    )
    return Visit(full.rows, low.rows)
