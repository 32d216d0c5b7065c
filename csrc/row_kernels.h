// SPDX-License-Identifier: Apache-2.0
// The inner loops: one row of V logits, or of D joiner channels. Compiled once per instruction set
// (row_kernels_*.cpp) and chosen at run time, so one binary is fast on every x86-64 and right
// elsewhere.
#pragma once

#include <vector>

#include "half.h"

namespace transducer {

// T is the type in memory (float, double, Half, BFloat16); arithmetic is in C = Compute<T>.
template <typename T>
struct RowKernels {
  using C = Compute<T>;

  // Over finite and -inf x: *max = max_i x_i and *sum = sum_i exp(x_i - *max). A NaN in x makes
  // *sum NaN; so does a maximum that is not finite.
  void (*max_and_sum_exp)(const T* x, int64_t size, C* max, C* sum);

  // *max = max_i x_i and out_i = exp(x_i - *max), float32 subnormals as zero. If x contains NaN,
  // its element of out is NaN and the others are undefined. If the maximum is not finite, all are
  // NaN. out may be x.
  void (*shifted_exp)(const T* x, int64_t size, T* out, C* max);

  // out_i = scale * min(weight * exp(x_i - normalizer), limit), magnitudes below kFlushBelow as
  // zero; weight >= 0, limit = +inf for none. out may be x.
  void (*scaled_softmax)(const T* x, int64_t size, Score normalizer, C weight, C limit, C scale,
                         T* out);

  // out_i = activation(a_i + b_i).
  void (*add_activation)(const T* a, const T* b, int64_t size, Activation activation, T* out);

  // With g_i = grad_i * activation'(a_i + b_i): grad_a_i += g_i, grad_b_i += g_i. `out` is what
  // add_activation wrote; activations whose derivative is a function of their value read only it.
  void (*add_activation_backward)(const T* grad, const T* out, const T* a, const T* b, int64_t size,
                                  Activation activation, C* grad_a, C* grad_b);
};

// A row of logits of a quantized product.
struct QuantizedRow {
  const int32_t* data;
  float scale;
  const float* scales;
  const float* bias;  // or null

  float operator[](int64_t i) const {
    const float product = static_cast<float>(data[i]) * scales[i] * scale;
    return bias != nullptr ? product + bias[i] : product;
  }
  QuantizedRow From(int64_t i) const {
    return {data + i, scale, scales + i, bias != nullptr ? bias + i : nullptr};
  }
};

// The kernels of one instruction set, for every type.
struct RowKernelSet {
  const char* name;  // "avx512", "avx2" or "baseline"
  RowKernels<float> float32;
  RowKernels<double> float64;
  RowKernels<Half> float16;
  RowKernels<BFloat16> bfloat16;

  // x_i = exp(x_i) for x_i up to about 600; 0 below -300, which is the case for most cells.
  void (*posteriors)(Score* x, int64_t size);

  // out_i = round(x_i / scale) with *scale = max_i |x_i| / 127, so out_i is in [-127, 127]. If x
  // contains NaN or an infinity, *scale is NaN and out is undefined.
  void (*quantize)(const float* x, int64_t size, int8_t* out, float* scale);

  // As add_activation, with tanh to 3e-4.
  void (*coarse_add_activation)(const float* a, const float* b, int64_t size, Activation activation,
                                float* out);

  // *sum = sum_i exp(row_i - *shift), to 1e-4, with a shift that makes the sum neither overflow nor
  // vanish. NaN in the row makes the sum NaN; so does a maximum that is not finite, and so may one
  // above 1e9, whose rounding is large.
  void (*shift_and_sum_exp)(const QuantizedRow& row, int64_t size, float* shift, float* sum);

  template <typename T>
  const RowKernels<T>& Of() const;
};

template <>
inline const RowKernels<float>& RowKernelSet::Of<float>() const {
  return float32;
}
template <>
inline const RowKernels<double>& RowKernelSet::Of<double>() const {
  return float64;
}
template <>
inline const RowKernels<Half>& RowKernelSet::Of<Half>() const {
  return float16;
}
template <>
inline const RowKernels<BFloat16>& RowKernelSet::Of<BFloat16>() const {
  return bfloat16;
}

// The set for this processor; the choice is made once.
const RowKernelSet& GetRowKernelSet();

template <typename T>
const RowKernels<T>& GetRowKernels() {
  return GetRowKernelSet().Of<T>();
}

// Every set this processor can run, the slowest first; for tests.
std::vector<const RowKernelSet*> RunnableRowKernelSets();

namespace baseline {
const RowKernelSet& Kernels();
}
namespace avx2 {
const RowKernelSet& Kernels();
}
namespace avx512 {
const RowKernelSet& Kernels();
}

}  // namespace transducer
