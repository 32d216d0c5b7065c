// SPDX-License-Identifier: Apache-2.0
// The inner loops: one row of V logits, or of D joiner channels. Compiled once per instruction set
// (row_kernels_*.cpp) and chosen at run time, so one binary is fast on every x86-64 and right
// elsewhere.
#pragma once

#include "common.h"

namespace transducer {

template <typename T>
struct RowKernels {
  // Over finite and -inf x: *max = max_i x_i and *sum = sum_i exp(x_i - *max). A NaN in x makes
  // *sum NaN; +inf makes *max +inf; all -inf makes *max -inf.
  void (*max_and_sum_exp)(const T* x, int64_t size, T* max, T* sum);

  // out_i = scale * min(weight * exp(x_i - normaliser), limit), subnormal results as zero;
  // weight >= 0, limit = +inf for none. out may be x.
  void (*scaled_softmax)(const T* x, int64_t size, Score normaliser, T weight, T limit, T scale,
                         T* out);

  // out_i = activation(a_i + b_i).
  void (*add_activation)(const T* a, const T* b, int64_t size, Activation activation, T* out);

  // With g_i = grad_i * activation'(a_i + b_i): grad_a_i += g_i, grad_b_i += g_i. `out` is what
  // add_activation wrote; activations whose derivative is a function of their value read only it.
  void (*add_activation_backward)(const T* grad, const T* out, const T* a, const T* b,
                                  int64_t size, Activation activation, T* grad_a, T* grad_b);
};

// The table for this processor; the choice is made once.
template <typename T>
const RowKernels<T>& GetRowKernels();

// "avx512", "avx2" or "baseline".
const char* RowKernelsName();

namespace baseline {
const RowKernels<float>& Float();
const RowKernels<double>& Double();
}  // namespace baseline
namespace avx2 {
const RowKernels<float>& Float();
const RowKernels<double>& Double();
}  // namespace avx2
namespace avx512 {
const RowKernels<float>& Float();
const RowKernels<double>& Double();
}  // namespace avx512

}  // namespace transducer
