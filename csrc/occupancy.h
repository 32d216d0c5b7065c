// SPDX-License-Identifier: Apache-2.0
// Between stage 2 and a recomputing stage 3: which cells carry gradient at all.
#pragma once

#include "lattice_batch.h"

namespace transducer {

// The uses that stage 2 computes, (num_rows,) each.
struct Uses {
  const Score* blank;
  const Score* label;

  TRANSDUCER_HD Score Occupancy(int64_t row) const { return blank[row] + label[row]; }
};

struct KeptRowsOut {
  int64_t* rows;      // (num_rows,): rows behind the last kept one are undefined
  int64_t* num_kept;  // (B,)
  Score* dropped;     // (B,) the occupancy of the dropped cells
};

// Lists the rows of the cells to keep, in ascending order.
//
// With occupancy = use_blank + use_label, utterance b drops its cells of occupancy <= tau_b, where
// tau_b is the largest value on a grid of four a power of two such that the dropped occupancies sum
// to at most dropped_mass * (T_b + U_b). The gradient of a cell's logits is at most twice its
// occupancy in L1 norm, so the error is at most twice that sum. dropped_mass = 0 drops cells of
// occupancy zero only. NaN is always kept; an utterance of invalid lengths has no rows.
//
// `scratch` has KeptRowsScratchCpu bytes, which may hold anything.
int64_t KeptRowsScratchCpu(const LatticeBatch& batch);
void KeptRowsCpu(const LatticeBatch& batch, const Uses& uses, double dropped_mass, int num_threads,
                 void* scratch, const KeptRowsOut& out);

// The same on the device, on `stream`. An utterance may have 2^22 cells of about the same occupancy
// (in one bin of the grid).
int64_t KeptRowsScratchCuda(const LatticeBatch& batch);
void KeptRowsCuda(const LatticeBatch& batch, const Uses& uses, double dropped_mass, void* stream,
                  void* scratch, const KeptRowsOut& out);

}  // namespace transducer
