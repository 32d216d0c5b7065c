// SPDX-License-Identifier: Apache-2.0
// Scores of an additive joiner's cells (logits = am_t + lm_k), and their gradients, around the
// batched products of exponentials.
#pragma once

#include "normalizer_repair.h"

namespace transducer {

// Terms of the scores. With N(t, k) = logsumexp_v(am_t + lm_k), S = num_symbols, and columns
// k = 0 ... S of the cells (one more, k = S + 1, if am_only_scale is not zero: the prior):
//
//     common(t, u)   = -combined_scale * N(t, u) - am_only_scale * N(t, S + 1)
//     score(t, u, v) = am_scale * am_t[v] + combined_scale * lm_u[v] + am_only_scale * prior[v]
//                      + lm_only_scale * log_softmax(lm_u)[v] + common(t, u)
//     blank(t, u)    = score(t, u, blank)
//     label(t, u)    = score(t, u, symbols[u])
//
// with am_scale = combined_scale + am_only_scale. A term whose scale is zero is left out. Rows of am
// and lm outside of the boundary are taken for zeros, and have no gradient.
struct AdditiveTerms {
  int64_t num_symbols;      // S
  const int64_t* symbols;   // (B, S); one outside of [0, V) makes its label scores NaN
  const int64_t* boundary;  // (B, 4) rows of s_begin, t_begin, s_end, t_end
  int64_t blank;            // in [0, V)
  double combined_scale, lm_only_scale, am_only_scale;

  TRANSDUCER_HD double AmScale() const { return combined_scale + am_only_scale; }
  TRANSDUCER_HD double LmScale() const { return combined_scale + lm_only_scale; }
  TRANSDUCER_HD bool IsFrame(int64_t b, int64_t t) const {
    return t >= boundary[4 * b + 1] && t < boundary[4 * b + 3];
  }
  TRANSDUCER_HD bool IsColumn(int64_t b, int64_t k) const {  // true for the prior
    return k > num_symbols || (k >= boundary[4 * b] && k <= boundary[4 * b + 2]);
  }
  // The symbol of a label: 0 in padding, -1 if it is outside of the vocabulary.
  TRANSDUCER_HD int64_t Symbol(int64_t b, int64_t u, int64_t vocab_size) const {
    if (u < boundary[4 * b] || u >= boundary[4 * b + 2]) return 0;
    const int64_t symbol = symbols[b * num_symbols + u];
    return symbol >= 0 && symbol < vocab_size ? symbol : -1;
  }
};

// Exponentials of the rows of both sides, exp(row - max of the row), subnormals as zero; NaN if the
// maximum is not finite. T is float or double, here and below.
template <typename T>
struct AdditiveExponentials {
  T* am;          // (B, T, V)
  T* lm;          // (B, columns, V)
  T* am_max;      // (B, T)
  T* lm_max;      // (B, columns)
  Score* lm_sum;  // (B, columns) the sum of a row of lm
};

// The parts of the scores that do not depend on the frame, and the lattices for stage 2.
struct AdditiveContexts {
  Score* blank;  // (B, S + 1), or null: nothing here is wanted
  Score* label;  // (B, S)
  int64_t*
      lattices;  // (4, B) num_frames, num_targets, first_row and first_frame of LatticeBatch in
                 // the layout (B, T, S + 1); num_frames = -1 if the boundary is not inside
};

struct AdditiveScoresOut {
  Score* normalizer;  // (B, T, columns), repaired
  Score* blank;       // (B, T, S + 1)
  Score* label;       // (B, T, S + 1), -inf in the last column
};

// Upstream gradients of the scores, divided by `factor` (B,). They should not be much above 1,
// because they are divided by products that may be near the threshold. The gradients of an utterance
// whose factor is 0 are 0, even if its scores are NaN.
struct AdditiveScoreGrads {
  const Score* blank;  // (B, T, S + 1)
  const Score* label;  // (B, T, S + 1)
  const Score* factor;
};

// Results of AdditiveScores and AdditiveWeights that AdditiveGradients reads.
struct AdditiveSaved {
  const Score* normalizer;       // (B, T, columns)
  const Score* grad_normalizer;  // (B, T, columns)
};

template <typename T>
void AdditiveExponentialsCpu(const AdditiveCells<T>& cells, const AdditiveTerms& terms,
                             int num_threads, const AdditiveExponentials<T>& out,
                             const AdditiveContexts& contexts);

// Scores from cells.product.
template <typename T>
void AdditiveScoresCpu(const AdditiveCells<T>& cells, const AdditiveTerms& terms,
                       const AdditiveExponentials<T>& exponentials,
                       const AdditiveContexts& contexts, int num_threads,
                       const AdditiveScoresOut& out);

// The first half of the backward pass: the gradients of the normalizers (B, T, columns), and weight
// (B, T, columns) = these over factor and product, 0 in the cells to repair.
template <typename T>
void AdditiveWeightsCpu(const AdditiveCells<T>& cells, const AdditiveTerms& terms,
                        const AdditiveScoreGrads& grads, int num_threads, Score* grad_normalizer,
                        T* weight);

// The second half. On entry grad_am (B, T, V) = weight @ lm exponentials and grad_lm (B, columns,
// V) = weight^T @ am exponentials; on exit the gradients, those of repaired cells included.
template <typename T>
void AdditiveGradientsCpu(const AdditiveCells<T>& cells, const AdditiveTerms& terms,
                          const AdditiveExponentials<T>& exponentials,
                          const AdditiveScoreGrads& grads, const AdditiveSaved& saved,
                          int num_threads, T* grad_am, T* grad_lm);

// The same on the device, on `stream`.
template <typename T>
void AdditiveExponentialsCuda(const AdditiveCells<T>& cells, const AdditiveTerms& terms,
                              void* stream, const AdditiveExponentials<T>& out,
                              const AdditiveContexts& contexts);
template <typename T>
void AdditiveScoresCuda(const AdditiveCells<T>& cells, const AdditiveTerms& terms,
                        const AdditiveExponentials<T>& exponentials,
                        const AdditiveContexts& contexts, void* stream,
                        const AdditiveScoresOut& out);
template <typename T>
void AdditiveWeightsCuda(const AdditiveCells<T>& cells, const AdditiveTerms& terms,
                         const AdditiveScoreGrads& grads, void* stream, Score* grad_normalizer,
                         T* weight);
template <typename T>
void AdditiveGradientsCuda(const AdditiveCells<T>& cells, const AdditiveTerms& terms,
                           const AdditiveExponentials<T>& exponentials,
                           const AdditiveScoreGrads& grads, const AdditiveSaved& saved,
                           void* stream, T* grad_am, T* grad_lm);

// --- formulas of both devices -------------------------------------------------------------------

// The part of the score of symbol v that depends on column u alone; `normalizer` is that of lm_u.
template <typename T>
TRANSDUCER_HD Score ContextScore(const AdditiveCells<T>& cells, const AdditiveTerms& terms,
                                 int64_t b, int64_t u, int64_t v, Score normalizer) {
  if (v < 0) return kNaN;
  const Score lm = terms.IsColumn(b, u) ? static_cast<Score>(cells.Lm(b, u)[v]) : 0;
  Score score = 0;
  if (terms.combined_scale != 0) score += terms.combined_scale * lm;
  if (terms.lm_only_scale != 0) score += terms.lm_only_scale * (lm - normalizer);
  if (terms.am_only_scale != 0) {
    score += terms.am_only_scale * static_cast<Score>(cells.Lm(b, terms.num_symbols + 1)[v]);
  }
  return score;
}

// The part of the score of symbol v that depends on frame t alone.
template <typename T>
TRANSDUCER_HD Score FrameScore(const AdditiveCells<T>& cells, const AdditiveTerms& terms, int64_t b,
                               int64_t t, int64_t v) {
  const double scale = terms.AmScale();
  if (scale == 0 || v < 0 || !terms.IsFrame(b, t)) return 0;
  return scale * static_cast<Score>(cells.Am(b, t)[v]);
}

TRANSDUCER_HD inline void SetLattice(const AdditiveTerms& terms, int64_t b, int64_t num_utterances,
                                     int64_t num_frames, int64_t* lattices) {
  const int64_t* row = terms.boundary + 4 * b;
  const int64_t s_begin = row[0], t_begin = row[1], s_end = row[2], t_end = row[3];
  const bool is_inside = s_begin >= 0 && s_begin <= s_end && s_end <= terms.num_symbols &&
                         t_begin >= 0 && t_begin <= t_end && t_end <= num_frames;
  const int64_t columns = terms.num_symbols + 1;
  lattices[b] = is_inside ? t_end - t_begin : -1;
  lattices[num_utterances + b] = is_inside ? s_end - s_begin : 0;
  lattices[2 * num_utterances + b] = is_inside ? (b * num_frames + t_begin) * columns + s_begin : 0;
  lattices[3 * num_utterances + b] = is_inside ? t_begin : 0;
}

}  // namespace transducer
