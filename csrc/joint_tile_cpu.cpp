// SPDX-License-Identifier: Apache-2.0
#include <algorithm>

#include "check.h"
#include "joint_tile.h"
#include "parallel.h"
#include "row_kernels.h"

namespace transducer {

template <typename T>
void JoinForwardCpu(const LatticeBatch& batch, const T* enc, const T* pred, int64_t width,
                    Activation activation, int num_threads, T* hidden) {
  const RowKernels<T>& kernels = GetRowKernels<T>();
  const auto zero_rows = [&](int64_t begin, int64_t end) {
    std::fill(hidden + begin * width, hidden + end * width, T{});
  };
  ParallelFor(batch.num_utterances * batch.max_frames, num_threads, [&](int64_t task) {
    const int64_t b = task / batch.max_frames, t = task % batch.max_frames;
    TRANSDUCER_CHECK(batch.IsValid(b), "invalid lengths");
    const int64_t begin = batch.Row(b, t, 0);
    if (t >= batch.num_frames[b]) {
      if (batch.row_stride != 0) zero_rows(begin, begin + batch.row_stride);
      return;
    }
    const int64_t columns = batch.num_targets[b] + 1;
    const T* enc_row = enc + task * width;
    const T* pred_row = pred + b * (batch.max_targets + 1) * width;
    for (int64_t u = 0; u < columns; ++u) {
      kernels.add_activation(enc_row, pred_row + u * width, width, activation,
                             hidden + (begin + u) * width);
    }
    zero_rows(begin + columns, begin + batch.Stride(b));
  });
}

template <typename T>
void JoinBackwardCpu(const LatticeBatch& batch, const T* grad_hidden, const T* hidden, const T* enc,
                     const T* pred, int64_t width, Activation activation, int num_threads,
                     Compute<T>* grad_enc, Compute<T>* grad_pred) {
  const RowKernels<T>& kernels = GetRowKernels<T>();
  // One task a slice of channels of an utterance: it reads each of its gradients once and owns all
  // it writes. The slice is fixed, so the result does not depend on num_threads.
  constexpr int64_t kSlice = 128;
  const int64_t num_slices = (width + kSlice - 1) / kSlice;
  ParallelFor(batch.num_utterances * num_slices, num_threads, [&](int64_t task) {
    const int64_t b = task / num_slices, first = task % num_slices * kSlice;
    TRANSDUCER_CHECK(batch.IsValid(b), "invalid lengths");
    const int64_t size = std::min(kSlice, width - first);
    const int64_t enc_begin = b * batch.max_frames * width + first;
    const int64_t pred_begin = b * (batch.max_targets + 1) * width + first;
    for (int64_t t = 0; t < batch.max_frames; ++t) {
      std::fill_n(grad_enc + enc_begin + t * width, size, Compute<T>{0});
    }
    for (int64_t u = 0; u <= batch.max_targets; ++u) {
      std::fill_n(grad_pred + pred_begin + u * width, size, Compute<T>{0});
    }
    for (int64_t t = 0; t < batch.num_frames[b]; ++t) {
      for (int64_t u = 0; u <= batch.num_targets[b]; ++u) {
        const int64_t cell = batch.Row(b, t, u) * width + first;
        const int64_t at_enc = enc_begin + t * width, at_pred = pred_begin + u * width;
        kernels.add_activation_backward(grad_hidden + cell, hidden + cell, enc + at_enc,
                                        pred + at_pred, size, activation, grad_enc + at_enc,
                                        grad_pred + at_pred);
      }
    }
  });
}

#define TRANSDUCER_INSTANTIATE(T)                                                                  \
  template void JoinForwardCpu<T>(const LatticeBatch&, const T*, const T*, int64_t, Activation, int, \
                                  T*);                                                             \
  template void JoinBackwardCpu<T>(const LatticeBatch&, const T*, const T*, const T*, const T*,    \
                                   int64_t, Activation, int, Compute<T>*, Compute<T>*);
TRANSDUCER_FOR_EACH_DTYPE(TRANSDUCER_INSTANTIATE)

}  // namespace transducer
