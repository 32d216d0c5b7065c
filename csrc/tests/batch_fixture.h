// SPDX-License-Identifier: Apache-2.0
// A batch of random ragged lattices that owns what LatticeBatch points to.
#pragma once

#include <algorithm>
#include <random>
#include <vector>

#include "../lattice_batch.h"

namespace transducer {

enum class Layout { kPacked, kPadded, kBand, kPackedBand };
constexpr Layout kLayouts[] = {Layout::kPacked, Layout::kPadded, Layout::kBand,
                               Layout::kPackedBand};

struct BatchFixture {
  std::vector<int64_t> num_frames, num_targets, first_row, targets, band_start;
  LatticeBatch batch{};

  // frames and labels per utterance; labels in [1, vocab_size), 0 is blank. A band is 3 wide (less
  // if there are fewer symbols) and climbs at random, but so that paths exist.
  BatchFixture(std::vector<int64_t> frames, std::vector<int64_t> labels, Layout layout,
               int64_t vocab_size, unsigned seed)
      : num_frames(std::move(frames)), num_targets(std::move(labels)) {
    const int64_t size = static_cast<int64_t>(num_frames.size());
    const int64_t max_frames = *std::max_element(num_frames.begin(), num_frames.end());
    const int64_t max_targets = *std::max_element(num_targets.begin(), num_targets.end());
    const bool has_band = layout == Layout::kBand || layout == Layout::kPackedBand;
    const bool is_padded = layout == Layout::kPadded || layout == Layout::kBand;
    const int64_t width = has_band ? std::min<int64_t>(3, max_targets + 1) : max_targets + 1;
    std::mt19937 random(seed);
    for (int64_t i = 0; i < size * max_targets; ++i) {
      targets.push_back(1 + static_cast<int64_t>(random() % (vocab_size - 1)));
    }
    int64_t row = 0;
    for (int64_t b = 0; b < size; ++b) {
      first_row.push_back(row);
      row +=
          is_padded ? max_frames * width : num_frames[b] * (has_band ? width : num_targets[b] + 1);
      int64_t start = 0;
      const int64_t last = std::max<int64_t>(0, num_targets[b] + 1 - width);
      for (int64_t t = 0; t < max_frames && has_band; ++t) {
        const int64_t needed = last - (width - 1) * std::max<int64_t>(0, num_frames[b] - 1 - t);
        if (t > 0 && start < last) start += static_cast<int64_t>(random() % 2);
        start = std::max(start, needed);
        band_start.push_back(start);
      }
    }
    batch = {size,
             max_frames,
             max_targets,
             row,
             is_padded || has_band ? width : 0,
             is_padded ? max_frames * width : 0,
             num_frames.data(),
             num_targets.data(),
             first_row.data(),
             targets.data(),
             has_band ? band_start.data() : nullptr,
             nullptr,
             nullptr};
  }
  BatchFixture(const BatchFixture&) = delete;  // batch points into this object

  RowTile AllRows() const { return {nullptr, 0, batch.num_rows}; }

  // Whether utterance b has the cell, told without the methods under test.
  bool Has(int64_t b, int64_t t, int64_t u) const {
    if (t < 0 || t >= num_frames[b] || u < 0 || u > num_targets[b]) return false;
    if (band_start.empty()) return true;
    const int64_t start = band_start[b * batch.max_frames + t];
    return u >= start && u < start + batch.row_stride;
  }
};

template <typename T>
std::vector<T> RandomVector(int64_t size, double scale, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<double> normal(0, scale);
  std::vector<T> values(size);
  for (T& value : values) value = static_cast<T>(normal(random));
  return values;
}

}  // namespace transducer
