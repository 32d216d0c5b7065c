// SPDX-License-Identifier: Apache-2.0
// 16-bit floating point for storage; arithmetic on it is float32.
#pragma once

#include <cstring>

#include "common.h"

namespace transducer {

struct Half {  // IEEE 754 binary16
  uint16_t bits;
};

struct BFloat16 {  // the upper half of a float32
  uint16_t bits;
};

// The type of arithmetic on T.
template <typename T>
struct ComputeOf {
  using Type = T;
};
template <>
struct ComputeOf<Half> {
  using Type = float;
};
template <>
struct ComputeOf<BFloat16> {
  using Type = float;
};
template <typename T>
using Compute = typename ComputeOf<T>::Type;

TRANSDUCER_HD inline float FloatFromBits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}

TRANSDUCER_HD inline uint32_t BitsOfFloat(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  return bits;
}

TRANSDUCER_HD inline float ToCompute(float x) { return x; }
TRANSDUCER_HD inline double ToCompute(double x) { return x; }
TRANSDUCER_HD inline float ToCompute(BFloat16 x) { return FloatFromBits(uint32_t{x.bits} << 16); }
TRANSDUCER_HD inline float ToCompute(Half x) {
#ifdef __CUDA_ARCH__
  float value;  // exact
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(x.bits));
  return value;
#else
  const uint32_t sign = uint32_t{x.bits & 0x8000u} << 16;
  const uint32_t magnitude = x.bits & 0x7fffu;
  // Exponent bias 15 -> 127; infinity and NaN (31) -> 255. Subnormals are converted from an
  // integer: a processor that flushes float32 subnormals would make them zero.
  const uint32_t normal = (magnitude << 13) + ((magnitude >= 0x7c00u ? 224u : 112u) << 23);
  const uint32_t subnormal = BitsOfFloat(static_cast<float>(magnitude) * 0x1p-24f);
  return FloatFromBits((magnitude < 0x400u ? subnormal : normal) | sign);
#endif
}

// Rounds to nearest, ties to even; NaN stays NaN, too large becomes infinity.
template <typename T>
TRANSDUCER_HD inline T FromCompute(Compute<T> x);

template <>
TRANSDUCER_HD inline float FromCompute<float>(float x) {
  return x;
}
template <>
TRANSDUCER_HD inline double FromCompute<double>(double x) {
  return x;
}
template <>
TRANSDUCER_HD inline BFloat16 FromCompute<BFloat16>(float x) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  uint16_t rounded;  // equal to the code below except for the bits of NaN
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(rounded) : "f"(x));
  return {rounded};
#else
  const uint32_t bits = BitsOfFloat(x);
  const uint32_t rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  return {static_cast<uint16_t>((x != x ? bits | 0x400000u : rounded) >> 16)};
#endif
}
template <>
TRANSDUCER_HD inline Half FromCompute<Half>(float x) {
#ifdef __CUDA_ARCH__
  uint16_t rounded;  // equal to the code below except for the bits of NaN
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(rounded) : "f"(x));
  return {rounded};
#else
  const uint32_t bits = BitsOfFloat(x);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  uint32_t result;
  if (magnitude > 0x7f800000u) {
    result = 0x7e00u;  // NaN
  } else if (magnitude >= 0x477ff000u) {
    result = 0x7c00u;  // 65520 and above round to infinity
  } else if (magnitude < 0x38800000u) {
    // Below 2^-14: adding 0.5 puts the subnormal's last bit at the last bit of a float32 mantissa.
    result = BitsOfFloat(FloatFromBits(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    result = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - (112u << 23)) >> 13;
  }
  return {static_cast<uint16_t>(result | sign)};
#endif
}

// Gradients of smaller magnitude are written as zero. float32 and bfloat16 subnormals do not matter
// and slow down every later matrix product; float16 needs its subnormals for small gradients.
template <typename T>
constexpr Compute<T> kFlushBelow = std::numeric_limits<Compute<T>>::min();

// For explicit instantiation: the element types of logits-like tensors.
#define TRANSDUCER_FOR_EACH_DTYPE(macro) macro(float) macro(double) macro(Half) macro(BFloat16)

}  // namespace transducer
