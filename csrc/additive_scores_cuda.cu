// SPDX-License-Identifier: Apache-2.0
// One warp computes a row of exponentials, the cells of a frame, or a row of a gradient. Few cells
// need repair: the lanes of a warp test 32 cells at once and repair the found ones together.
#include "additive_scores.h"
#include "device_rows.cuh"

namespace transducer {
namespace {

template <typename T>
__device__ bool NeedsRepair(const AdditiveCells<T>& cells, int64_t cell) {
  return cells.product[cell] < cells.threshold;
}

// am_v + lm_v - offset in float64 (normalizer_repair_cpu.cpp).
template <typename T>
__device__ T ShiftedSum(T am, T lm, Score offset) {
  return static_cast<T>((static_cast<Score>(am) + static_cast<Score>(lm)) - offset);
}

// f(place) for the places begin ... begin + 31 at which some lane's `is_wanted` is true; all lanes
// of the warp call it together.
template <typename F>
__device__ void ForEachWanted(bool is_wanted, int64_t begin, F f) {
  unsigned wanted = __ballot_sync(kFullWarp, is_wanted);
  while (wanted != 0) {
    f(begin + __ffs(static_cast<int>(wanted)) - 1);
    wanted &= wanted - 1;
  }
}

// logsumexp(am_t + lm_u) of one cell, computed by a warp.
template <typename T>
__device__ void Repair(const AdditiveCells<T>& cells, int64_t cell, Score* normalizer) {
  const int64_t frame = cell / cells.num_columns, b = frame / cells.num_frames;
  const T* am = cells.am + frame * cells.vocab_size;
  const T* lm = cells.Lm(b, cell - frame * cells.num_columns);
  T max = -kInfinityOf<T>;
  for (int64_t v = Lane(); v < cells.vocab_size; v += kWarp) {
    const T sum = am[v] + lm[v];
    max = sum > max ? sum : max;
  }
  const Score offset = WarpMax(max);  // -inf makes NaN of the sum: nothing in the row is finite
  T sum = 0;
  for (int64_t v = Lane(); v < cells.vocab_size; v += kWarp) {
    sum += Exp(ShiftedSum(am[v], lm[v], offset));
  }
  sum = WarpSum(sum);
  if (Lane() == 0) normalizer[cell] = offset + log(static_cast<Score>(sum));
}

// The row of am or of lm that a warp works on: first those of am, a frame each, then those of lm, a
// column each.
struct AdditiveRow {
  int64_t row, b, index;  // `index` is the frame or the column
  bool is_am, is_real;    // of a frame or column that the utterance has

  template <typename T>
  __device__ AdditiveRow(const AdditiveCells<T>& cells, const AdditiveTerms& terms) {
    const int64_t num_frames = cells.num_utterances * cells.num_frames;
    is_am = GlobalWarp() < num_frames;
    row = is_am ? GlobalWarp() : GlobalWarp() - num_frames;
    const int64_t length = is_am ? cells.num_frames : cells.num_columns;
    b = row / length;
    index = row - b * length;
    is_real = is_am ? terms.IsFrame(b, index) : terms.IsColumn(b, index);
  }
};

template <typename T>
TRANSDUCER_HD int64_t NumAdditiveRows(const AdditiveCells<T>& cells) {
  return cells.num_utterances * (cells.num_frames + cells.num_columns);
}

// The warps of lm also compute what depends on the column alone.
template <typename T>
__global__ void __launch_bounds__(kRowThreads, kRowBlocksAtOnce)
    ExponentialsKernel(AdditiveCells<T> cells, AdditiveTerms terms, AdditiveExponentials<T> out,
                       AdditiveContexts contexts) {
  if (GlobalWarp() >= NumAdditiveRows(cells)) return;
  const auto [row, b, index, is_am, is_real] = AdditiveRow(cells, terms);
  const T* x = (is_am ? cells.am : cells.lm) + row * cells.vocab_size;
  T* y = (is_am ? out.am : out.lm) + row * cells.vocab_size;
  T max = 0;
  if (is_real) {
    max = -kInfinityOf<T>;
    for (int64_t v = Lane(); v < cells.vocab_size; v += kWarp) max = x[v] > max ? x[v] : max;
    max = WarpMax(max);  // an infinite one makes NaN of its difference to itself
  }
  Score sum = 0;
  for (int64_t v = Lane(); v < cells.vocab_size; v += kWarp) {
    T value = is_real ? Exp(x[v] - max) : T(1);
    if (value < kFlushBelow<T>) value = 0;  // subnormals slow products down
    y[v] = value;
    if (!is_am) sum += static_cast<Score>(value);
  }
  if (is_am) {
    if (Lane() == 0) out.am_max[row] = max;
    return;
  }
  sum = WarpSum(sum);
  if (Lane() != 0) return;
  out.lm_max[row] = max;
  out.lm_sum[row] = sum;
  if (contexts.blank == nullptr) return;
  const int64_t symbols = terms.num_symbols, u = index;
  const Score normalizer = log(sum) + static_cast<Score>(max);
  if (u <= symbols) {
    contexts.blank[b * (symbols + 1) + u] =
        ContextScore(cells, terms, b, u, terms.blank, normalizer);
  }
  if (u < symbols) {
    contexts.label[b * symbols + u] =
        ContextScore(cells, terms, b, u, terms.Symbol(b, u, cells.vocab_size), normalizer);
  }
  if (u == 0) SetLattice(terms, b, cells.num_utterances, cells.num_frames, contexts.lattices);
}

template <typename T>
__global__ void __launch_bounds__(kRowThreads, kRowBlocksAtOnce)
    ScoresKernel(AdditiveCells<T> cells, AdditiveTerms terms, AdditiveExponentials<T> exponentials,
                 AdditiveContexts contexts, AdditiveScoresOut out) {
  const int64_t frame = GlobalWarp(), columns = cells.num_columns, symbols = terms.num_symbols;
  if (frame >= cells.num_utterances * cells.num_frames) return;
  const int64_t b = frame / cells.num_frames, t = frame - b * cells.num_frames;
  const Score top = static_cast<Score>(exponentials.am_max[frame]);
  for (int64_t begin = 0; begin < columns; begin += kWarp) {
    const int64_t k = begin + Lane(), cell = frame * columns + k;
    const bool is_cell = k < columns;
    const bool needs_repair = is_cell && NeedsRepair(cells, cell);
    if (is_cell && !needs_repair) {
      const Score of_maxima = top + static_cast<Score>(exponentials.lm_max[b * columns + k]);
      out.normalizer[cell] = log(static_cast<Score>(cells.product[cell])) + of_maxima;
    }
    ForEachWanted(needs_repair, frame * columns + begin,
                  [&](int64_t found) { Repair(cells, found, out.normalizer); });
  }
  __syncwarp();  // other lanes read what Repair wrote
  const Score* normalizer = out.normalizer + frame * columns;
  const Score prior =
      terms.am_only_scale != 0 ? terms.am_only_scale * normalizer[symbols + 1] : Score(0);
  const Score at_blank = FrameScore(cells, terms, b, t, terms.blank);
  for (int64_t u = Lane(); u <= symbols; u += kWarp) {
    const int64_t cell = frame * (symbols + 1) + u;
    const Score common =
        prior + (terms.combined_scale != 0 ? terms.combined_scale * normalizer[u] : Score(0));
    out.blank[cell] = (at_blank + contexts.blank[b * (symbols + 1) + u]) - common;
    Score label = kLogZero;
    if (u < symbols) {
      const int64_t symbol = terms.Symbol(b, u, cells.vocab_size);
      label = (FrameScore(cells, terms, b, t, symbol) + contexts.label[b * symbols + u]) - common;
    }
    out.label[cell] = label;
  }
}

template <typename T>
__global__ void __launch_bounds__(kRowThreads, kRowBlocksAtOnce)
    WeightsKernel(AdditiveCells<T> cells, AdditiveTerms terms, AdditiveScoreGrads grads,
                  Score* grad_normalizer, T* weight) {
  const int64_t frame = GlobalWarp(), columns = cells.num_columns, symbols = terms.num_symbols;
  if (frame >= cells.num_utterances * cells.num_frames) return;
  const Score factor = grads.factor[frame / cells.num_frames];
  const auto set = [&](int64_t k, Score grad) {
    const int64_t cell = frame * columns + k;
    const T product = cells.product[cell];
    const bool is_nothing = factor == 0 || grad == 0;
    grad_normalizer[cell] = is_nothing ? Score(0) : grad * factor;
    weight[cell] = is_nothing || product < cells.threshold
                       ? T(0)
                       : static_cast<T>(grad / static_cast<Score>(product));
  };
  Score of_frame = 0;
  for (int64_t u = Lane(); u <= symbols; u += kWarp) {
    const int64_t cell = frame * (symbols + 1) + u;
    const Score of_cell = grads.blank[cell] + grads.label[cell];
    of_frame += of_cell;
    set(u, -terms.combined_scale * of_cell);
  }
  if (terms.am_only_scale == 0) return;
  of_frame = WarpSum(of_frame);
  if (Lane() == 0) set(symbols + 1, -terms.am_only_scale * of_frame);
}

// Adds the values of the lanes to row[symbol], in the order of the lanes; symbol -1 adds nothing.
// Called by all lanes of the warp.
template <typename T>
__device__ void AddAt(int64_t symbol, Score value, T* row) {
  Score sum = 0;
  bool is_first = symbol >= 0;  // the first lane with a symbol adds up for all of them
#pragma unroll 4
  for (int lane = 0; lane < kWarp; ++lane) {
    const int64_t other = __shfl_sync(kFullWarp, symbol, lane);
    const Score of_other = __shfl_sync(kFullWarp, value, lane);
    if (other != symbol) continue;
    sum += of_other;
    if (lane < Lane()) is_first = false;
  }
  __syncwarp();  // other lanes may have written the row, and shuffles do not order memory
  if (is_first) row[symbol] += static_cast<T>(sum);
}

// Sums over frames of the gradients of a column's scores; `begin` is its first frame, and the lanes
// of `step` take turns.
__device__ inline void AddFrames(const AdditiveScoreGrads& grads, int64_t cell, int64_t num_frames,
                                 int64_t columns, int begin, int step, Score* blank, Score* label) {
  *blank = *label = 0;
#pragma unroll 4
  for (int64_t t = begin; t < num_frames; t += step) {
    *blank += grads.blank[cell + t * columns];
    *label += grads.label[cell + t * columns];
  }
}

template <typename T>
__global__ void __launch_bounds__(kRowThreads, kRowBlocksAtOnce)
    GradientsKernel(AdditiveCells<T> cells, AdditiveTerms terms,
                    AdditiveExponentials<T> exponentials, AdditiveScoreGrads grads, T* grad_am,
                    T* grad_lm) {
  if (GlobalWarp() >= NumAdditiveRows(cells)) return;
  const auto [row, b, index, is_am, is_real] = AdditiveRow(cells, terms);
  const int64_t symbols = terms.num_symbols, columns = symbols + 1;
  const Score factor = grads.factor[b];
  const bool has_grad = is_real && factor != 0;
  const bool is_column = !is_am && index <= symbols;
  const int64_t first_cell = b * cells.num_frames * columns;  // of the utterance
  Score blank = 0, label = 0, of_softmax = 0;                 // of the row's frame or column
  if (has_grad && is_column) {
    AddFrames(grads, first_cell + index, cells.num_frames, columns, Lane(), kWarp, &blank, &label);
    blank = WarpSum(blank);
    label = WarpSum(label);
    if (terms.lm_only_scale != 0) {
      of_softmax = -terms.lm_only_scale * (blank + label) / exponentials.lm_sum[row];
    }
  }
  const T* exps = (is_am ? exponentials.am : exponentials.lm) + row * cells.vocab_size;
  T* out = (is_am ? grad_am : grad_lm) + row * cells.vocab_size;
  for (int64_t v = Lane(); v < cells.vocab_size; v += kWarp) {
    T value = 0;  // without a gradient, not the product: it may have been 0 * NaN
    if (has_grad) value = (out[v] + static_cast<T>(of_softmax)) * exps[v] * static_cast<T>(factor);
    out[v] = value < kFlushBelow<T> && value > -kFlushBelow<T> ? T(0) : value;
  }
  const Score scale = factor * (is_am       ? terms.AmScale()
                                : is_column ? terms.LmScale()
                                            : terms.am_only_scale);
  if (!has_grad || scale == 0) return;
  if (is_column) {
    const int64_t symbol = index < symbols ? terms.Symbol(b, index, cells.vocab_size) : -1;
    const bool is_blank = Lane() == 0;  // the label is lane 1's
    AddAt(Lane() > 1 ? -1
          : is_blank ? terms.blank
                     : symbol,
          scale * (is_blank ? blank : label), out);
    return;
  }
  for (int64_t begin = 0; begin <= symbols; begin += kWarp) {
    const int64_t u = begin + Lane();
    Score of_label = 0;
    if (u <= symbols && is_am) {
      const int64_t cell = first_cell + index * columns + u;
      blank += grads.blank[cell];
      of_label = grads.label[cell];
    } else if (u <= symbols) {
      Score of_blank;
      AddFrames(grads, first_cell + u, cells.num_frames, columns, 0, 1, &of_blank, &of_label);
      blank += of_blank;
    }
    AddAt(u < symbols ? terms.Symbol(b, u, cells.vocab_size) : -1, scale * of_label, out);
  }
  blank = WarpSum(blank);
  AddAt(Lane() == 0 ? terms.blank : -1, scale * blank, out);
}

// One warp a row of grad_am (kOfFrames: frame t, adds over u) or of grad_lm (symbol u, adds over
// t), and 32 symbols of the vocabulary.
template <typename T, bool kOfFrames>
__global__ void __launch_bounds__(kRowThreads, kRowBlocksAtOnce)
    RepairBackwardKernel(AdditiveCells<T> cells, const Score* normalizer, const Score* grad,
                         T* out) {
  const int64_t num_slices = (cells.vocab_size + kWarp - 1) / kWarp;
  const int64_t row = GlobalWarp() / num_slices;
  const int64_t v = (GlobalWarp() - row * num_slices) * kWarp + Lane();
  const int64_t num_rows = kOfFrames ? cells.num_frames : cells.num_columns;
  const int64_t num_terms = kOfFrames ? cells.num_columns : cells.num_frames;
  const int64_t b = row / num_rows, index = row - b * num_rows;
  if (b >= cells.num_utterances) return;
  const bool has_symbol = v < cells.vocab_size;  // the other lanes still test cells
  const auto cell_of = [&](int64_t term) {
    return kOfFrames ? cells.Cell(b, index, term) : cells.Cell(b, term, index);
  };
  T sum = 0;
  bool is_changed = false;
  for (int64_t begin = 0; begin < num_terms; begin += kWarp) {
    const int64_t mine = begin + Lane();
    const bool is_wanted =
        mine < num_terms && NeedsRepair(cells, cell_of(mine)) && grad[cell_of(mine)] != 0;
    ForEachWanted(is_wanted, begin, [&](int64_t term) {
      if (!has_symbol) return;
      if (!is_changed) sum = out[row * cells.vocab_size + v];
      is_changed = true;
      const int64_t t = kOfFrames ? index : term, u = kOfFrames ? term : index;
      const int64_t cell = cell_of(term);
      const T x = ShiftedSum(cells.Am(b, t)[v], cells.Lm(b, u)[v], normalizer[cell]);
      const T g = static_cast<T>(grad[cell]) * Exp(x);
      sum += g < kFlushBelow<T> && g > -kFlushBelow<T> ? T(0) : g;
    });
  }
  if (is_changed) out[row * cells.vocab_size + v] = sum;
}

int64_t WarpBlocks(int64_t warps) { return CeilDivide(warps, kRowThreads / kWarp); }

}  // namespace

template <typename T>
void AdditiveExponentialsCuda(const AdditiveCells<T>& cells, const AdditiveTerms& terms,
                              void* stream, const AdditiveExponentials<T>& out,
                              const AdditiveContexts& contexts) {
  const int64_t rows = NumAdditiveRows(cells);
  TRANSDUCER_LAUNCH(ExponentialsKernel<T>, WarpBlocks(rows), kRowThreads, stream, cells, terms, out,
                    contexts);
}

template <typename T>
void AdditiveScoresCuda(const AdditiveCells<T>& cells, const AdditiveTerms& terms,
                        const AdditiveExponentials<T>& exponentials,
                        const AdditiveContexts& contexts, void* stream,
                        const AdditiveScoresOut& out) {
  TRANSDUCER_LAUNCH(ScoresKernel<T>, WarpBlocks(cells.num_utterances * cells.num_frames),
                    kRowThreads, stream, cells, terms, exponentials, contexts, out);
}

template <typename T>
void AdditiveWeightsCuda(const AdditiveCells<T>& cells, const AdditiveTerms& terms,
                         const AdditiveScoreGrads& grads, void* stream, Score* grad_normalizer,
                         T* weight) {
  TRANSDUCER_LAUNCH(WeightsKernel<T>, WarpBlocks(cells.num_utterances * cells.num_frames),
                    kRowThreads, stream, cells, terms, grads, grad_normalizer, weight);
}

template <typename T>
void AdditiveGradientsCuda(const AdditiveCells<T>& cells, const AdditiveTerms& terms,
                           const AdditiveExponentials<T>& exponentials,
                           const AdditiveScoreGrads& grads, const AdditiveSaved& saved,
                           void* stream, T* grad_am, T* grad_lm) {
  const int64_t rows = NumAdditiveRows(cells);
  TRANSDUCER_LAUNCH(GradientsKernel<T>, WarpBlocks(rows), kRowThreads, stream, cells, terms,
                    exponentials, grads, grad_am, grad_lm);
  const int64_t slices = cells.num_utterances * CeilDivide(cells.vocab_size, kWarp);
  TRANSDUCER_LAUNCH((RepairBackwardKernel<T, true>), WarpBlocks(slices * cells.num_frames),
                    kRowThreads, stream, cells, saved.normalizer, saved.grad_normalizer, grad_am);
  TRANSDUCER_LAUNCH((RepairBackwardKernel<T, false>), WarpBlocks(slices * cells.num_columns),
                    kRowThreads, stream, cells, saved.normalizer, saved.grad_normalizer, grad_lm);
}

#define TRANSDUCER_INSTANTIATE(T)                                                                 \
  template void AdditiveExponentialsCuda<T>(const AdditiveCells<T>&, const AdditiveTerms&, void*, \
                                            const AdditiveExponentials<T>&,                       \
                                            const AdditiveContexts&);                             \
  template void AdditiveScoresCuda<T>(const AdditiveCells<T>&, const AdditiveTerms&,              \
                                      const AdditiveExponentials<T>&, const AdditiveContexts&,    \
                                      void*, const AdditiveScoresOut&);                           \
  template void AdditiveWeightsCuda<T>(const AdditiveCells<T>&, const AdditiveTerms&,             \
                                       const AdditiveScoreGrads&, void*, Score*, T*);             \
  template void AdditiveGradientsCuda<T>(const AdditiveCells<T>&, const AdditiveTerms&,           \
                                         const AdditiveExponentials<T>&,                          \
                                         const AdditiveScoreGrads&, const AdditiveSaved&, void*,  \
                                         T*, T*);
TRANSDUCER_INSTANTIATE(float)
TRANSDUCER_INSTANTIATE(double)
#undef TRANSDUCER_INSTANTIATE

}  // namespace transducer
