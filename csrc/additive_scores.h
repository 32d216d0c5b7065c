// SPDX-License-Identifier: Apache-2.0
// Scores of an additive joiner's cells (logits = am_t + lm_u), and the way back, around the two
// batched products of exponentials. On the CPU only: a GPU runs the same in PyTorch's kernels.
#pragma once

#include "normalizer_repair.h"

namespace transducer {

// What scores are made of. With N(t, k) = logsumexp_v(am_t + lm_k), S = num_symbols, and columns
// k = 0 ... S of the cells (one more, k = S + 1, if am_only_scale is not zero: the prior):
//
//     common(t, u)   = -combined_scale * N(t, u) - am_only_scale * N(t, S + 1)
//     blank(t, u)    = am_scale * am_t[blank] + context_blank[u] + common(t, u)
//     label(t, u)    = am_scale * am_t[symbols[u]] + context_label[u] + common(t, u)
//
// with am_scale = combined_scale + am_only_scale. A term whose scale is zero is left out.
struct AdditiveTerms {
  int64_t num_symbols;         // S
  const int64_t* symbols;      // (B, S), in [0, V)
  int64_t blank;
  double combined_scale, am_only_scale;
  const Score* context_blank;  // (B, S + 1)
  const Score* context_label;  // (B, S)
};

// exponentials (num_rows, size) = exp(row - max of the row), subnormals as zero; NaN if the maximum
// is not finite. T is float or double, here and below.
template <typename T>
void ShiftedExpCpu(const T* rows, int64_t num_rows, int64_t size, int num_threads, T* exponentials,
                   T* max);

// cells.product -> normalizer (B, T, columns), repaired; blank_score (B, T, S + 1); label_score
// (B, T, S). am_max (B, T) and lm_max (B, columns) are those of ShiftedExpCpu.
template <typename T>
void AdditiveScoresCpu(const AdditiveCells<T>& cells, const AdditiveTerms& terms, const T* am_max,
                       const T* lm_max, int num_threads, Score* normalizer, Score* blank_score,
                       Score* label_score);

// The first half of the way back: gradients of the scores -> grad_normalizer (B, T, columns); scale
// (B,), their largest magnitude in an utterance, 0 if all are; weight (B, T, columns) =
// grad_normalizer / scale / product, 0 in the cells to repair; gradients of context_blank and
// context_label.
template <typename T>
void AdditiveWeightsCpu(const AdditiveCells<T>& cells, const AdditiveTerms& terms,
                        const Score* grad_blank, const Score* grad_label, int num_threads,
                        Score* grad_normalizer, Score* scale, T* weight, Score* grad_context_blank,
                        Score* grad_context_label);

// The second: on entry grad_am (B, T, V) = weight @ lm exponentials and grad_lm (B, columns, V) =
// weight^T @ am exponentials, on exit the gradients, those of repaired cells included.
template <typename T>
void AdditiveGradientsCpu(const AdditiveCells<T>& cells, const AdditiveTerms& terms,
                          const T* am_exp, const T* lm_exp, const Score* normalizer,
                          const Score* grad_blank, const Score* grad_label,
                          const Score* grad_normalizer, const Score* scale, int num_threads,
                          T* grad_am, T* grad_lm);

}  // namespace transducer
