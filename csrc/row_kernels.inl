// SPDX-License-Identifier: Apache-2.0
// Body of row_kernels_{baseline,avx2,avx512}.cpp, which define TRANSDUCER_ISA (a namespace) and
// TRANSDUCER_VECTOR_BYTES. Everything here has internal linkage: a template shared between
// translation units of different instruction sets would be merged by the linker into whichever
// came first, and crash on the older processor.
//
// Written with the compilers' vector extension (GCC, Clang) rather than intrinsics: one source for
// 4, 8 and 16 lanes. Comparisons are written so that NaN falls through to the arithmetic.
#include <cstring>
#include <limits>
#include <type_traits>

#include "row_kernels.h"

namespace transducer {
namespace TRANSDUCER_ISA {
namespace {

template <typename T>
struct Simd;

template <>
struct Simd<float> {
  typedef float V __attribute__((vector_size(TRANSDUCER_VECTOR_BYTES)));
  typedef int32_t I __attribute__((vector_size(TRANSDUCER_VECTOR_BYTES)));
  static constexpr int64_t kLanes = TRANSDUCER_VECTOR_BYTES / sizeof(float);

  // exp(x) to 1 ulp for x in [-87.3, 88.7]; 0 below, where the result would be subnormal.
  // Cody-Waite reduction x = n ln2 + r, |r| <= ln2 / 2, and a polynomial of degree 6 (minimax, from
  // Cephes expf by S. Moshier).
  static inline V Exp(V x) {
    constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
    const V low = V{} - 87.3365447f, high = V{} + 88.7228394f;
    const I underflow = x < low;
    x = x > high ? high : x;
    const V shifted = x * 1.44269504088896341f + kRound;
    const V n = shifted - kRound;
    V r = x - n * 0.693359375f;
    r = r - n * -2.12194440e-4f;
    V p = V{} + 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    // 2^n through the exponent bits; n = 128 (x near 88.7) is done as 2^127 * 2.
    const I n_int = (I)shifted - (I)(V{} + kRound);
    const I half = n_int >> 1;
    const V scale_a = (V)((half + 127) << 23);
    const V scale_b = (V)((n_int - half + 127) << 23);
    const V y = p * scale_a * scale_b;
    return underflow ? V{} : y;
  }

  // tanh(x) to 2 ulp: an odd polynomial (Cephes tanhf) below 0.625, 1 - 2 / (exp(2|x|) + 1) above.
  static inline V Tanh(V x) {
    const I sign = (I)x & std::numeric_limits<int32_t>::min();
    const V a = (V)((I)x ^ sign);
    const V s = x * x;
    V p = V{} - 5.70498872745e-3f;
    p = p * s + 2.06390887954e-2f;
    p = p * s - 5.37397155531e-2f;
    p = p * s + 1.33314422036e-1f;
    p = p * s - 3.33332819422e-1f;
    const V small = p * s * x + x;
    const V limit = V{} + 20.0f;
    const V capped = a > limit ? limit : a;
    const V large = 1.0f - 2.0f / (Exp(capped + capped) + 1.0f);
    return a < 0.625f ? small : (V)((I)large | sign);
  }
};

template <>
struct Simd<double> {
  typedef double V __attribute__((vector_size(TRANSDUCER_VECTOR_BYTES)));
  typedef int64_t I __attribute__((vector_size(TRANSDUCER_VECTOR_BYTES)));
  static constexpr int64_t kLanes = TRANSDUCER_VECTOR_BYTES / sizeof(double);

  // float64 is for checking, not for training: the C library's last bit, lane by lane.
  static inline V Exp(V x) {
    for (int64_t i = 0; i < kLanes; ++i) x[i] = std::exp(x[i]);
    return x;
  }
  static inline V Tanh(V x) {
    for (int64_t i = 0; i < kLanes; ++i) x[i] = std::tanh(x[i]);
    return x;
  }
};

template <typename T>
using Vec = typename Simd<T>::V;

template <typename T>
inline Vec<T> Load(const T* p) {
  Vec<T> v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

template <typename T>
inline void Store(T* p, Vec<T> v) {
  std::memcpy(p, &v, sizeof(v));
}

// The first `count` lanes from p, the others `fill`.
template <typename T>
inline Vec<T> LoadPart(const T* p, int64_t count, T fill) {
  Vec<T> v = Vec<T>{} + fill;
  for (int64_t i = 0; i < count; ++i) v[i] = p[i];
  return v;
}

template <typename T>
inline void StorePart(T* p, int64_t count, Vec<T> v) {
  for (int64_t i = 0; i < count; ++i) p[i] = v[i];
}

template <typename T>
inline Vec<T> Max(Vec<T> a, Vec<T> b) {
  return a > b ? a : b;
}

template <typename T>
void MaxAndSumExp(const T* x, int64_t size, T* max, T* sum) {
  constexpr int64_t kLanes = Simd<T>::kLanes;
  constexpr T kLowest = -std::numeric_limits<T>::infinity();
  const int64_t whole = size - size % kLanes;
  const Vec<T> tail = LoadPart(x + whole, size - whole, kLowest);

  Vec<T> max_a = tail, max_b = Vec<T>{} + kLowest;
  int64_t i = 0;
  for (; i + 2 * kLanes <= whole; i += 2 * kLanes) {
    max_a = Max<T>(Load(x + i), max_a);
    max_b = Max<T>(Load(x + i + kLanes), max_b);
  }
  if (i < whole) max_a = Max<T>(Load(x + i), max_a);
  max_a = Max<T>(max_a, max_b);
  T top = kLowest;
  for (int64_t lane = 0; lane < kLanes; ++lane) top = max_a[lane] > top ? max_a[lane] : top;
  *max = top;
  // With nothing finite to subtract there is no sum; NaN in x must still be seen below.
  if (top == kLowest || top == std::numeric_limits<T>::infinity()) {
    *sum = std::numeric_limits<T>::quiet_NaN();
    return;
  }

  Vec<T> total = Simd<T>::Exp(tail - top);
  for (i = 0; i < whole; i += kLanes) total = total + Simd<T>::Exp(Load(x + i) - top);
  T result = 0;
  for (int64_t lane = 0; lane < kLanes; ++lane) result += total[lane];
  *sum = result;
}

template <typename T>
void ScaledSoftmax(const T* x, int64_t size, Score normaliser, T weight, T limit, T scale, T* out) {
  constexpr int64_t kLanes = Simd<T>::kLanes;
  // normaliser = high + low: x - high is exact where the softmax matters (x close to it), so a
  // large normaliser does not cost the gradient its last digits.
  const T high = static_cast<T>(normaliser);
  const T low = static_cast<T>(normaliser - static_cast<Score>(high));
  const auto gradient = [=](Vec<T> v) {
    v = weight * Simd<T>::Exp((v - high) - low);
    v = v > limit ? Vec<T>{} + limit : v;
    v = scale * v;
    constexpr T kTiny = std::numeric_limits<T>::min();
    return (v < kTiny) & (v > -kTiny) ? Vec<T>{} : v;
  };
  const int64_t whole = size - size % kLanes;
  for (int64_t i = 0; i < whole; i += kLanes) Store(out + i, gradient(Load(x + i)));
  StorePart(out + whole, size - whole, gradient(LoadPart(x + whole, size - whole, T(0))));
}

template <typename T>
inline Vec<T> Erf(Vec<T> x) {
  for (int64_t i = 0; i < Simd<T>::kLanes; ++i) x[i] = std::erf(x[i]);
  return x;
}

template <typename T>
inline Vec<T> Sigmoid(Vec<T> x) {
  // exp of minus the magnitude never overflows: 1 / (1 + e) for x >= 0, e / (1 + e) below.
  const Vec<T> e = Simd<T>::Exp(x > T(0) ? -x : x);
  return (x > T(0) ? Vec<T>{} + T(1) : e) / (T(1) + e);
}

constexpr double kInvSqrt2 = 0.70710678118654752440;
constexpr double kInvSqrt2Pi = 0.39894228040143267794;

template <typename T, Activation A>
inline Vec<T> Apply(Vec<T> x) {
  if constexpr (A == Activation::kTanh) return Simd<T>::Tanh(x);
  if constexpr (A == Activation::kRelu) return x < T(0) ? Vec<T>{} : x;  // NaN stays
  if constexpr (A == Activation::kGelu) {
    return x * T(0.5) * (T(1) + Erf<T>(x * static_cast<T>(kInvSqrt2)));
  }
  if constexpr (A == Activation::kSilu) return x * Sigmoid<T>(x);
  return x;
}

// d activation / d x from y = activation(x), or from x where y does not determine it.
template <typename T, Activation A>
inline Vec<T> Derivative(Vec<T> x, Vec<T> y) {
  if constexpr (A == Activation::kTanh) return T(1) - y * y;
  if constexpr (A == Activation::kRelu) return y > T(0) ? Vec<T>{} + T(1) : Vec<T>{};
  if constexpr (A == Activation::kGelu) {
    const Vec<T> cdf = T(0.5) * (T(1) + Erf<T>(x * static_cast<T>(kInvSqrt2)));
    return cdf + x * Simd<T>::Exp(T(-0.5) * x * x) * static_cast<T>(kInvSqrt2Pi);
  }
  if constexpr (A == Activation::kSilu) {
    const Vec<T> s = Sigmoid<T>(x);
    return s * (T(1) + x * (T(1) - s));
  }
  return Vec<T>{} + T(1);
}

template <typename T, Activation A>
void AddActivationOf(const T* a, const T* b, int64_t size, T* out) {
  constexpr int64_t kLanes = Simd<T>::kLanes;
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) Store(out + i, Apply<T, A>(Load(a + i) + Load(b + i)));
  const int64_t rest = size - i;
  StorePart(out + i, rest,
            Apply<T, A>(LoadPart(a + i, rest, T(0)) + LoadPart(b + i, rest, T(0))));
}

template <typename T, Activation A>
void AddActivationBackwardOf(const T* grad, const T* out, const T* a, const T* b, int64_t size,
                             T* grad_a, T* grad_b) {
  constexpr int64_t kLanes = Simd<T>::kLanes;
  constexpr bool kNeedsInput = A == Activation::kGelu || A == Activation::kSilu;
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) {
    const Vec<T> x = kNeedsInput ? Load(a + i) + Load(b + i) : Vec<T>{};
    const Vec<T> g = Load(grad + i) * Derivative<T, A>(x, Load(out + i));
    Store(grad_a + i, Load(grad_a + i) + g);
    Store(grad_b + i, Load(grad_b + i) + g);
  }
  const int64_t rest = size - i;
  const auto part = [=](const T* p) { return LoadPart(p + i, rest, T(0)); };
  const Vec<T> x = kNeedsInput ? part(a) + part(b) : Vec<T>{};
  const Vec<T> g = part(grad) * Derivative<T, A>(x, part(out));
  StorePart(grad_a + i, rest, part(grad_a) + g);
  StorePart(grad_b + i, rest, part(grad_b) + g);
}

// Calls f with the activation as a compile-time constant.
template <typename F>
void Dispatch(Activation activation, F f) {
  switch (activation) {
    case Activation::kIdentity: return f(std::integral_constant<Activation, Activation::kIdentity>());
    case Activation::kTanh: return f(std::integral_constant<Activation, Activation::kTanh>());
    case Activation::kRelu: return f(std::integral_constant<Activation, Activation::kRelu>());
    case Activation::kGelu: return f(std::integral_constant<Activation, Activation::kGelu>());
    case Activation::kSilu: return f(std::integral_constant<Activation, Activation::kSilu>());
  }
}

template <typename T>
void AddActivation(const T* a, const T* b, int64_t size, Activation activation, T* out) {
  Dispatch(activation, [&](auto tag) { AddActivationOf<T, decltype(tag)::value>(a, b, size, out); });
}

template <typename T>
void AddActivationBackward(const T* grad, const T* out, const T* a, const T* b, int64_t size,
                           Activation activation, T* grad_a, T* grad_b) {
  Dispatch(activation, [&](auto tag) {
    AddActivationBackwardOf<T, decltype(tag)::value>(grad, out, a, b, size, grad_a, grad_b);
  });
}

template <typename T>
constexpr RowKernels<T> kTable{MaxAndSumExp<T>, ScaledSoftmax<T>, AddActivation<T>,
                               AddActivationBackward<T>};

}  // namespace

const RowKernels<float>& Float() { return kTable<float>; }
const RowKernels<double>& Double() { return kTable<double>; }

}  // namespace TRANSDUCER_ISA
}  // namespace transducer
