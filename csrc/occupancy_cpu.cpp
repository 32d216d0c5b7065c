// SPDX-License-Identifier: Apache-2.0
#include "occupancy.h"

#include <algorithm>
#include <array>

#include "occupancy_grid.h"
#include "parallel.h"

namespace transducer {
namespace {

template <typename F>
void ForEachCell(const LatticeBatch& batch, int64_t b, F f) {
  for (int64_t t = 0; t < batch.num_frames[b]; ++t) {
    const int64_t begin = batch.ColumnBegin(b, t), end = batch.ColumnEnd(b, t);
    for (int64_t u = begin; u < end; ++u) f(batch.Row(b, t, u));
  }
}

// KeptRowsOut::lowest.
Score LowestKept(const LatticeBatch& batch, int64_t b, const Uses& uses, double dropped_mass,
                 Score* dropped) {
  *dropped = 0;
  if (!(dropped_mass > 0)) return 0;
  std::array<Score, kNumBins> mass{};
  ForEachCell(batch, b, [&](int64_t row) {
    const Score occupancy = uses.Occupancy(b, row);
    if (occupancy > 0) mass[BinOf(occupancy)] += occupancy;  // not NaN
  });
  const Score limit = dropped_mass * static_cast<Score>(batch.num_frames[b] + batch.num_targets[b]);
  int64_t bin = 0;
  while (bin < kNumBins - 1 && *dropped + mass[bin] <= limit) *dropped += mass[bin++];
  return EdgeOf(bin);
}

}  // namespace

int64_t KeptRowsScratchCpu(const LatticeBatch&) { return 0; }

void KeptRowsCpu(const LatticeBatch& batch, const Uses& uses, double dropped_mass, int num_threads,
                 void*, const KeptRowsOut& out) {
  // Each utterance writes into the part of the output that its own rows have; then these parts are
  // moved together. Utterances are in ascending order of rows, so no part overwrites a later one.
  const auto room = [&](int64_t b) {
    return batch.rows_per_utterance != 0 ? b * batch.rows_per_utterance : batch.first_row[b];
  };
  ParallelFor(batch.num_utterances, num_threads, [&](int64_t b) {
    out.num_kept[b] = 0;
    out.dropped[b] = out.lowest[b] = 0;
    if (!batch.IsValid(b)) return;
    const Score lowest = LowestKept(batch, b, uses, dropped_mass, &out.dropped[b]);
    out.lowest[b] = lowest;
    int64_t* end = out.rows + room(b);
    ForEachCell(batch, b, [&](int64_t row) {
      if (Uses::IsKept(uses.Occupancy(b, row), lowest)) *end++ = row;
    });
    out.num_kept[b] = end - (out.rows + room(b));
  });
  int64_t total = 0;
  for (int64_t b = 0; b < batch.num_utterances; ++b) {
    const int64_t* begin = out.rows + room(b);
    if (out.num_kept[b] > 0) std::copy(begin, begin + out.num_kept[b], out.rows + total);
    total += out.num_kept[b];
  }
  *out.total = total;
}

}  // namespace transducer
