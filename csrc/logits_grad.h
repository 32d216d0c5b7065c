// SPDX-License-Identifier: Apache-2.0
// Stage 3: computes the gradient of the logits from the posteriors.
#pragma once

#include "half.h"
#include "lattice_batch.h"
#include "logits.h"

namespace transducer {

// The outputs of stages 1 and 2, and the upstream gradient.
struct Posteriors {
  const Score* normalizer;  // (num_rows,)
  const Score* use_blank;   // (num_rows,)
  const Score* use_label;   // (num_rows,)
  const Score* loss_grad;   // (B,)
  const Score* use_extra;   // (num_rows, NumExtra()), of big blanks or durations; or null
};

// For each row of the tile:
//
// grad[row, v] = loss_grad[b] * clamp(occupancy * softmax(logits[row])[v]
//                                     - use_blank * [v == blank] - use_label * [v == target])
//
// with occupancy = use_blank + use_label, the softmax taken from the saved normalizer; without the
// softmax term if from_log_softmax. Both subtractions happen when target == blank.
//
// With is_hat, the softmax is that of the labels and its factor is use_label, and
//
// grad[row, blank] = loss_grad[b] * clamp(occupancy * sigmoid(logits[row, blank]) - use_blank)
//
// Big blanks: minus use_extra[row, i] at the column of i; occupancy includes the sum of use_extra.
// Durations:
//
// grad[row, V + k] = loss_grad[b] * clamp(occupancy * softmax(logits[row, V ...])[k]
//                                         - use_extra[row, k])
//
// Subnormal
// results are written as zero: they do not matter and make the next matrix product several times
// slower.
//
// Writes every row of the tile. Padding rows are zero. Rows of an utterance whose uses are NaN or
// whose lengths are invalid are NaN. An utterance with loss_grad[b] == 0 gets zeros even then, so a
// caller can mask out a NaN loss. grad (tile rows, pitch) may be the logits (in place) unless the
// tile has whole_logits or places. Columns behind V + K are neither read nor written.
template <typename T>
void LogitsGradCpu(const LatticeBatch& batch, const RowTile& tile, const LogitRows<T>& logits,
                   const LogitsOptions& options, const Posteriors& posteriors, int num_threads,
                   T* grad);

// The same on the device, on `stream`.
template <typename T>
void LogitsGradCuda(const LatticeBatch& batch, const RowTile& tile, const LogitRows<T>& logits,
                    const LogitsOptions& options, const Posteriors& posteriors, void* stream,
                    T* grad);

}  // namespace transducer
