// SPDX-License-Identifier: Apache-2.0
// Scores of an additive joiner's cells (logits = am_t + lm_u), and their gradients, around the two
// batched products of exponentials. On the CPU only: a GPU runs the same in PyTorch's kernels.
#pragma once

#include "normalizer_repair.h"

namespace transducer {

// Terms of the scores. With N(t, k) = logsumexp_v(am_t + lm_k), S = num_symbols, and columns
// k = 0 ... S of the cells (one more, k = S + 1, if am_only_scale is not zero: the prior):
//
//     common(t, u)   = -combined_scale * N(t, u) - am_only_scale * N(t, S + 1)
//     blank(t, u)    = am_scale * am_t[blank] + context_blank[u] + common(t, u)
//     label(t, u)    = am_scale * am_t[symbols[u]] + context_label[u] + common(t, u)
//
// with am_scale = combined_scale + am_only_scale. A term whose scale is zero is left out.
struct AdditiveTerms {
  int64_t num_symbols;     // S
  const int64_t* symbols;  // (B, S), in [0, V)
  int64_t blank;           // in [0, V)
  double combined_scale, am_only_scale;
  const Score* context_blank;  // (B, S + 1)
  const Score* context_label;  // (B, S)
};

struct AdditiveScoresOut {
  Score* normalizer;  // (B, T, columns), repaired
  Score* blank;       // (B, T, S + 1)
  Score* label;       // (B, T, S)
};

// Upstream gradients of the scores.
struct AdditiveScoreGrads {
  const Score* blank;  // (B, T, S + 1)
  const Score* label;  // (B, T, S)
};

struct AdditiveWeightsOut {
  Score* grad_normalizer;     // (B, T, columns)
  Score* scale;               // (B,) the largest magnitude of an utterance's, 0 if all are 0
  Score* grad_context_blank;  // (B, S + 1)
  Score* grad_context_label;  // (B, S)
};

// Results of AdditiveScores and AdditiveWeights that AdditiveGradients reads.
struct AdditiveSaved {
  const Score* normalizer;       // (B, T, columns)
  const Score* grad_normalizer;  // (B, T, columns)
  const Score* scale;            // (B,)
};

// exponentials (num_rows, size) = exp(row - max of the row), subnormals as zero; NaN if the maximum
// is not finite. T is float or double, here and below.
template <typename T>
void ShiftedExpCpu(const T* rows, int64_t num_rows, int64_t size, int num_threads, T* exponentials,
                   T* max);

// Scores from cells.product. am_max (B, T) and lm_max (B, columns) are those of ShiftedExpCpu.
template <typename T>
void AdditiveScoresCpu(const AdditiveCells<T>& cells, const AdditiveTerms& terms, const T* am_max,
                       const T* lm_max, int num_threads, const AdditiveScoresOut& out);

// The first half of the backward pass: gradients of the normalizers and contexts, and weight
// (B, T, columns) = grad_normalizer / scale / product, 0 in the cells to repair.
template <typename T>
void AdditiveWeightsCpu(const AdditiveCells<T>& cells, const AdditiveTerms& terms,
                        const AdditiveScoreGrads& grads, int num_threads,
                        const AdditiveWeightsOut& out, T* weight);

// The results of ShiftedExpCpu for the two sides.
template <typename T>
struct AdditiveExponentials {
  const T* am;  // (B, T, V)
  const T* lm;  // (B, columns, V)
};

// The second half. On entry grad_am (B, T, V) = weight @ lm exponentials and grad_lm (B, columns, V)
// = weight^T @ am exponentials; on exit the gradients, those of repaired cells included.
template <typename T>
void AdditiveGradientsCpu(const AdditiveCells<T>& cells, const AdditiveTerms& terms,
                          const AdditiveExponentials<T>& exponentials,
                          const AdditiveScoreGrads& grads, const AdditiveSaved& saved,
                          int num_threads, T* grad_am, T* grad_lm);

}  // namespace transducer
