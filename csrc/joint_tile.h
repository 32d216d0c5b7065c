// SPDX-License-Identifier: Apache-2.0
// Stage 0: one row of D channels per lattice cell, without a padded (B, T, U + 1, D) tensor. Its
// backward pass computes segmented sums.
#pragma once

#include "half.h"
#include "lattice_batch.h"

namespace transducer {

// The two sides of a joiner, both contiguous. T is float, double, Half or BFloat16.
template <typename T>
struct JoinInputs {
  const T* enc;   // (B, max_frames, D)
  const T* pred;  // (B, max_targets + 1, D)
  int64_t width;  // D
  Activation activation;
};

// Gradients of enc and pred, shaped like these. Those of 16-bit inputs are float32.
template <typename T>
struct JoinGrads {
  Compute<T>* enc;
  Compute<T>* pred;
};

// For each row of the tile: hidden[row of (b, t, u)] = activation(enc[b, t] + pred[b, u]).
//
// hidden (tile rows, D) has one row for each row of the tile. Padding rows of hidden are set to
// zero, whatever the padding of enc and pred contains: a NaN there would pass through a matrix
// product into the gradient of the weight.
template <typename T>
void JoinForwardCpu(const LatticeBatch& batch, const RowTile& tile, const JoinInputs<T>& inputs,
                    int num_threads, T* hidden);

// The same, quantized: hidden (tile rows, D) is round(activation(...) / scale), with a scale for each
// row, scales (tile rows,). The scale of a row with NaN or an infinity is NaN. tanh is computed to
// 3e-4, less than a tenth of what is rounded. D is at most kMaxQuantizedWidth.
constexpr int64_t kMaxQuantizedWidth = 4096;
void JoinQuantizedCpu(const LatticeBatch& batch, const RowTile& tile,
                      const JoinInputs<float>& inputs, int num_threads, int8_t* hidden,
                      float* scales);

// Adds the tile's part of the gradients, g = grad_hidden * activation':
//
//     grads.enc[b, t] += sum_u g(t, u)        grads.pred[b, u] += sum_t g(t, u)
//
// hidden and grad_hidden are (tile rows, D). The order of summation is that of the rows and does
// not depend on the number of threads. `scratch` has JoinBackwardScratchCpu bytes, which may
// contain anything.
int64_t JoinBackwardScratchCpu(const LatticeBatch& batch, const RowTile& tile);
template <typename T>
void JoinBackwardCpu(const LatticeBatch& batch, const RowTile& tile, const JoinInputs<T>& inputs,
                     const T* hidden, const T* grad_hidden, int num_threads, void* scratch,
                     const JoinGrads<T>& grads);

// The same on the device, on `stream`.
template <typename T>
void JoinForwardCuda(const LatticeBatch& batch, const RowTile& tile, const JoinInputs<T>& inputs,
                     void* stream, T* hidden);
int64_t JoinBackwardScratchCuda(const LatticeBatch& batch, const RowTile& tile);
template <typename T>
void JoinBackwardCuda(const LatticeBatch& batch, const RowTile& tile, const JoinInputs<T>& inputs,
                      const T* hidden, const T* grad_hidden, void* stream, void* scratch,
                      const JoinGrads<T>& grads);

}  // namespace transducer
