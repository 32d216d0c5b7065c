// SPDX-License-Identifier: Apache-2.0
// A batch of random ragged lattices that owns what LatticeBatch points to.
#pragma once

#include <algorithm>
#include <random>
#include <vector>

#include "../lattice_batch.h"

namespace transducer {

struct BatchFixture {
  std::vector<int64_t> num_frames, num_targets, first_row, targets;
  LatticeBatch batch{};

  // frames and labels per utterance; padded or packed rows; labels in [1, vocab_size), 0 is blank.
  BatchFixture(std::vector<int64_t> frames, std::vector<int64_t> labels, bool padded,
               int64_t vocab_size, unsigned seed)
      : num_frames(std::move(frames)), num_targets(std::move(labels)) {
    const int64_t size = static_cast<int64_t>(num_frames.size());
    const int64_t max_frames = *std::max_element(num_frames.begin(), num_frames.end());
    const int64_t max_targets = *std::max_element(num_targets.begin(), num_targets.end());
    std::mt19937 random(seed);
    for (int64_t i = 0; i < size * max_targets; ++i) {
      targets.push_back(1 + static_cast<int64_t>(random() % (vocab_size - 1)));
    }
    int64_t row = 0;
    for (int64_t b = 0; b < size; ++b) {
      first_row.push_back(row);
      row += padded ? max_frames * (max_targets + 1) : num_frames[b] * (num_targets[b] + 1);
    }
    batch = {size,
             max_frames,
             max_targets,
             row,
             padded ? max_targets + 1 : 0,
             num_frames.data(),
             num_targets.data(),
             first_row.data(),
             targets.data()};
  }
  BatchFixture(const BatchFixture&) = delete;  // batch points into this object
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
