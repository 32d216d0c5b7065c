// SPDX-License-Identifier: Apache-2.0
// Between stage 2 and a recomputing stage 3: which cells carry gradient at all.
#pragma once

#include "lattice_batch.h"

namespace transducer {

// Lists the rows of the cells to keep, in ascending order.
//
// With occupancy = use_blank + use_label, utterance b drops its cells of occupancy <= tau_b, where
// tau_b is the largest value on a grid of four a power of two such that the dropped occupancies sum
// to at most dropped_mass * (T_b + U_b). The gradient of a cell's logits is at most twice its
// occupancy in L1 norm, so the error is at most twice that sum. dropped_mass = 0 drops cells of
// occupancy zero only. NaN is always kept; an utterance of invalid lengths has no rows.
//
// kept_rows has room for num_rows; num_kept (B,) gets the count of each utterance, dropped (B,) the
// occupancy that its dropped cells had. Returns the total count.
int64_t KeptRowsCpu(const LatticeBatch& batch, const Score* use_blank, const Score* use_label,
                    double dropped_mass, int num_threads, int64_t* kept_rows, int64_t* num_kept,
                    Score* dropped);

// The same on the device, on `stream`, but for the total; scratch of KeptRowsScratchCuda numbers,
// which may hold anything. An utterance may have 2^22 cells of about the same occupancy (in one bin
// of the grid).
int64_t KeptRowsScratchCuda(const LatticeBatch& batch);
void KeptRowsCuda(const LatticeBatch& batch, const Score* use_blank, const Score* use_label,
                  double dropped_mass, void* stream, Score* scratch, int64_t* kept_rows,
                  int64_t* num_kept, Score* dropped);

}  // namespace transducer
