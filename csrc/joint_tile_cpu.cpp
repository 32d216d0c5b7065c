// SPDX-License-Identifier: Apache-2.0
#include "joint_tile.h"

#include <algorithm>

#include "check.h"
#include "parallel.h"
#include "row_kernels.h"

namespace transducer {

template <typename T>
void JoinForwardCpu(const LatticeBatch& batch, const RowTile& tile, const JoinInputs<T>& inputs,
                    int num_threads, T* hidden) {
  const int64_t width = inputs.width;
  const RowKernels<T>& kernels = GetRowKernels<T>();
  ParallelForRows(tile.size, num_threads, [&](int64_t begin, int64_t end) {
    CellCursor cursor(batch);
    Cell cell;
    for (int64_t i = begin; i < end; ++i) {
      T* out = hidden + i * width;
      if (cursor.Find(tile.Row(i), &cell)) {
        kernels.add_activation(inputs.enc + (cell.b * batch.max_frames + cell.t) * width,
                               inputs.pred + (cell.b * (batch.max_targets + 1) + cell.u) * width,
                               width, inputs.activation, out);
      } else {
        std::fill_n(out, width, T{});
      }
    }
  });
}

void JoinQuantizedCpu(const LatticeBatch& batch, const RowTile& tile,
                      const JoinInputs<float>& inputs, int num_threads, int8_t* hidden,
                      float* scales) {
  const int64_t width = inputs.width;
  TRANSDUCER_CHECK(width <= kMaxQuantizedWidth, "too many channels for a quantized join");
  const RowKernelSet& kernels = GetRowKernelSet();
  ParallelForRows(tile.size, num_threads, [&](int64_t begin, int64_t end) {
    alignas(64) float row[kMaxQuantizedWidth];
    CellCursor cursor(batch);
    Cell cell;
    for (int64_t i = begin; i < end; ++i) {
      int8_t* out = hidden + i * width;
      if (cursor.Find(tile.Row(i), &cell)) {
        kernels.coarse_add_activation(inputs.enc + (cell.b * batch.max_frames + cell.t) * width,
                                      inputs.pred +
                                          (cell.b * (batch.max_targets + 1) + cell.u) * width,
                                      width, inputs.activation, row);
        kernels.quantize(row, width, out, &scales[i]);
      } else {
        std::fill_n(out, width, int8_t{0});
        scales[i] = 0;
      }
    }
  });
}

int64_t JoinBackwardScratchCpu(const LatticeBatch&, const RowTile&) { return 0; }

template <typename T>
void JoinBackwardCpu(const LatticeBatch& batch, const RowTile& tile, const JoinInputs<T>& inputs,
                     const T* hidden, const T* grad_hidden, int num_threads, void*,
                     const JoinGrads<T>& grads) {
  const int64_t width = inputs.width;
  const RowKernels<T>& kernels = GetRowKernels<T>();
  // A task has a slice of the channels and alone writes to it, so every sum is in the order of the
  // rows for any width of the slices. Wide slices read longer runs of each row.
  constexpr int64_t kMinSlice = 128;
  const int64_t share = (width + num_threads - 1) / std::max(num_threads, 1);
  const int64_t slice = std::max(kMinSlice, (share + kMinSlice - 1) / kMinSlice * kMinSlice);
  ParallelFor((width + slice - 1) / slice, num_threads, [&](int64_t task) {
    const int64_t first = task * slice, size = std::min(slice, width - first);
    CellCursor cursor(batch);
    Cell cell;
    for (int64_t i = 0; i < tile.size; ++i) {
      if (!cursor.Find(tile.Row(i), &cell)) continue;
      const int64_t at = i * width + first;
      const int64_t at_enc = (cell.b * batch.max_frames + cell.t) * width + first;
      const int64_t at_pred = (cell.b * (batch.max_targets + 1) + cell.u) * width + first;
      kernels.add_activation_backward(grad_hidden + at, hidden + at, inputs.enc + at_enc,
                                      inputs.pred + at_pred, size, inputs.activation,
                                      grads.enc + at_enc, grads.pred + at_pred);
    }
  });
}

#define TRANSDUCER_INSTANTIATE(T)                                                                 \
  template void JoinForwardCpu<T>(const LatticeBatch&, const RowTile&, const JoinInputs<T>&, int, \
                                  T*);                                                            \
  template void JoinBackwardCpu<T>(const LatticeBatch&, const RowTile&, const JoinInputs<T>&,     \
                                   const T*, const T*, int, void*, const JoinGrads<T>&);
TRANSDUCER_FOR_EACH_DTYPE(TRANSDUCER_INSTANTIATE)

}  // namespace transducer
