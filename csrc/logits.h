// SPDX-License-Identifier: Apache-2.0
// Arguments shared by the two stages that know the vocabulary.
#pragma once

#include "common.h"

namespace transducer {

// Rows of logits. T is float, double, Half or BFloat16.
template <typename T>
struct LogitRows {
  const T* data;       // (rows, V), contiguous
  int64_t vocab_size;  // V
};

struct LogitsOptions {
  int64_t blank;          // in [0, V)
  bool from_log_softmax;  // the rows are log-probabilities already
  double clamp;           // stage 3: limits the magnitude of the gradient; 0: no limit
};

}  // namespace transducer
