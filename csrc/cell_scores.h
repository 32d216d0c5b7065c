// SPDX-License-Identifier: Apache-2.0
// Stage 1: from logits to three numbers per lattice cell. The last stage before the lattice that
// knows the vocabulary.
#pragma once

#include "half.h"
#include "lattice_batch.h"

namespace transducer {

// For each cell of the tile, with x its row of V logits:
//   normalizer  = logsumexp(x)                       (0 if from_log_softmax)
//   blank_score = x[blank] - normalizer
//   label_score = x[target of (b, u)] - normalizer   (-inf in the last column, u = U_b)
// A row with NaN or +inf, or with nothing but -inf, and a target outside [0, V) give NaN scores:
// the lattice makes that utterance's loss NaN. (With from_log_softmax only blank and target are
// read.)
// Outputs are indexed by row of the batch; padding rows stay unwritten.
template <typename T>
void CellScoresCpu(const LatticeBatch& batch, const RowTile& tile, const T* logits,
                   int64_t vocab_size, int64_t blank, bool from_log_softmax, int num_threads,
                   Score* normalizer, Score* blank_score, Score* label_score);

// The same on the device, on `stream`.
template <typename T>
void CellScoresCuda(const LatticeBatch& batch, const RowTile& tile, const T* logits,
                    int64_t vocab_size, int64_t blank, bool from_log_softmax, void* stream,
                    Score* normalizer, Score* blank_score, Score* label_score);

}  // namespace transducer
