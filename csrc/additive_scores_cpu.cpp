// SPDX-License-Identifier: Apache-2.0
#include "additive_scores.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "parallel.h"
#include "row_kernels.h"

namespace transducer {
namespace {

template <typename T>
Score SumOf(const T* values, int64_t size) {
  constexpr int64_t kLanes = 8;
  Score lanes[kLanes] = {};
  int64_t v = 0;
  for (; v + kLanes <= size; v += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) lanes[lane] += values[v + lane];
  }
  for (; v < size; ++v) lanes[0] += values[v];
  Score sum = 0;
  for (const Score lane : lanes) sum += lane;
  return sum;
}

}  // namespace

template <typename T>
void AdditiveExponentialsCpu(const AdditiveCells<T>& cells, const AdditiveTerms& terms,
                             int num_threads, const AdditiveExponentials<T>& out,
                             const AdditiveContexts& contexts) {
  const RowKernels<T>& kernels = GetRowKernels<T>();
  const int64_t size = cells.vocab_size, columns = cells.num_columns, symbols = terms.num_symbols;
  const auto exponentials = [&](const T* rows, int64_t i, bool is_real, T* exps, T* max) {
    if (is_real) {
      kernels.shifted_exp(rows + i * size, size, exps + i * size, &max[i]);
    } else {  // of zeros
      std::fill_n(exps + i * size, size, T(1));
      max[i] = 0;
    }
  };
  ParallelForRows(cells.num_utterances * cells.num_frames, num_threads,
                  [&](int64_t begin, int64_t end) {
                    for (int64_t i = begin; i < end; ++i) {
                      const int64_t b = i / cells.num_frames;
                      exponentials(cells.am, i, terms.IsFrame(b, i - b * cells.num_frames), out.am,
                                   out.am_max);
                    }
                  });
  ParallelForRows(cells.num_utterances * columns, num_threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / columns, k = i - b * columns;
      exponentials(cells.lm, i, terms.IsColumn(b, k), out.lm, out.lm_max);
      out.lm_sum[i] = terms.lm_only_scale != 0 ? SumOf(out.lm + i * size, size) : 0;
      if (contexts.blank == nullptr || k > symbols) continue;
      const Score normalizer = std::log(out.lm_sum[i]) + static_cast<Score>(out.lm_max[i]);
      contexts.blank[b * (symbols + 1) + k] =
          ContextScore(cells, terms, b, k, terms.blank, normalizer);
      if (k == symbols) continue;
      contexts.label[b * symbols + k] =
          ContextScore(cells, terms, b, k, terms.Symbol(b, k, size), normalizer);
    }
  });
  if (contexts.blank == nullptr) return;
  for (int64_t b = 0; b < cells.num_utterances; ++b) {
    SetLattice(terms, b, cells.num_utterances, cells.num_frames, contexts.lattices);
  }
}

template <typename T>
void AdditiveScoresCpu(const AdditiveCells<T>& cells, const AdditiveTerms& terms,
                       const AdditiveExponentials<T>& exponentials,
                       const AdditiveContexts& contexts, int num_threads,
                       const AdditiveScoresOut& out) {
  const int64_t num_rows = cells.num_utterances * cells.num_frames;
  const int64_t columns = cells.num_columns, symbols = terms.num_symbols;
  ParallelForRows(num_rows, num_threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const T* product = cells.product + i * columns;
      const T* maxima = exponentials.lm_max + i / cells.num_frames * columns;
      const Score top = static_cast<Score>(exponentials.am_max[i]);
      for (int64_t k = 0; k < columns; ++k) {
        out.normalizer[i * columns + k] =
            std::log(static_cast<Score>(product[k])) + (top + static_cast<Score>(maxima[k]));
      }
    }
  });
  RepairNormalizerCpu(cells, num_threads, out.normalizer);
  ParallelForRows(num_rows, num_threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / cells.num_frames, t = i - b * cells.num_frames;
      const Score* from_blank = contexts.blank + b * (symbols + 1);
      const Score* from_label = contexts.label + b * symbols;
      const Score* norm = out.normalizer + i * columns;
      Score* blank = out.blank + i * (symbols + 1);
      Score* label = out.label + i * (symbols + 1);
      const Score prior = terms.am_only_scale != 0 ? terms.am_only_scale * norm[symbols + 1] : 0;
      const Score at_blank = FrameScore(cells, terms, b, t, terms.blank);
      for (int64_t u = 0; u <= symbols; ++u) {
        const Score common =
            prior + (terms.combined_scale != 0 ? terms.combined_scale * norm[u] : 0);
        blank[u] = (at_blank + from_blank[u]) - common;
        if (u == symbols) continue;
        const int64_t symbol = terms.Symbol(b, u, cells.vocab_size);
        label[u] = (FrameScore(cells, terms, b, t, symbol) + from_label[u]) - common;
      }
      label[symbols] = kLogZero;
    }
  });
}

template <typename T>
void AdditiveWeightsCpu(const AdditiveCells<T>& cells, const AdditiveTerms& terms,
                        const AdditiveScoreGrads& grads, int num_threads, Score* grad_normalizer,
                        T* weight) {
  const int64_t columns = cells.num_columns, symbols = terms.num_symbols;
  ParallelForRows(cells.num_utterances * cells.num_frames, num_threads,
                  [&](int64_t begin, int64_t end) {
                    for (int64_t i = begin; i < end; ++i) {
                      const Score factor = grads.factor[i / cells.num_frames];
                      const Score* blank = grads.blank + i * (symbols + 1);
                      const Score* label = grads.label + i * (symbols + 1);
                      Score* grad = grad_normalizer + i * columns;
                      if (factor == 0) {
                        std::fill_n(grad, columns, 0);
                        std::fill_n(weight + i * columns, columns, T(0));
                        continue;
                      }
                      Score of_frame = 0;
                      for (int64_t u = 0; u <= symbols; ++u) {
                        const Score of_cell = blank[u] + label[u];
                        of_frame += of_cell;
                        grad[u] = -terms.combined_scale * of_cell;
                      }
                      if (terms.am_only_scale != 0)
                        grad[symbols + 1] = -terms.am_only_scale * of_frame;
                      for (int64_t k = 0; k < columns; ++k) {
                        const T product = cells.product[i * columns + k];
                        weight[i * columns + k] =
                            grad[k] == 0 || product < cells.threshold
                                ? T(0)
                                : static_cast<T>(grad[k] / static_cast<Score>(product));
                        grad[k] *= factor;
                      }
                    }
                  });
}

template <typename T>
void AdditiveGradientsCpu(const AdditiveCells<T>& cells, const AdditiveTerms& terms,
                          const AdditiveExponentials<T>& exponentials,
                          const AdditiveScoreGrads& grads, const AdditiveSaved& saved,
                          int num_threads, T* grad_am, T* grad_lm) {
  const int64_t size = cells.vocab_size, symbols = terms.num_symbols, columns = cells.num_columns;
  // Returns whether there is a gradient. If not, the products may have been 0 * NaN.
  const auto scaled = [size](const T* exp, bool is_real, Score factor, Score of_softmax, T* grad) {
    if (factor == 0 || !is_real) {
      std::fill_n(grad, size, T(0));
      return false;
    }
    const T f = static_cast<T>(factor), c = static_cast<T>(of_softmax);
    if (c == 0) {
      for (int64_t v = 0; v < size; ++v) grad[v] = grad[v] * exp[v] * f;
    } else {
      for (int64_t v = 0; v < size; ++v) grad[v] = (grad[v] + c) * exp[v] * f;
    }
    return true;
  };
  ParallelForRows(cells.num_utterances * cells.num_frames, num_threads,
                  [&](int64_t begin, int64_t end) {
                    for (int64_t i = begin; i < end; ++i) {
                      const int64_t b = i / cells.num_frames, t = i - b * cells.num_frames;
                      T* grad = grad_am + i * size;
                      const Score scale = terms.AmScale() * grads.factor[b];
                      const bool has_grad = scaled(exponentials.am + i * size, terms.IsFrame(b, t),
                                                   grads.factor[b], 0, grad);
                      if (!has_grad || terms.AmScale() == 0) continue;
                      const Score* blank = grads.blank + i * (symbols + 1);
                      const Score* label = grads.label + i * (symbols + 1);
                      Score of_blank = 0;
                      for (int64_t u = 0; u <= symbols; ++u) of_blank += blank[u];
                      grad[terms.blank] += static_cast<T>(scale * of_blank);
                      for (int64_t u = 0; u < symbols; ++u) {
                        const int64_t symbol = terms.Symbol(b, u, size);
                        if (symbol >= 0) grad[symbol] += static_cast<T>(scale * label[u]);
                      }
                    }
                  });
  // A task has a block of columns: sums over frames read whole cache lines.
  constexpr int64_t kBlock = 16;
  const int64_t num_blocks = (symbols + kBlock) / kBlock;  // of S + 1 columns
  const auto sums_of_columns = [&](int64_t b, int64_t first, int64_t count, Score* of_blank,
                                   Score* of_label) {
    std::fill_n(of_blank, count, 0);
    std::fill_n(of_label, count, 0);
    for (int64_t t = 0; t < cells.num_frames; ++t) {
      const int64_t row = (b * cells.num_frames + t) * (symbols + 1) + first;
      for (int64_t i = 0; i < count; ++i) {
        of_blank[i] += grads.blank[row + i];
        of_label[i] += grads.label[row + i];
      }
    }
  };
  ParallelFor(cells.num_utterances * num_blocks, num_threads, [&](int64_t task) {
    const int64_t b = task / num_blocks, first = task % num_blocks * kBlock;
    const int64_t count = std::min(kBlock, symbols + 1 - first);
    Score of_blank[kBlock], of_label[kBlock];
    const Score factor = grads.factor[b], scale = terms.LmScale() * factor;
    if (factor != 0) sums_of_columns(b, first, count, of_blank, of_label);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t k = first + i, row = b * columns + k;
      T* grad = grad_lm + row * size;
      const Score of_softmax =
          factor != 0 && terms.lm_only_scale != 0
              ? -terms.lm_only_scale * (of_blank[i] + of_label[i]) / exponentials.lm_sum[row]
              : 0;
      if (!scaled(exponentials.lm + row * size, terms.IsColumn(b, k), factor, of_softmax, grad) ||
          terms.LmScale() == 0) {
        continue;
      }
      grad[terms.blank] += static_cast<T>(scale * of_blank[i]);
      const int64_t symbol = k < symbols ? terms.Symbol(b, k, size) : -1;
      if (symbol >= 0) grad[symbol] += static_cast<T>(scale * of_label[i]);
    }
  });
  if (terms.am_only_scale != 0) {  // the prior
    ParallelFor(cells.num_utterances, num_threads, [&](int64_t b) {
      const int64_t row = b * columns + symbols + 1;
      T* grad = grad_lm + row * size;
      if (!scaled(exponentials.lm + row * size, true, grads.factor[b], 0, grad)) return;
      std::vector<Score> of_blank(static_cast<size_t>(symbols + 1)), of_label(of_blank.size());
      sums_of_columns(b, 0, symbols + 1, of_blank.data(), of_label.data());
      const Score scale = terms.am_only_scale * grads.factor[b];
      for (int64_t u = 0; u <= symbols; ++u) {
        const auto i = static_cast<size_t>(u);
        grad[terms.blank] += static_cast<T>(scale * of_blank[i]);
        const int64_t symbol = u < symbols ? terms.Symbol(b, u, size) : -1;
        if (symbol >= 0) grad[symbol] += static_cast<T>(scale * of_label[i]);
      }
    });
  }
  RepairNormalizerBackwardCpu(cells, saved.normalizer, saved.grad_normalizer, num_threads, grad_am,
                              grad_lm);
}

#define TRANSDUCER_INSTANTIATE(T)                                                                  \
  template void AdditiveExponentialsCpu<T>(const AdditiveCells<T>&, const AdditiveTerms&, int,     \
                                           const AdditiveExponentials<T>&,                         \
                                           const AdditiveContexts&);                               \
  template void AdditiveScoresCpu<T>(const AdditiveCells<T>&, const AdditiveTerms&,                \
                                     const AdditiveExponentials<T>&, const AdditiveContexts&, int, \
                                     const AdditiveScoresOut&);                                    \
  template void AdditiveWeightsCpu<T>(const AdditiveCells<T>&, const AdditiveTerms&,               \
                                      const AdditiveScoreGrads&, int, Score*, T*);                 \
  template void AdditiveGradientsCpu<T>(const AdditiveCells<T>&, const AdditiveTerms&,             \
                                        const AdditiveExponentials<T>&, const AdditiveScoreGrads&, \
                                        const AdditiveSaved&, int, T*, T*);
TRANSDUCER_INSTANTIATE(float)
TRANSDUCER_INSTANTIATE(double)
#undef TRANSDUCER_INSTANTIATE

}  // namespace transducer
