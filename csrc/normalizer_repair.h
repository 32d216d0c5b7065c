// SPDX-License-Identifier: Apache-2.0
// Log-normalizers of an additive joiner (logits = am_t + lm_u) in the cells where the batched
// product of exponentials underflows.
#pragma once

#include "common.h"

namespace transducer {

// The cells (b, t, u) of an additive joiner. Everything is dense and row-major.
template <typename T>
struct AdditiveCells {
  int64_t num_utterances;  // B
  int64_t num_frames;      // T
  int64_t num_columns;     // U + 1
  int64_t vocab_size;      // V
  const T* am;             // (B, T, V)
  const T* lm;             // (B, U + 1, V)
  // (B, T, U + 1): sum_v exp(am_v - max am) * exp(lm_v - max lm). Below `threshold` too much of it
  // has underflowed, and the cell is repaired. A cell of NaN is not repaired.
  const T* product;
  T threshold;

  TRANSDUCER_HD int64_t Cell(int64_t b, int64_t t, int64_t u) const {
    return (b * num_frames + t) * num_columns + u;
  }
  TRANSDUCER_HD const T* Am(int64_t b, int64_t t) const {
    return am + (b * num_frames + t) * vocab_size;
  }
  TRANSDUCER_HD const T* Lm(int64_t b, int64_t u) const {
    return lm + (b * num_columns + u) * vocab_size;
  }
};

// normalizer (B, T, U + 1) of the cells to repair = logsumexp_v(am_v + lm_v); NaN if nothing in the
// row is finite. Other cells are not written. T is float or double.
template <typename T>
void RepairNormalizerCpu(const AdditiveCells<T>& cells, int num_threads, Score* normalizer);

// Adds grad * softmax(am + lm) of the cells to repair to grad_am (B, T, V) and grad_lm
// (B, U + 1, V); grad is (B, T, U + 1). The order of additions does not depend on num_threads.
template <typename T>
void RepairNormalizerBackwardCpu(const AdditiveCells<T>& cells, const Score* normalizer,
                                 const Score* grad, int num_threads, T* grad_am, T* grad_lm);

// On CUDA, additive_scores_cuda.cu does the same inside of its stages.

}  // namespace transducer
