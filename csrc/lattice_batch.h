// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "common.h"

namespace transducer {

// The lattices of a batch, and which row of a logits-like tensor each of their cells is.
//
// Cell (t, u) of utterance b, 0 <= t < num_frames[b], 0 <= u <= num_targets[b], is row
//
//     first_row[b] + t * (row_stride ? row_stride : num_targets[b] + 1) + u
//
//   packed (sum_b T_b * (U_b + 1), V): first_row = exclusive prefix sum of cells, row_stride = 0
//   padded (B, T, U + 1, V):           first_row = b * T * (U + 1),  row_stride = U + 1
//
// Scores, normalisers and posteriors use the same rows, so one index serves every stage.
// Nothing here is owned; every pointer is on the device the stage runs on.
struct LatticeBatch {
  int64_t num_utterances;      // B
  int64_t max_frames;          // T: no utterance has more frames
  int64_t max_targets;         // U: width of `targets`; no utterance has more symbols
  int64_t num_rows;            // rows of the logits tensor, padding included
  int64_t row_stride;          // rows from (t, u) to (t + 1, u); 0 means num_targets[b] + 1
  const int64_t* num_frames;   // (B,) T_b
  const int64_t* num_targets;  // (B,) U_b
  const int64_t* first_row;    // (B,) row of cell (0, 0)
  const int64_t* targets;      // (B, U), anything beyond U_b

  TRANSDUCER_HD int64_t Stride(int64_t b) const {
    return row_stride != 0 ? row_stride : num_targets[b] + 1;
  }
  TRANSDUCER_HD int64_t Row(int64_t b, int64_t t, int64_t u) const {
    return first_row[b] + t * Stride(b) + u;
  }
  TRANSDUCER_HD int64_t Target(int64_t b, int64_t u) const { return targets[b * max_targets + u]; }

  // False for lengths that would lead outside of the tensors: such an utterance gets a NaN loss
  // instead of an out-of-bounds access (callers that did not validate must still be safe).
  TRANSDUCER_HD bool IsValid(int64_t b) const {
    const int64_t frames = num_frames[b], labels = num_targets[b];
    if (frames < 1 || frames > max_frames || labels < 0 || labels > max_targets) return false;
    if (row_stride != 0 && labels + 1 > row_stride) return false;
    return first_row[b] >= 0 && Row(b, frames - 1, labels) < num_rows;
  }
};

}  // namespace transducer
