// SPDX-License-Identifier: Apache-2.0
// Few cells need repair: the lanes of a warp look at 32 at once, and work together on those that do.
#include "device_rows.cuh"
#include "normalizer_repair.h"

namespace transducer {
namespace {

template <typename T>
__device__ bool NeedsRepair(const AdditiveCells<T>& cells, int64_t cell) {
  return cells.product[cell] < cells.threshold;
}

// am_v + lm_v - offset, formed in float64 (normalizer_repair_cpu.cpp).
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

// logsumexp(am_t + lm_u) of one cell, by a warp.
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

template <typename T>
__global__ void __launch_bounds__(kRowThreads, kRowBlocksAtOnce)
    RepairKernel(AdditiveCells<T> cells, Score* normalizer) {
  const int64_t begin = GlobalWarp() * kWarp, mine = begin + Lane();
  const bool is_cell = mine < cells.num_utterances * cells.num_frames * cells.num_columns;
  ForEachWanted(is_cell && NeedsRepair(cells, mine), begin,
                [&](int64_t cell) { Repair(cells, cell, normalizer); });
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
  const bool has_symbol = v < cells.vocab_size;  // others still help to look
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

}  // namespace

template <typename T>
void RepairNormalizerCuda(const AdditiveCells<T>& cells, void* stream, Score* normalizer) {
  const int64_t num_cells = cells.num_utterances * cells.num_frames * cells.num_columns;
  TRANSDUCER_LAUNCH(RepairKernel<T>, CeilDivide(num_cells, kRowThreads), kRowThreads, stream, cells,
                    normalizer);
}

template <typename T>
void RepairNormalizerBackwardCuda(const AdditiveCells<T>& cells, const Score* normalizer,
                                  const Score* grad, void* stream, T* grad_am, T* grad_lm) {
  const int64_t slices = cells.num_utterances * CeilDivide(cells.vocab_size, kWarp);
  const auto blocks = [&](int64_t rows) { return CeilDivide(slices * rows, kRowThreads / kWarp); };
  TRANSDUCER_LAUNCH((RepairBackwardKernel<T, true>), blocks(cells.num_frames), kRowThreads, stream,
                    cells, normalizer, grad, grad_am);
  TRANSDUCER_LAUNCH((RepairBackwardKernel<T, false>), blocks(cells.num_columns), kRowThreads,
                    stream, cells, normalizer, grad, grad_lm);
}

#define TRANSDUCER_INSTANTIATE(T)                                                      \
  template void RepairNormalizerCuda<T>(const AdditiveCells<T>&, void*, Score*);       \
  template void RepairNormalizerBackwardCuda<T>(const AdditiveCells<T>&, const Score*, \
                                                const Score*, void*, T*, T*);
TRANSDUCER_INSTANTIATE(float)
TRANSDUCER_INSTANTIATE(double)
#undef TRANSDUCER_INSTANTIATE

}  // namespace transducer
