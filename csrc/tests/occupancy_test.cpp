// SPDX-License-Identifier: Apache-2.0
// The occupancy filter: its bound, that the bound is tight, and the rows that are always kept.
#include "../occupancy.h"

#include <cmath>
#include <vector>

#include "batch_fixture.h"
#include "expect.h"

namespace transducer {
namespace {

void TestBound(Layout layout, double dropped_mass) {
  BatchFixture fixture({40, 3, 25}, {9, 0, 12}, layout, 5, 7);
  const LatticeBatch& batch = fixture.batch;
  // Occupancies over forty powers of ten, a few exactly zero; garbage in the padding.
  auto use_blank = RandomVector<Score>(batch.num_rows, 1, 1), use_label = use_blank;
  for (int64_t row = 0; row < batch.num_rows; ++row) {
    use_label[row] = std::pow(10.0, -20.0 + 10 * use_blank[row]) / 3;
    use_blank[row] = 2 * use_label[row];
    if (row % 11 == 5) use_blank[row] = use_label[row] = 0;
  }
  const Score nan_at = batch.Row(0, 4, fixture.Has(0, 4, 1) ? 1 : 2);
  use_label[static_cast<size_t>(nan_at)] = kNaN;

  std::vector<int64_t> kept(batch.num_rows, -1), counts(3), one(batch.num_rows, -1), counts_one(3);
  std::vector<Score> dropped(3), lowest(3);
  int64_t total, total_one;
  const Uses uses{use_blank.data(), use_label.data()};
  KeptRowsCpu(batch, uses, dropped_mass, 2, nullptr,
              {kept.data(), counts.data(), dropped.data(), lowest.data(), &total});
  KeptRowsCpu(batch, uses, dropped_mass, 1, nullptr,
              {one.data(), counts_one.data(), dropped.data(), lowest.data(), &total_one});
  EXPECT_TRUE(total == counts[0] + counts[1] + counts[2] && total == total_one);
  EXPECT_TRUE(counts == counts_one);
  EXPECT_TRUE(std::equal(kept.begin(), kept.begin() + total, one.begin()));

  int64_t i = 0;
  for (int64_t b = 0; b < 3; ++b) {
    Score sum = 0, largest_dropped = 0, smallest_kept = INFINITY, next_bin = 0;
    int64_t count = 0;
    const int64_t begin = i;
    for (int64_t t = 0; t < batch.num_frames[b]; ++t) {
      for (int64_t u = 0; u <= batch.num_targets[b]; ++u) {
        if (!fixture.Has(b, t, u)) continue;
        const int64_t row = batch.Row(b, t, u);
        const Score occupancy = use_blank[row] + use_label[row];
        if (i < total && kept[i] == row) {  // ascending, each once
          ++i;
          ++count;
          if (occupancy < smallest_kept) smallest_kept = occupancy;
          EXPECT_TRUE(occupancy != 0);
        } else {
          sum += occupancy;
          EXPECT_TRUE(!std::isnan(occupancy));
          if (occupancy > largest_dropped) largest_dropped = occupancy;
        }
      }
    }
    const Score limit = dropped_mass * (batch.num_frames[b] + batch.num_targets[b]);
    EXPECT_TRUE(count == counts[b] && largest_dropped < smallest_kept);
    EXPECT_TRUE(lowest[b] <= smallest_kept && (lowest[b] == 0 || largest_dropped < lowest[b]));
    EXPECT_TRUE(sum <= limit * (1 + 1e-12));
    EXPECT_NEAR(sum, dropped[b], 1e-12 * (1 + sum));
    if (dropped_mass == 0) EXPECT_TRUE(largest_dropped == 0);
    // Tight: with the next quarter of a power of two the bound would break.
    for (int64_t k = begin; k < i; ++k) {
      const Score occupancy = use_blank[kept[k]] + use_label[kept[k]];
      if (occupancy < 1.25 * smallest_kept) next_bin += occupancy;
    }
    if (dropped_mass > 0 && count > 1) EXPECT_TRUE(sum + next_bin > limit);
  }
  EXPECT_TRUE(i == total);

  // Without the kept rows, only dropped ones are left.
  std::vector<int64_t> rest(batch.num_rows);
  const Uses others{uses.blank, uses.label, uses.blank, uses.label, lowest.data()};
  std::vector<Score> lowest_of_rest(3);
  KeptRowsCpu(batch, others, 0, 1, nullptr,
              {rest.data(), counts_one.data(), dropped.data(), lowest_of_rest.data(), &total_one});
  std::vector<bool> is_kept(batch.num_rows);
  for (int64_t k = 0; k < total; ++k) is_kept[kept[k]] = true;
  int64_t num_others = 0;
  for (int64_t row = 0; row < batch.num_rows; ++row) {
    Cell cell;
    num_others += batch.CellOf(row, &cell) && !is_kept[row] && use_blank[row] + use_label[row] > 0;
  }
  EXPECT_TRUE(total_one == num_others);
  for (int64_t k = 0; k < total_one; ++k) EXPECT_TRUE(!is_kept[rest[k]]);
}

void TestInvalidUtterance() {
  BatchFixture fixture({3, 3}, {2, 2}, Layout::kPadded, 5, 7);
  fixture.num_frames[0] = 99;
  const std::vector<Score> uses(fixture.batch.num_rows, 0.5);
  std::vector<int64_t> kept(fixture.batch.num_rows), counts(2);
  std::vector<Score> dropped(2), lowest(2);
  int64_t total;
  KeptRowsCpu(fixture.batch, {uses.data(), uses.data()}, 1e-3, 1, nullptr,
              {kept.data(), counts.data(), dropped.data(), lowest.data(), &total});
  EXPECT_TRUE(counts[0] == 0 && counts[1] == 9 && kept[0] == 9);
}

}  // namespace
}  // namespace transducer

int main() {
  for (const auto layout : transducer::kLayouts) {
    for (const double dropped_mass : {0.0, 1e-12, 1e-6, 1e-2}) {
      transducer::TestBound(layout, dropped_mass);
    }
  }
  transducer::TestInvalidUtterance();
  return expect::Finish();
}
