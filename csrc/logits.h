// SPDX-License-Identifier: Apache-2.0
// Arguments shared by the two stages that know the vocabulary.
#pragma once

#include "common.h"

namespace transducer {

// Rows of logits. T is float, double, Half or BFloat16.
template <typename T>
struct LogitRows {
  const T* data;       // (rows, pitch), contiguous: V logits, then those of the durations, if any
  int64_t vocab_size;  // V
  int64_t pitch;       // columns from row to row, at least V
};

constexpr int kMaxBigBlanks = 30;  // with blank and label, one lane of a warp each
constexpr int kMaxDurations = 32;

struct LogitsOptions {
  int64_t blank;          // in [0, V)
  bool from_log_softmax;  // the rows are log-probabilities already
  double clamp;           // stage 3: limits the magnitude of the gradient; 0: no limit
  // Multi-blank: big blank i is column blank - 1 - i, counted from the end if negative. Otherwise 0.
  int64_t num_big_blanks;
  // Token-and-duration: the K columns from V on are logits of durations. Otherwise 0.
  int64_t num_durations;
  // HAT: blank has probability sigmoid(x[blank]), and the labels share the rest by their softmax.
  bool is_hat;

  TRANSDUCER_HD static int64_t BigBlank(int64_t blank, int64_t i, int64_t vocab_size) {
    const int64_t column = blank - 1 - i;
    return column >= 0 ? column : column + vocab_size;
  }
  TRANSDUCER_HD int64_t NumExtra() const { return num_big_blanks + num_durations; }
};

}  // namespace transducer
