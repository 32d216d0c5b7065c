// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <vector>

#include "normalizer_repair.h"
#include "parallel.h"
#include "row_kernels.h"

namespace transducer {
namespace {

// am_v + lm_v - offset, formed in float64: the sum may be large where the difference is small, and
// only the difference matters to the exponential.
template <typename T>
void ShiftedSum(const T* am, const T* lm, int64_t size, Score offset, T* out) {
  for (int64_t v = 0; v < size; ++v) {
    out[v] = static_cast<T>((static_cast<Score>(am[v]) + static_cast<Score>(lm[v])) - offset);
  }
}

// About max_v(am_v + lm_v): rounded to T, which is near enough for what is only an offset. Several
// running maxima instead of one, so that the compiler can keep them in a vector.
template <typename T>
T MaxOfSum(const T* am, const T* lm, int64_t size) {
  constexpr int64_t kLanes = 16;
  T lanes[kLanes];
  std::fill_n(lanes, kLanes, -std::numeric_limits<T>::infinity());
  int64_t v = 0;
  for (; v + kLanes <= size; v += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      const T sum = am[v + lane] + lm[v + lane];
      lanes[lane] = sum > lanes[lane] ? sum : lanes[lane];
    }
  }
  for (; v < size; ++v) lanes[0] = std::max(lanes[0], am[v] + lm[v]);
  return *std::max_element(lanes, lanes + kLanes);
}

}  // namespace

template <typename T>
void RepairNormalizerCpu(const AdditiveCells<T>& cells, int num_threads, Score* normalizer) {
  const RowKernels<T>& kernels = GetRowKernels<T>();
  ParallelFor(cells.num_utterances * cells.num_frames, num_threads, [&](int64_t task) {
    const int64_t b = task / cells.num_frames, t = task % cells.num_frames;
    std::vector<T> row;
    for (int64_t u = 0; u < cells.num_columns; ++u) {
      const int64_t cell = cells.Cell(b, t, u);
      if (!(cells.product[cell] < cells.threshold)) continue;
      row.resize(cells.vocab_size);
      const T* am = cells.Am(b, t);
      const T* lm = cells.Lm(b, u);
      const Score offset = MaxOfSum(am, lm, cells.vocab_size);
      // am and lm may exclude each other's symbols: a row of -inf is NaN, as everywhere.
      ShiftedSum(am, lm, cells.vocab_size, offset, row.data());
      T max, sum;
      kernels.max_and_sum_exp(row.data(), cells.vocab_size, &max, &sum);
      normalizer[cell] = offset + (static_cast<Score>(max) + std::log(static_cast<Score>(sum)));
    }
  });
}

template <typename T>
void RepairNormalizerBackwardCpu(const AdditiveCells<T>& cells, const Score* normalizer,
                                 const Score* grad, int num_threads, T* grad_am, T* grad_lm) {
  const RowKernels<T>& kernels = GetRowKernels<T>();
  // One task a slice of the vocabulary of an utterance: it owns all it writes.
  constexpr int64_t kSlice = 256;
  const int64_t num_slices = (cells.vocab_size + kSlice - 1) / kSlice;
  ParallelFor(cells.num_utterances * num_slices, num_threads, [&](int64_t task) {
    const int64_t b = task / num_slices, first = task % num_slices * kSlice;
    const int64_t size = std::min(kSlice, cells.vocab_size - first);
    T row[kSlice];
    for (int64_t t = 0; t < cells.num_frames; ++t) {
      for (int64_t u = 0; u < cells.num_columns; ++u) {
        const int64_t cell = cells.Cell(b, t, u);
        if (!(cells.product[cell] < cells.threshold) || grad[cell] == 0) continue;
        const T* am = cells.Am(b, t) + first;
        const T* lm = cells.Lm(b, u) + first;
        ShiftedSum(am, lm, size, normalizer[cell], row);
        kernels.scaled_softmax(row, size, 0, T(1), std::numeric_limits<T>::infinity(),
                               static_cast<T>(grad[cell]), row);
        T* to_am = grad_am + (am - cells.am);
        T* to_lm = grad_lm + (lm - cells.lm);
        for (int64_t v = 0; v < size; ++v) {
          to_am[v] += row[v];
          to_lm[v] += row[v];
        }
      }
    }
  });
}

#define TRANSDUCER_INSTANTIATE(T)                                                     \
  template void RepairNormalizerCpu<T>(const AdditiveCells<T>&, int, Score*);         \
  template void RepairNormalizerBackwardCpu<T>(const AdditiveCells<T>&, const Score*, \
                                               const Score*, int, T*, T*);
TRANSDUCER_INSTANTIATE(float)
TRANSDUCER_INSTANTIATE(double)

}  // namespace transducer
