// SPDX-License-Identifier: Apache-2.0
// Stage 3: from posteriors back to the vocabulary.
#pragma once

#include "half.h"
#include "lattice_batch.h"

namespace transducer {

// For each row of the tile:
//
// grad[row, v] = loss_grad[b] * clamp(occupancy * softmax(logits[row])[v]
//                                     - use_blank * [v == blank] - use_label * [v == target])
//
// with occupancy = use_blank + use_label, the softmax taken from the saved normalizer; without the
// softmax term if from_log_softmax. clamp > 0 limits the magnitude, otherwise nothing is limited.
// Both subtractions happen when target == blank. Subnormal results are written as zero: they carry
// nothing and make the next matrix product several times slower.
//
// Writes every row of the tile: padding rows are zero, rows of an utterance whose uses are NaN or
// whose lengths are invalid are NaN; an utterance with loss_grad[b] == 0 gets zeros whatever its
// uses are, so a caller can mask a NaN loss out. grad may be logits (in place) unless the tile's logits
// are whole. normalizer and uses are indexed by row of the batch.
template <typename T>
void LogitsGradCpu(const LatticeBatch& batch, const RowTile& tile, const T* logits,
                   int64_t vocab_size, int64_t blank, bool from_log_softmax, double clamp,
                   const Score* normalizer, const Score* use_blank, const Score* use_label,
                   const Score* loss_grad, int num_threads, T* grad);

// The same on the device, on `stream`.
template <typename T>
void LogitsGradCuda(const LatticeBatch& batch, const RowTile& tile, const T* logits,
                    int64_t vocab_size, int64_t blank, bool from_log_softmax, double clamp,
                    const Score* normalizer, const Score* use_blank, const Score* use_label,
                    const Score* loss_grad, void* stream, T* grad);

}  // namespace transducer
