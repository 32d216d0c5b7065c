// SPDX-License-Identifier: Apache-2.0
// Stage 1: computes three numbers per lattice cell from the logits.
#pragma once

#include "half.h"
#include "lattice_batch.h"
#include "logits.h"

namespace transducer {

struct CellScoresOut {
  Score* normalizer;  // (num_rows,)
  Score* blank;       // (num_rows,)
  Score* label;       // (num_rows,)
  Score* extra;  // (num_rows, NumExtra()), of big blanks or durations; or null if there are none
};

// For each cell of the tile, with x its row of V logits:
//   normalizer = logsumexp(x)                       (0 if from_log_softmax)
//   blank      = x[blank] - normalizer
//   label      = x[target of (b, u)] - normalizer   (-inf in the last column, u = U_b)
// With is_hat, the logsumexp is that of the labels alone, and
//   blank      = log sigmoid(x[blank])
//   label      = log sigmoid(-x[blank]) + x[target of (b, u)] - normalizer
// Big blanks and durations:
//   extra[i]   = x[column of i] - normalizer        of big blanks
//   extra[k]   = log_softmax(x[V ... V + K - 1])[k] of durations
// Scores are NaN if the row contains NaN or +inf, if all of it is -inf, or if the target is outside
// [0, V); stage 2 then makes the loss of that utterance NaN. With from_log_softmax, the stage reads
// only the logits of blank and target. A NaN or +inf, or nothing but -inf, among the logits of
// durations makes all of their scores NaN.
// The stage does not write the scores of padding rows.
template <typename T>
void CellScoresCpu(const LatticeBatch& batch, const RowTile& tile, const LogitRows<T>& logits,
                   const LogitsOptions& options, int num_threads, const CellScoresOut& out);

// Logits of a quantized product, logits[i][v] = data[i][v] * row_scales[i] * column_scales[v]
// + bias[v].
struct QuantizedLogits {
  const int32_t* data;         // (tile rows, pitch)
  const float* row_scales;     // (tile rows,)
  const float* column_scales;  // (pitch,)
  const float* bias;           // (pitch,), or null
  int64_t vocab_size;          // V: the first columns
  int64_t pitch;               // at least V
};

// The same from quantized logits, with a normalizer to 1e-4; without from_log_softmax. Logits above
// 1e9 may make the scores NaN.
void QuantizedCellScoresCpu(const LatticeBatch& batch, const RowTile& tile,
                            const QuantizedLogits& logits, const LogitsOptions& options,
                            int num_threads, const CellScoresOut& out);

// The same on the device, on `stream`.
template <typename T>
void CellScoresCuda(const LatticeBatch& batch, const RowTile& tile, const LogitRows<T>& logits,
                    const LogitsOptions& options, void* stream, const CellScoresOut& out);

}  // namespace transducer
