// SPDX-License-Identifier: Apache-2.0
// The joiner's input: one row of D channels per lattice cell, without a padded (B, T, U + 1, D)
// tensor; and the way back, as segmented sums.
#pragma once

#include "half.h"
#include "lattice_batch.h"

namespace transducer {

// For each row of the tile: hidden[row of (b, t, u)] = activation(enc[b, t] + pred[b, u]).
//
// enc is (B, max_frames, D), pred is (B, max_targets + 1, D), both contiguous; hidden has one row
// for each row of the tile. Padding rows of hidden are set to zero, whatever stands in the padding
// of enc and pred: a NaN there would pass through a matrix product into the gradient of the weight.
template <typename T>
void JoinForwardCpu(const LatticeBatch& batch, const RowTile& tile, const T* enc, const T* pred,
                    int64_t width, Activation activation, int num_threads, T* hidden);

// Adds the tile's part of the gradients, g = grad_hidden * activation':
//
//     grad_enc[b, t] += sum_u g(t, u)        grad_pred[b, u] += sum_t g(t, u)
//
// Sums of 16-bit gradients are made, and handed out, in float32. The order of summation is that of
// the rows and does not depend on the number of threads.
template <typename T>
void JoinBackwardCpu(const LatticeBatch& batch, const RowTile& tile, const T* grad_hidden,
                     const T* hidden, const T* enc, const T* pred, int64_t width,
                     Activation activation, int num_threads, Compute<T>* grad_enc,
                     Compute<T>* grad_pred);

// The same on the device, on `stream`. Backward of a tile that lists its rows wants scratch of
// JoinBackwardScratchCuda numbers, which may hold anything.
int64_t JoinBackwardScratchCuda(const LatticeBatch& batch, const RowTile& tile);
template <typename T>
void JoinForwardCuda(const LatticeBatch& batch, const RowTile& tile, const T* enc, const T* pred,
                     int64_t width, Activation activation, void* stream, T* hidden);
template <typename T>
void JoinBackwardCuda(const LatticeBatch& batch, const RowTile& tile, const T* grad_hidden,
                      const T* hidden, const T* enc, const T* pred, int64_t width,
                      Activation activation, void* stream, int32_t* scratch, Compute<T>* grad_enc,
                      Compute<T>* grad_pred);

}  // namespace transducer
