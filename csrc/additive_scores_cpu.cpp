// SPDX-License-Identifier: Apache-2.0
#include "additive_scores.h"

#include <algorithm>
#include <cmath>

#include "parallel.h"
#include "row_kernels.h"

namespace transducer {

template <typename T>
void ShiftedExpCpu(const T* rows, int64_t num_rows, int64_t size, int num_threads, T* exponentials,
                   T* max) {
  const RowKernels<T>& kernels = GetRowKernels<T>();
  ParallelForRows(num_rows, num_threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      kernels.shifted_exp(rows + i * size, size, exponentials + i * size, &max[i]);
    }
  });
}

template <typename T>
void AdditiveScoresCpu(const AdditiveCells<T>& cells, const AdditiveTerms& terms, const T* am_max,
                       const T* lm_max, int num_threads, const AdditiveScoresOut& out) {
  const int64_t num_rows = cells.num_utterances * cells.num_frames;
  const int64_t columns = cells.num_columns, symbols = terms.num_symbols;
  ParallelForRows(num_rows, num_threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const T* product = cells.product + i * columns;
      const T* maxima = lm_max + i / cells.num_frames * columns;
      const Score top = static_cast<Score>(am_max[i]);
      for (int64_t k = 0; k < columns; ++k) {
        out.normalizer[i * columns + k] =
            std::log(static_cast<Score>(product[k])) + (top + static_cast<Score>(maxima[k]));
      }
    }
  });
  RepairNormalizerCpu(cells, num_threads, out.normalizer);
  ParallelForRows(num_rows, num_threads, [&](int64_t begin, int64_t end) {
    const double am_scale = terms.combined_scale + terms.am_only_scale;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / cells.num_frames;
      const T* am = cells.am + i * cells.vocab_size;
      const int64_t* symbol = terms.symbols + b * symbols;
      const Score* from_blank = terms.context_blank + b * (symbols + 1);
      const Score* from_label = terms.context_label + b * symbols;
      const Score* norm = out.normalizer + i * columns;
      Score* blank = out.blank + i * (symbols + 1);
      Score* label = out.label + i * symbols;
      const auto of_am = [&](int64_t v) {
        return am_scale != 0 ? am_scale * static_cast<Score>(am[v]) : 0;
      };
      const Score prior = terms.am_only_scale != 0 ? terms.am_only_scale * norm[symbols + 1] : 0;
      const Score at_blank = of_am(terms.blank);
      for (int64_t u = 0; u <= symbols; ++u) {
        const Score common =
            prior + (terms.combined_scale != 0 ? terms.combined_scale * norm[u] : 0);
        blank[u] = (at_blank + from_blank[u]) - common;
        if (u < symbols) label[u] = (of_am(symbol[u]) + from_label[u]) - common;
      }
    }
  });
}

template <typename T>
void AdditiveWeightsCpu(const AdditiveCells<T>& cells, const AdditiveTerms& terms,
                        const AdditiveScoreGrads& grads, int num_threads,
                        const AdditiveWeightsOut& out, T* weight) {
  const int64_t columns = cells.num_columns, symbols = terms.num_symbols;
  // One task an utterance: it owns its sums over frames.
  ParallelFor(cells.num_utterances, num_threads, [&](int64_t b) {
    Score* sum_blank = out.grad_context_blank + b * (symbols + 1);
    Score* sum_label = out.grad_context_label + b * symbols;
    std::fill_n(sum_blank, symbols + 1, 0);
    std::fill_n(sum_label, symbols, 0);
    Score largest = 0;
    bool has_nan = false;
    for (int64_t t = 0; t < cells.num_frames; ++t) {
      const int64_t i = b * cells.num_frames + t;
      const Score* blank = grads.blank + i * (symbols + 1);
      const Score* label = grads.label + i * symbols;
      Score* grad = out.grad_normalizer + i * columns;
      Score of_frame = 0;
      for (int64_t u = 0; u <= symbols; ++u) {
        const Score of_label = u < symbols ? label[u] : 0;
        const Score of_cell = blank[u] + of_label;
        sum_blank[u] += blank[u];
        if (u < symbols) sum_label[u] += of_label;
        of_frame += of_cell;
        grad[u] = -terms.combined_scale * of_cell;
        largest = std::max(largest, std::abs(grad[u]));
        has_nan |= std::isnan(of_cell);
      }
      if (terms.am_only_scale != 0) {
        grad[symbols + 1] = -terms.am_only_scale * of_frame;
        largest = std::max(largest, std::abs(grad[symbols + 1]));
      }
    }
    out.scale[b] = has_nan ? 1 : largest;
    // An upstream gradient of 10^30 over a product near the threshold would overflow float32.
    const Score inverse = out.scale[b] > 0 ? 1 / out.scale[b] : 0;
    const int64_t first = b * cells.num_frames * columns;
    for (int64_t i = first; i < first + cells.num_frames * columns; ++i) {
      const T product = cells.product[i];
      const Score grad = out.grad_normalizer[i] * inverse;
      weight[i] = grad == 0 || product < cells.threshold
                      ? 0
                      : static_cast<T>(grad / static_cast<Score>(product));
    }
  });
}

template <typename T>
void AdditiveGradientsCpu(const AdditiveCells<T>& cells, const AdditiveTerms& terms,
                          const AdditiveExponentials<T>& exponentials,
                          const AdditiveScoreGrads& grads, const AdditiveSaved& saved,
                          int num_threads, T* grad_am, T* grad_lm) {
  const int64_t size = cells.vocab_size, symbols = terms.num_symbols;
  const auto scaled = [size](const T* exp, Score factor, T* grad) {
    if (factor == 0) {  // nothing asked for (a NaN loss that was masked out): not 0 * NaN
      std::fill_n(grad, size, T(0));
      return;
    }
    const T f = static_cast<T>(factor);
    for (int64_t v = 0; v < size; ++v) grad[v] = grad[v] * exp[v] * f;
  };
  ParallelForRows(cells.num_utterances * cells.num_frames, num_threads,
                  [&](int64_t begin, int64_t end) {
                    const double am_scale = terms.combined_scale + terms.am_only_scale;
                    for (int64_t i = begin; i < end; ++i) {
                      const int64_t b = i / cells.num_frames;
                      T* grad = grad_am + i * size;
                      scaled(exponentials.am + i * size, saved.scale[b], grad);
                      if (am_scale == 0) continue;
                      const Score* blank = grads.blank + i * (symbols + 1);
                      const Score* label = grads.label + i * symbols;
                      const int64_t* symbol = terms.symbols + b * symbols;
                      Score of_blank = 0;
                      for (int64_t u = 0; u <= symbols; ++u) of_blank += blank[u];
                      grad[terms.blank] += static_cast<T>(am_scale * of_blank);
                      for (int64_t u = 0; u < symbols; ++u) {
                        grad[symbol[u]] += static_cast<T>(am_scale * label[u]);
                      }
                    }
                  });
  ParallelForRows(cells.num_utterances * cells.num_columns, num_threads,
                  [&](int64_t begin, int64_t end) {
                    for (int64_t i = begin; i < end; ++i) {
                      scaled(exponentials.lm + i * size, saved.scale[i / cells.num_columns],
                             grad_lm + i * size);
                    }
                  });
  RepairNormalizerBackwardCpu(cells, saved.normalizer, saved.grad_normalizer, num_threads, grad_am,
                              grad_lm);
}

#define TRANSDUCER_INSTANTIATE(T)                                                                  \
  template void ShiftedExpCpu<T>(const T*, int64_t, int64_t, int, T*, T*);                         \
  template void AdditiveScoresCpu<T>(const AdditiveCells<T>&, const AdditiveTerms&, const T*,      \
                                     const T*, int, const AdditiveScoresOut&);                     \
  template void AdditiveWeightsCpu<T>(const AdditiveCells<T>&, const AdditiveTerms&,               \
                                      const AdditiveScoreGrads&, int, const AdditiveWeightsOut&,   \
                                      T*);                                                         \
  template void AdditiveGradientsCpu<T>(const AdditiveCells<T>&, const AdditiveTerms&,             \
                                        const AdditiveExponentials<T>&, const AdditiveScoreGrads&, \
                                        const AdditiveSaved&, int, T*, T*);
TRANSDUCER_INSTANTIATE(float)
TRANSDUCER_INSTANTIATE(double)

}  // namespace transducer
