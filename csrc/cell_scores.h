// SPDX-License-Identifier: Apache-2.0
// Stage 1: from logits to three numbers per lattice cell. The last stage before the lattice that
// knows the vocabulary.
#pragma once

#include "half.h"
#include "lattice_batch.h"
#include "logits.h"

namespace transducer {

// One number for each row of the batch, (num_rows,).
struct CellScoresOut {
  Score* normalizer;
  Score* blank;
  Score* label;
};

// For each cell of the tile, with x its row of V logits:
//   normalizer = logsumexp(x)                       (0 if from_log_softmax)
//   blank      = x[blank] - normalizer
//   label      = x[target of (b, u)] - normalizer   (-inf in the last column, u = U_b)
// A row with NaN or +inf, or with nothing but -inf, and a target outside [0, V) give NaN scores:
// the lattice makes that utterance's loss NaN. (With from_log_softmax only blank and target are
// read.)
// The stage does not write the scores of padding rows.
template <typename T>
void CellScoresCpu(const LatticeBatch& batch, const RowTile& tile, const LogitRows<T>& logits,
                   const LogitsOptions& options, int num_threads, const CellScoresOut& out);

// The same on the device, on `stream`.
template <typename T>
void CellScoresCuda(const LatticeBatch& batch, const RowTile& tile, const LogitRows<T>& logits,
                    const LogitsOptions& options, void* stream, const CellScoresOut& out);

}  // namespace transducer
