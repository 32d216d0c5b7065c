// SPDX-License-Identifier: Apache-2.0
// Between stage 2 and a backward pass that recomputes logits: lists the cells that carry gradient.
#pragma once

#include "lattice_batch.h"

namespace transducer {

// The uses that stage 2 computes, (num_rows,) each.
struct Uses {
  const Score* blank;
  const Score* label;
  // Rows that another call kept have the occupancy 0, without a wait for their list. Null: none.
  const Score* taken_blank = nullptr;   // (num_rows,): the uses of that call
  const Score* taken_label = nullptr;   // (num_rows,)
  const Score* taken_lowest = nullptr;  // (B,): its KeptRowsOut::lowest

  TRANSDUCER_HD Score Occupancy(int64_t b, int64_t row) const {
    const bool is_taken =
        taken_lowest != nullptr && IsKept(taken_blank[row] + taken_label[row], taken_lowest[b]);
    return is_taken ? 0 : blank[row] + label[row];
  }
  TRANSDUCER_HD static bool IsKept(Score occupancy, Score lowest) {
    return !(occupancy < lowest || occupancy == 0);  // NaN is kept
  }
};

struct KeptRowsOut {
  int64_t* rows;      // (num_rows,): rows behind the last kept one are undefined
  int64_t* num_kept;  // (B,)
  Score* dropped;     // (B,) the occupancy of the dropped cells
  Score* lowest;      // (B,) cells of lower occupancy are dropped
  int64_t* total;     // (1,) the sum of num_kept
};

// Lists the rows of the cells to keep, in ascending order.
//
// With occupancy = use_blank + use_label, utterance b drops its cells of occupancy <= tau_b, where
// tau_b is the largest value on a grid of four a power of two such that the dropped occupancies sum
// to at most dropped_mass * (T_b + U_b). The gradient of a cell's logits is at most twice its
// occupancy in L1 norm, so the error is at most twice that sum. dropped_mass = 0 drops cells of
// occupancy zero only. Cells of NaN are always kept; an utterance of invalid lengths has no rows.
//
// `scratch` has KeptRowsScratchCpu bytes, which may contain anything.
int64_t KeptRowsScratchCpu(const LatticeBatch& batch);
void KeptRowsCpu(const LatticeBatch& batch, const Uses& uses, double dropped_mass, int num_threads,
                 void* scratch, const KeptRowsOut& out);

// The same on the device, on `stream`. An utterance may have 2^22 cells of about the same occupancy
// (in one bin of the grid).
int64_t KeptRowsScratchCuda(const LatticeBatch& batch);
void KeptRowsCuda(const LatticeBatch& batch, const Uses& uses, double dropped_mass, void* stream,
                  void* scratch, const KeptRowsOut& out);

}  // namespace transducer
