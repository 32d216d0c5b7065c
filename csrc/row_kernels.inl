// SPDX-License-Identifier: Apache-2.0
// Body of row_kernels_{baseline,avx2,avx512}.cpp, which define TRANSDUCER_ISA (a namespace) and
// TRANSDUCER_VECTOR_BYTES. Everything here has internal linkage: a template shared between
// translation units of different instruction sets would be merged by the linker, and could crash on
// an older processor.
//
// Written with the compilers' vector extension (GCC, Clang) rather than intrinsics: one source for
// 4, 8 and 16 lanes. Comparisons are written so that NaN falls through to the arithmetic.
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#include "row_kernels.h"

#if TRANSDUCER_VECTOR_BYTES > 16
#include <immintrin.h>  // conversions, and reciprocals that are nearly right
#endif

#ifdef __has_builtin  // GCC from 10 on; GCC has the shuffle from 12 on
#define TRANSDUCER_HAS_SHUFFLE __has_builtin(__builtin_shufflevector)
#else
#define TRANSDUCER_HAS_SHUFFLE 0
#endif

#define TRANSDUCER_QUOTE_(x) #x
#define TRANSDUCER_QUOTE(x) TRANSDUCER_QUOTE_(x)
#define TRANSDUCER_ISA_NAME TRANSDUCER_QUOTE(TRANSDUCER_ISA)

namespace transducer {
namespace TRANSDUCER_ISA {
namespace {

template <typename T>
struct Simd;

template <>
struct Simd<float> {
  typedef float V __attribute__((vector_size(TRANSDUCER_VECTOR_BYTES)));
  typedef int32_t I __attribute__((vector_size(TRANSDUCER_VECTOR_BYTES)));
  typedef uint32_t U __attribute__((vector_size(TRANSDUCER_VECTOR_BYTES)));  // may overflow
  static constexpr int64_t kLanes = TRANSDUCER_VECTOR_BYTES / sizeof(float);

  // exp(x) = 2^n * (1 + expm1).
  struct Exponent {
    I n;
    V expm1;
  };

  // Cody-Waite reduction x = n ln2 + r, |r| <= ln2 / 2, and a polynomial of degree 6 (minimax, from
  // Cephes expf by S. Moshier).
  static inline Exponent Reduce(V x) {
    constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
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
    return {(I)((U)shifted - (U)(V{} + kRound)), p * (r * r) + r};
  }

  // exp(x) to 1 ulp for x in [-87.3, 88.7]; 0 below, where the result would be subnormal.
  static inline V Exp(V x) {
    const V low = V{} - 87.3365447f, high = V{} + 88.7228394f;
    const I underflow = x < low;
    const Exponent e = Reduce(x > high ? high : x);
    // 2^n through the exponent bits; n = 128 (x near 88.7) is done as 2^127 * 2.
    const I half = e.n >> 1;
    const V scale_a = (V)(((U)half + 127) << 23);
    const V scale_b = (V)(((U)e.n - (U)half + 127) << 23);
    const V y = (e.expm1 + 1.0f) * scale_a * scale_b;
    return underflow ? V{} : y;
  }

  // The same for x <= 0.
  static inline V ExpDown(V x) {
    const I underflow = x < V{} - 87.3365447f;
    const Exponent e = Reduce(x);
    const V y = (e.expm1 + 1.0f) * (V)(((U)e.n + 127) << 23);
    return underflow ? V{} : y;
  }

  // tanh(x) = e / (e + 2) with e = exp(2|x|) - 1, to 3 ulp: one path for large and small.
  static inline V Tanh(V x) {
    const I sign = (I)x & std::numeric_limits<int32_t>::min();
    const V a = (V)((I)x ^ sign), limit = V{} + 10.0f;
    const V capped = a > limit ? limit : a;
    const Exponent e = Reduce(capped + capped);
    const V scale = (V)(((U)e.n + 127) << 23);
    const V expm1 = scale * e.expm1 + (scale - 1.0f);
    return (V)((I)(expm1 / (expm1 + 2.0f)) | sign);
  }

  // 1 / x to 1e-4, for normal x.
  static inline V CoarseReciprocal(V x) {
#if TRANSDUCER_VECTOR_BYTES == 64
    return (V)_mm512_maskz_rcp14_ps(0xffff, (__m512)x);
#elif TRANSDUCER_VECTOR_BYTES == 32
    const V guess = (V)_mm256_rcp_ps((__m256)x);  // to 4e-4; one step of Newton's method
    return guess * (2.0f - x * guess);
#else
    return 1.0f / x;
#endif
  }

  // tanh(x) to 3e-4, for rows that are quantized. NaN stays.
  static inline V CoarseTanh(V x) {
    const V limit = V{} + 4.5f;
    x = x > limit ? limit : x;
    x = x < -limit ? -limit : x;
    const V s = x * x;
    const V p = (7.202200e-4f * s + 0.10395823f) * s + 1.0f;  // fitted to 3e-5 up to the limit
    const V q = (1.329952e-2f * s + 0.43713187f) * s + 1.0f;
    return x * p * CoarseReciprocal(q);
  }
  // 2^x to 1e-4 for x in [-126, 127]; at most 2^-125 below, and at least 2^126 or NaN above.
  static inline V CoarseExp2(V x) {
#if TRANSDUCER_VECTOR_BYTES == 64
    const V f = (V)_mm512_maskz_reduce_ps(0xffff, (__m512)x, 1);  // x - floor(x)
    const V p = ((7.80245e-2f * f + 0.226067155f) * f + 0.695833541f) * f + 0.99992522f;
    return (V)_mm512_maskz_scalef_ps(0xffff, (__m512)p, (__m512)x);
#else
    constexpr float kRound = 12582912.0f;
    const V low = V{} - 126.0f, high = V{} + 127.0f;
    x = x < low ? low : x;
    x = x > high ? high : x;
    const V shifted = x + kRound;
    const V f = x - (shifted - kRound);
    const V p = ((5.50089246e-2f * f + 0.242210962f) * f + 0.693282928f) * f + 1.0f;
    return p * (V)(((U)shifted << 23) + (127u << 23));
#endif
  }

  // The normal distribution's Phi(x) to 1e-7, far below zero too: with a = |x| / sqrt(2) and
  // t = 1 / (1 + a / 2), erfc(a) = t * exp(p(t - 1) - a^2), p fitted at Chebyshev nodes to a = 9.4.
  static inline V NormalCdf(V x) {
    const V limit = V{} + 20.0f;
    V a = (V)((I)x & std::numeric_limits<int32_t>::max()) * 0.707106781186547524f;
    a = a > limit ? limit : a;
    const V t = 1.0f / (0.5f * a + 1.0f);
    const V s = -0.5f * a * t;
    V p = V{} - 0.1546950224f;
    p = p * s - 0.4984303867f;
    p = p * s - 0.5136698838f;
    p = p * s - 0.1853467690f;
    p = p * s - 0.1463818663f;
    p = p * s - 0.07246005605f;
    p = p * s + 0.1913700416f;
    p = p * s - 0.1615466626f;
    p = p * s - 0.3032398563f;
    p = p * s + 1.256758325f;
    const V half = 0.5f * t * ExpDown(p * s - a * a);
    return x > 0.0f ? 1.0f - half : half;
  }
};

template <>
struct Simd<double> {
  typedef double V __attribute__((vector_size(TRANSDUCER_VECTOR_BYTES)));
  typedef int64_t I __attribute__((vector_size(TRANSDUCER_VECTOR_BYTES)));
  typedef uint64_t U __attribute__((vector_size(TRANSDUCER_VECTOR_BYTES)));
  static constexpr int64_t kLanes = TRANSDUCER_VECTOR_BYTES / sizeof(double);

  // float64 is for checks, not for training: the C library is called for each lane.
  static inline V Exp(V x) {
    for (int64_t i = 0; i < kLanes; ++i) x[i] = std::exp(x[i]);
    return x;
  }
  static inline V ExpDown(V x) { return Exp(x); }
  static inline V Tanh(V x) {
    for (int64_t i = 0; i < kLanes; ++i) x[i] = std::tanh(x[i]);
    return x;
  }
  static inline V NormalCdf(V x) {
    for (int64_t i = 0; i < kLanes; ++i) x[i] = 0.5 * std::erfc(x[i] * -0.70710678118654752440);
    return x;
  }
};

// A vector of Compute<T>, float or double.
template <typename T>
using Vec = typename Simd<Compute<T>>::V;

// --- memory to vector and back, whole and in part ------------------------------------------------

typedef uint16_t Bits16 __attribute__((vector_size(TRANSDUCER_VECTOR_BYTES / 2)));
typedef uint32_t Bits32 __attribute__((vector_size(TRANSDUCER_VECTOR_BYTES)));

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

inline Vec<float> Load(const BFloat16* p) {
  Bits16 bits;
  std::memcpy(&bits, p, sizeof(bits));
  return (Vec<float>)(__builtin_convertvector(bits, Bits32) << 16);
}

template <>
inline void Store<BFloat16>(BFloat16* p, Vec<float> v) {
  const Bits32 bits = (Bits32)v;
  const Bits32 rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  const Bits32 result = (v != v ? bits | 0x400000u : rounded) >> 16;
  const Bits16 narrow = __builtin_convertvector(result, Bits16);
  std::memcpy(p, &narrow, sizeof(narrow));
}

inline Vec<float> Load(const Half* p) {
#if TRANSDUCER_VECTOR_BYTES == 64
  // The masked forms: the plain ones of GCC 12 warn about an undefined source of their own.
  return (Vec<float>)_mm512_maskz_cvtph_ps(0xffff,
                                           _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif TRANSDUCER_VECTOR_BYTES == 32
  return (Vec<float>)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  Vec<float> v;
  for (int64_t i = 0; i < Simd<float>::kLanes; ++i) v[i] = ToCompute(p[i]);
  return v;
#endif
}

template <>
inline void Store<Half>(Half* p, Vec<float> v) {
#if TRANSDUCER_VECTOR_BYTES == 64
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_maskz_cvtps_ph(0xffff, (__m512)v, _MM_FROUND_TO_NEAREST_INT));
#elif TRANSDUCER_VECTOR_BYTES == 32
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int64_t i = 0; i < Simd<float>::kLanes; ++i) p[i] = FromCompute<Half>(v[i]);
#endif
}

// The first `count` lanes from p, the others `fill`.
template <typename T>
inline Vec<T> LoadPart(const T* p, int64_t count, Compute<T> fill) {
  Vec<T> v = Vec<T>{} + fill;
  for (int64_t i = 0; i < count; ++i) v[i] = ToCompute(p[i]);
  return v;
}

template <typename T>
inline void StorePart(T* p, int64_t count, Vec<T> v) {
  for (int64_t i = 0; i < count; ++i) p[i] = FromCompute<T>(v[i]);
}

// --- the kernels ---------------------------------------------------------------------------------

template <typename T>
inline Vec<T> Max(Vec<T> a, Vec<T> b) {
  return a > b ? a : b;
}

// Combines the lanes of a vector, halves with halves: a loop over them would wait for each step.
template <size_t kDistance, typename V, typename F, size_t... kLane>
inline auto Fold(V v, F f, std::index_sequence<kLane...> lanes) {
  if constexpr (kDistance == 0) {
    return v[0];
  } else {
#if TRANSDUCER_HAS_SHUFFLE
    const V moved = __builtin_shufflevector(v, v, ((kLane + kDistance) % sizeof...(kLane))...);
#else
    V moved = v;
    for (size_t i = 0; i < kDistance; ++i) moved[i] = v[i + kDistance];
#endif
    return Fold<kDistance / 2>(f(v, moved), f, lanes);
  }
}

template <typename V>
inline auto LargestLane(V v) {
  constexpr size_t kLanes = sizeof(v) / sizeof(v[0]);
  return Fold<kLanes / 2>(
      v, [](V a, V b) { return a > b ? a : b; }, std::make_index_sequence<kLanes>());
}

template <typename V>
inline auto SumOfLanes(V v) {
  constexpr size_t kLanes = sizeof(v) / sizeof(v[0]);
  return Fold<kLanes / 2>(v, [](V a, V b) { return a + b; }, std::make_index_sequence<kLanes>());
}

// The maximum of x; `tail` is its last, incomplete vector. Undefined if x contains NaN.
template <typename T>
inline Compute<T> MaxOf(const T* x, int64_t whole, Vec<T> tail) {
  using C = Compute<T>;
  constexpr int64_t kLanes = Simd<C>::kLanes;
  constexpr C kLowest = -std::numeric_limits<C>::infinity();
  Vec<T> max_a = tail, max_b = Vec<T>{} + kLowest;
  int64_t i = 0;
  for (; i + 2 * kLanes <= whole; i += 2 * kLanes) {
    max_a = Max<T>(Load(x + i), max_a);
    max_b = Max<T>(Load(x + i + kLanes), max_b);
  }
  if (i < whole) max_a = Max<T>(Load(x + i), max_a);
  return LargestLane(Max<T>(max_a, max_b));
}

template <typename T>
void MaxAndSumExp(const T* x, int64_t size, Compute<T>* max, Compute<T>* sum) {
  using C = Compute<T>;
  constexpr int64_t kLanes = Simd<C>::kLanes;
  const int64_t whole = size - size % kLanes;
  const Vec<T> tail = LoadPart(x + whole, size - whole, -std::numeric_limits<C>::infinity());
  const C top = *max = MaxOf(x, whole, tail);
  // Without a finite maximum there is no sum; a NaN in x must still be noticed below.
  if (std::isinf(top)) {
    *sum = std::numeric_limits<C>::quiet_NaN();
    return;
  }
  Vec<T> total = Simd<C>::ExpDown(tail - top);
  for (int64_t i = 0; i < whole; i += kLanes) {
    total = total + Simd<C>::ExpDown(Load(x + i) - top);
  }
  C result = 0;  // lane by lane, so that trainings give the weights that were published
  for (int64_t lane = 0; lane < kLanes; ++lane) result += total[lane];
  *sum = result;
}

template <typename T>
void ShiftedExp(const T* x, int64_t size, T* out, Compute<T>* max) {
  using C = Compute<T>;
  constexpr int64_t kLanes = Simd<C>::kLanes;
  const int64_t whole = size - size % kLanes;
  const Vec<T> tail = LoadPart(x + whole, size - whole, -std::numeric_limits<C>::infinity());
  *max = MaxOf(x, whole, tail);
  const C top = std::isinf(*max) ? std::numeric_limits<C>::quiet_NaN() : *max;
  for (int64_t i = 0; i < whole; i += kLanes) {
    Store<T>(out + i, Simd<C>::ExpDown(Load(x + i) - top));
  }
  StorePart<T>(out + whole, size - whole, Simd<C>::ExpDown(tail - top));
}

template <typename T>
void ScaledSoftmax(const T* x, int64_t size, Score normalizer, Compute<T> weight, Compute<T> limit,
                   Compute<T> scale, T* out) {
  using C = Compute<T>;
  constexpr int64_t kLanes = Simd<C>::kLanes;
  // normalizer = high + low: x - high is exact where the softmax matters (x close to it), so a
  // large normalizer does not cost the gradient its last digits.
  const C high = static_cast<C>(normalizer);
  const C low = static_cast<C>(normalizer - static_cast<Score>(high));
  const auto gradient = [=](Vec<T> v) {
    v = weight * Simd<C>::Exp((v - high) - low);
    v = v > limit ? Vec<T>{} + limit : v;
    v = scale * v;
    constexpr C kBelow = kFlushBelow<T>;
    return ((v < kBelow) & (v > -kBelow)) ? Vec<T>{} : v;
  };
  const int64_t whole = size - size % kLanes;
  for (int64_t i = 0; i < whole; i += kLanes) Store<T>(out + i, gradient(Load(x + i)));
  StorePart<T>(out + whole, size - whole, gradient(LoadPart(x + whole, size - whole, C(0))));
}

template <typename C>
inline Vec<C> Sigmoid(Vec<C> x) {
  // exp of minus the magnitude never overflows: 1 / (1 + e) for x >= 0, e / (1 + e) below.
  const Vec<C> e = Simd<C>::Exp(x > C(0) ? -x : x);
  return (x > C(0) ? Vec<C>{} + C(1) : e) / (C(1) + e);
}

constexpr double kInvSqrt2Pi = 0.39894228040143267794;

template <typename C, Activation A, bool kIsCoarse>
inline Vec<C> Apply(Vec<C> x) {
  if constexpr (A == Activation::kTanh && kIsCoarse) return Simd<C>::CoarseTanh(x);
  if constexpr (A == Activation::kTanh) return Simd<C>::Tanh(x);
  if constexpr (A == Activation::kRelu) return x < C(0) ? Vec<C>{} : x;  // NaN stays
  if constexpr (A == Activation::kGelu) {
    return x * Simd<C>::NormalCdf(x);
  }
  if constexpr (A == Activation::kSilu) return x * Sigmoid<C>(x);
  return x;
}

// d activation / d x from y = activation(x), or from x where y does not determine it.
template <typename C, Activation A>
inline Vec<C> Derivative(Vec<C> x, Vec<C> y) {
  if constexpr (A == Activation::kTanh) return C(1) - y * y;
  if constexpr (A == Activation::kRelu) return y > C(0) ? Vec<C>{} + C(1) : Vec<C>{};
  if constexpr (A == Activation::kGelu) {
    return Simd<C>::NormalCdf(x) + x * Simd<C>::Exp(C(-0.5) * x * x) * static_cast<C>(kInvSqrt2Pi);
  }
  if constexpr (A == Activation::kSilu) {
    const Vec<C> s = Sigmoid<C>(x);
    return s * (C(1) + x * (C(1) - s));
  }
  return Vec<C>{} + C(1);
}

template <typename T, Activation A, bool kIsCoarse>
void AddActivationOf(const T* a, const T* b, int64_t size, T* out) {
  using C = Compute<T>;
  constexpr int64_t kLanes = Simd<C>::kLanes;
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) {
    Store<T>(out + i, Apply<C, A, kIsCoarse>(Load(a + i) + Load(b + i)));
  }
  const int64_t rest = size - i;
  const Vec<C> sum = LoadPart(a + i, rest, C(0)) + LoadPart(b + i, rest, C(0));
  StorePart<T>(out + i, rest, Apply<C, A, kIsCoarse>(sum));
}

template <typename T, Activation A>
void AddActivationBackwardOf(const T* grad, const T* out, const T* a, const T* b, int64_t size,
                             Compute<T>* grad_a, Compute<T>* grad_b) {
  using C = Compute<T>;
  constexpr int64_t kLanes = Simd<C>::kLanes;
  constexpr bool kNeedsInput = A == Activation::kGelu || A == Activation::kSilu;
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) {
    const Vec<C> x = kNeedsInput ? Load(a + i) + Load(b + i) : Vec<C>{};
    const Vec<C> g = Load(grad + i) * Derivative<C, A>(x, Load(out + i));
    Store<C>(grad_a + i, Load(grad_a + i) + g);
    Store<C>(grad_b + i, Load(grad_b + i) + g);
  }
  const int64_t rest = size - i;
  const auto part = [=](const auto* p) { return LoadPart(p + i, rest, C(0)); };
  const Vec<C> x = kNeedsInput ? part(a) + part(b) : Vec<C>{};
  const Vec<C> g = part(grad) * Derivative<C, A>(x, part(out));
  StorePart<C>(grad_a + i, rest, part(grad_a) + g);
  StorePart<C>(grad_b + i, rest, part(grad_b) + g);
}

// Calls f with the activation as a compile-time constant.
template <typename F>
void Dispatch(Activation activation, F f) {
  switch (activation) {
    case Activation::kIdentity:
      return f(std::integral_constant<Activation, Activation::kIdentity>());
    case Activation::kTanh: return f(std::integral_constant<Activation, Activation::kTanh>());
    case Activation::kRelu: return f(std::integral_constant<Activation, Activation::kRelu>());
    case Activation::kGelu: return f(std::integral_constant<Activation, Activation::kGelu>());
    case Activation::kSilu: return f(std::integral_constant<Activation, Activation::kSilu>());
  }
}

template <typename T, bool kIsCoarse = false>
void AddActivation(const T* a, const T* b, int64_t size, Activation activation, T* out) {
  Dispatch(activation,
           [&](auto tag) { AddActivationOf<T, decltype(tag)::value, kIsCoarse>(a, b, size, out); });
}

template <typename T>
void AddActivationBackward(const T* grad, const T* out, const T* a, const T* b, int64_t size,
                           Activation activation, Compute<T>* grad_a, Compute<T>* grad_b) {
  Dispatch(activation, [&](auto tag) {
    AddActivationBackwardOf<T, decltype(tag)::value>(grad, out, a, b, size, grad_a, grad_b);
  });
}

template <typename T>
constexpr RowKernels<T> kTable{MaxAndSumExp<T>, ShiftedExp<T>, ScaledSoftmax<T>, AddActivation<T>,
                               AddActivationBackward<T>};

// To 1 ulp, as the C library's exp, in a quarter of its time.
void Posteriors(Score* x, int64_t size) {
  typedef Simd<Score>::V V;
  typedef Simd<Score>::I I;
  typedef Simd<Score>::U U;
  constexpr int64_t kLanes = Simd<Score>::kLanes;
  // Cody-Waite reduction and a rational function (Cephes exp by S. Moshier).
  const auto exp = [](V v) {
    constexpr double kRound = 6755399441055744.0;  // 1.5 * 2^52: adding it rounds to an integer
    const I is_nothing = v < V{} - 300;
    const V shifted = v * 1.4426950408889634073599 + kRound;
    const V n = shifted - kRound;
    V r = v - n * 6.93145751953125e-1;
    r = r - n * 1.42860682030941723212e-6;
    const V s = r * r;
    const V p = r * ((1.26177193074810590878e-4 * s + 3.02994407707441961300e-2) * s +
                     9.99999999999999999910e-1);
    const V q = ((3.00198505138664455042e-6 * s + 2.52448340349684104192e-3) * s +
                 2.27265548208155028766e-1) *
                    s +
                2.00000000000000000009;
    const V scale = (V)(((U)shifted - (U)(V{} + kRound) + 1023) << 52);
    const V y = (2.0 * (p / (q - p)) + 1.0) * scale;
    return is_nothing ? V{} : y;
  };
  const int64_t whole = size - size % kLanes;
  for (int64_t i = 0; i < whole; i += kLanes) Store<Score>(x + i, exp(Load(x + i)));
  StorePart<Score>(x + whole, size - whole, exp(LoadPart(x + whole, size - whole, Score(0))));
}

// The lanes as bytes; each is in [-128, 127]. GCC 12 would move them one by one.
typedef int8_t Bytes __attribute__((vector_size(Simd<float>::kLanes)));

inline Bytes Narrow(Simd<float>::I x) {
#if TRANSDUCER_VECTOR_BYTES == 64
  return (Bytes)_mm512_maskz_cvtepi32_epi8(0xffff, (__m512i)x);
#elif TRANSDUCER_VECTOR_BYTES == 32
  const __m128i words =
      _mm_packs_epi32(_mm256_castsi256_si128((__m256i)x), _mm256_extracti128_si256((__m256i)x, 1));
  const int64_t bytes = _mm_cvtsi128_si64(_mm_packs_epi16(words, words));
  return (Bytes)bytes;
#else
  return __builtin_convertvector(x, Bytes);
#endif
}

void Quantize(const float* x, int64_t size, int8_t* out, float* scale) {
  using V = Simd<float>::V;
  using I = Simd<float>::I;
  using U = Simd<float>::U;
  constexpr int64_t kLanes = Simd<float>::kLanes;
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  // Magnitudes of floats have the order of their bits, and those of NaN and infinity are last.
  const auto magnitude = [](V v) { return (I)v & std::numeric_limits<int32_t>::max(); };
  const auto larger = [](I a, I b) { return a > b ? a : b; };
  const int64_t whole = size - size % kLanes;
  const V tail = LoadPart(x + whole, size - whole, 0.0f);
  I top_a = magnitude(tail), top_b{};
  int64_t k = 0;
  for (; k + 2 * kLanes <= whole; k += 2 * kLanes) {
    top_a = larger(magnitude(Load(x + k)), top_a);
    top_b = larger(magnitude(Load(x + k + kLanes)), top_b);
  }
  if (k < whole) top_b = larger(magnitude(Load(x + k)), top_b);
  const int32_t bits = LargestLane(larger(top_a, top_b));
  float max;
  std::memcpy(&max, &bits, sizeof(max));
  *scale = (std::isfinite(max) ? max : std::numeric_limits<float>::quiet_NaN()) / 127.0f;
  // Rows of numbers this small round to zero, because their inverse would overflow.
  const float inverse = max > 1e-30f ? 127.0f / max : 0.0f;
  const auto rounded = [=](V v) {
    return Narrow((I)((U)(v * inverse + kRound) - (U)(V{} + kRound)));
  };
  for (int64_t i = 0; i < whole; i += kLanes) {
    const Bytes bytes = rounded(Load(x + i));
    std::memcpy(out + i, &bytes, sizeof(bytes));
  }
  const Bytes bytes = rounded(tail);
  std::memcpy(out + whole, &bytes, static_cast<size_t>(size - whole));
}

// Sums of powers of 2 of the logits in units of log(2).
template <bool kHasBias>
void ShiftAndSumExpOf(const QuantizedRow& row, int64_t size, float* shift, float* sum) {
  using V = Simd<float>::V;
  using I = Simd<float>::I;
  constexpr int64_t kLanes = Simd<float>::kLanes;
  constexpr float kLog2E = 1.44269504f;
  constexpr float kInf = std::numeric_limits<float>::infinity();
  const int64_t whole = size - size % kLanes;
  const float scale = row.scale * kLog2E;
  const auto logits = [&](int64_t i, float minus) {
    I x;
    std::memcpy(&x, row.data + i, sizeof(x));
    const V product = __builtin_convertvector(x, V) * Load(row.scales + i);
    if constexpr (kHasBias) return product * scale + (Load(row.bias + i) * kLog2E - minus);
    return product * scale - minus;
  };
  V tail = V{} - kInf;
  for (int64_t i = whole; i < size; ++i) tail[i - whole] = row[i] * kLog2E;
  // The shift is in units of log(2), too.
  const auto sum_with = [&](float top) {
    V total = Simd<float>::CoarseExp2(tail - top);
    for (int64_t i = 0; i < whole; i += kLanes) {
      total = total + Simd<float>::CoarseExp2(logits(i, top));
    }
    return SumOfLanes(total);
  };
  // One of the first logits is nearly always close enough to the maximum.
  float top = LargestLane(whole > 0 ? logits(0, 0.0f) : tail);
  *sum = std::isfinite(top) ? sum_with(top) : 0;
  if (!(*sum > 0x1p-40f && *sum < 0x1p100f)) {
    V tops = tail;
    for (int64_t i = 0; i < whole; i += kLanes) tops = Max<float>(logits(i, 0.0f), tops);
    top = LargestLane(tops);
    // NaN and infinite logits make the sum NaN, as may logits above 1e9: their rounding overflows it.
    *sum = std::isfinite(top) ? sum_with(top) : kInf;
    if (!(*sum > 0 && *sum < kInf)) *sum = std::numeric_limits<float>::quiet_NaN();
  }
  *shift = top / kLog2E;
}

void ShiftAndSumExp(const QuantizedRow& row, int64_t size, float* shift, float* sum) {
  row.bias != nullptr ? ShiftAndSumExpOf<true>(row, size, shift, sum)
                      : ShiftAndSumExpOf<false>(row, size, shift, sum);
}

constexpr RowKernelSet kKernels{
    TRANSDUCER_ISA_NAME, kTable<float>, kTable<double>, kTable<Half>,
    kTable<BFloat16>,    Posteriors,    Quantize,       AddActivation<float, true>,
    ShiftAndSumExp};

}  // namespace

const RowKernelSet& Kernels() { return kKernels; }

}  // namespace TRANSDUCER_ISA
}  // namespace transducer
