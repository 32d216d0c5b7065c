// SPDX-License-Identifier: Apache-2.0
// Between stages 1 and 2 of a loss that computes all cells in low precision first, and then those
// in full precision that matter (docs/precision.md).
#pragma once

#include "lattice_batch.h"
#include "logits.h"

namespace transducer {

// Scores of all rows, as stage 1 writes them.
struct FineScores {
  const Score* blank;  // (num_rows,)
  const Score* label;  // (num_rows,)
  const Score* extra;  // (num_rows, num_extra), or null
  int64_t num_extra;
};

struct RefinedOut {
  Score* blank;  // (num_rows,): coarse scores, of which the tile's are replaced
  Score* label;
  Score* extra;
  int64_t* places;  // (num_rows,): how many rows were refined before this one; -1 for a coarse row
  Score* error;     // (B,): largest error of the coarse scores so far; +inf if there was one of NaN
};

// Replaces the coarse scores of the tile's rows by fine ones. Row i of the tile gets the place
// first_place + i. The error of a row is the larger of those of blank and label, plus the largest
// of the other scores: an arc has the errors of its symbol and of its duration.
void ReplaceScoresCpu(const LatticeBatch& batch, const RowTile& tile, const FineScores& fine,
                      int64_t first_place, int num_threads, const RefinedOut& out);

// What decides in which precision a row is computed: the scores, the uses, the error.
struct RowWeightsIn {
  const Score *blank, *label, *extra;              // scores
  const Score *use_blank, *use_label, *use_extra;  // what stage 2 computes from them
  const Score* loss;                               // (B,), or null
  const Score* error;                              // (B,), as in RefinedOut
  const int64_t* places;                           // as in RefinedOut
};

struct RowWeightsOptions {
  bool of_fine_rows;     // weight = sensitivity of refined rows; otherwise occupancy of the others
  double error_scale;    // the error of an utterance is `error * error_scale`,
  double unknown_error;  // but this if `error` is 0,
  double least_error;    // and at least this
  double exponent;       // of errors that add up along a path
  double least_gradient;
};

// weight = (sensitivity or occupancy) * e * exp(exponent * e) / max(least_gradient, G / (T_b + U_b))
//
// of each row, with the error e of its utterance and the L1 norm G of the gradient of the
// utterance's logits. The weight of rows that are not asked for is 0. With `loss`, the weights of an
// utterance without a finite loss are NaN. Rows of utterances of invalid lengths are not written.
// Scores and uses of padding rows must be 0.
//
// The sensitivity of a row bounds the change of the gradient of its logits by an error of 1 in
// them. Of `logits`, the clamp, is_hat and the numbers of big blanks and durations are used.
// `scratch` has RowWeightsScratch... bytes, which may contain anything.
int64_t RowWeightsScratchCpu(const LatticeBatch& batch);
void RowWeightsCpu(const LatticeBatch& batch, const RowWeightsIn& in, const LogitsOptions& logits,
                   const RowWeightsOptions& options, int num_threads, void* scratch, Score* weight);

// The same on the device, on `stream`.
void ReplaceScoresCuda(const LatticeBatch& batch, const RowTile& tile, const FineScores& fine,
                       int64_t first_place, void* stream, const RefinedOut& out);
int64_t RowWeightsScratchCuda(const LatticeBatch& batch);
void RowWeightsCuda(const LatticeBatch& batch, const RowWeightsIn& in, const LogitsOptions& logits,
                    const RowWeightsOptions& options, void* stream, void* scratch, Score* weight);

}  // namespace transducer
