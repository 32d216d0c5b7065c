// SPDX-License-Identifier: Apache-2.0
// Every instruction set this processor has, against long double, at every length of tail.
#include "../row_kernels.h"

#include <cfloat>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "batch_fixture.h"
#include "expect.h"

namespace transducer {
namespace {

template <typename T>
constexpr double kUlp = std::numeric_limits<T>::epsilon();
constexpr float kInf = std::numeric_limits<float>::infinity();

template <typename T>
void TestMaxAndSumExp(const RowKernels<T>& kernels) {
  for (int64_t size = 1; size <= 70; ++size) {
    for (const double scale : {0.1, 3.0, 100.0}) {
      const auto x = RandomVector<T>(size, scale, static_cast<unsigned>(size));
      T max, sum;
      kernels.max_and_sum_exp(x.data(), size, &max, &sum);
      const T expected_max = *std::max_element(x.begin(), x.end());
      long double expected = 0;
      for (const T value : x) expected += std::exp(static_cast<long double>(value) - expected_max);
      EXPECT_TRUE(max == expected_max);
      EXPECT_NEAR(sum, static_cast<double>(expected), 8 * kUlp<T> * static_cast<double>(expected));
    }
    for (int64_t at = 0; at < size; ++at) {  // a special value in every lane, tail included
      T max, sum;
      auto x = RandomVector<T>(size, 1, 7);
      x[at] = static_cast<T>(std::nan(""));
      kernels.max_and_sum_exp(x.data(), size, &max, &sum);
      EXPECT_TRUE(std::isnan(sum));
      x[at] = static_cast<T>(kInf);
      kernels.max_and_sum_exp(x.data(), size, &max, &sum);
      EXPECT_TRUE(std::isnan(std::log(static_cast<double>(sum)) + max));
      std::fill(x.begin(), x.end(), static_cast<T>(-kInf));
      x[at] = static_cast<T>(-3);
      kernels.max_and_sum_exp(x.data(), size, &max, &sum);
      EXPECT_TRUE(max == T(-3) && sum == T(1));
    }
  }
  const std::vector<T> nothing(5, static_cast<T>(-kInf));
  T max, sum;
  kernels.max_and_sum_exp(nothing.data(), 5, &max, &sum);
  EXPECT_TRUE(std::isnan(std::log(static_cast<double>(sum)) + max));
}

template <typename T>
void TestShiftedExp(const RowKernels<T>& kernels) {
  for (int64_t size = 1; size <= 70; ++size) {
    for (const double scale : {0.1, 3.0, 100.0}) {
      auto x = RandomVector<T>(size, scale, static_cast<unsigned>(size));
      const T top = *std::max_element(x.begin(), x.end());
      std::vector<T> out(size, T(9));
      T max;
      kernels.shifted_exp(x.data(), size, out.data(), &max);
      EXPECT_TRUE(max == top);
      for (int64_t i = 0; i < size; ++i) {
        const double expected = std::exp(static_cast<double>(static_cast<T>(x[i] - top)));
        EXPECT_NEAR(out[i], expected, 4 * kUlp<T> * expected + std::numeric_limits<T>::min());
      }
      kernels.shifted_exp(x.data(), size, x.data(), &max);
      EXPECT_TRUE(x == out);
    }
    for (int64_t at = 0; at < size; ++at) {  // a special value in every lane, tail included
      std::vector<T> x(size, T(1)), out(size);
      T max;
      x[at] = static_cast<T>(std::nan(""));
      kernels.shifted_exp(x.data(), size, out.data(), &max);
      EXPECT_TRUE(std::isnan(out[at]));
      x[at] = static_cast<T>(kInf);
      kernels.shifted_exp(x.data(), size, out.data(), &max);
      for (const T value : out) EXPECT_TRUE(std::isnan(value));
      x[at] = static_cast<T>(-kInf);
      kernels.shifted_exp(x.data(), size, out.data(), &max);
      for (int64_t i = 0; i < size; ++i) {
        EXPECT_TRUE(size == 1 ? std::isnan(out[i]) : out[i] == (i == at ? 0 : 1));
      }
    }
  }
}

template <typename T>
void TestScaledSoftmax(const RowKernels<T>& kernels) {
  for (int64_t size = 1; size <= 70; ++size) {
    for (const double offset : {0.0, 80.0, -500.0}) {
      auto x = RandomVector<T>(size, 20, static_cast<unsigned>(size));
      long double total = 0;
      for (T& value : x) value += static_cast<T>(offset);
      for (const T value : x) total += std::exp(static_cast<long double>(value) - offset);
      const double normalizer = static_cast<double>(std::log(total)) + offset;
      std::vector<T> out(size, T(9));
      kernels.scaled_softmax(x.data(), size, normalizer, T(0.5), T(0.25), T(-2), out.data());
      for (int64_t i = 0; i < size; ++i) {
        const double p = std::exp(static_cast<double>(x[i]) - normalizer);
        const double expected = -2 * std::min(0.5 * p, 0.25);
        // Rounding x - normalizer costs a relative error of its size: nothing where p matters.
        const double ulps = 4 + std::abs(static_cast<double>(x[i]) - normalizer);
        EXPECT_NEAR(out[i], expected, ulps * kUlp<T> * std::abs(expected) + 1e-37);
        EXPECT_TRUE(out[i] == 0 || std::abs(out[i]) >= std::numeric_limits<T>::min());
      }
      kernels.scaled_softmax(x.data(), size, normalizer, T(0.5), T(0.25), T(-2), x.data());
      EXPECT_TRUE(x == out);
    }
  }
  const T masked[2] = {static_cast<T>(-kInf), T(0)};
  T out[2];
  kernels.scaled_softmax(masked, 2, 0.0, T(1), static_cast<T>(kInf), T(1), out);
  EXPECT_TRUE(out[0] == 0 && out[1] == 1);
}

void TestPosteriors(const RowKernelSet& set) {
  for (int64_t size = 1; size <= 40; ++size) {
    for (const double scale : {1e-9, 1.0, 100.0}) {
      const auto x = RandomVector<Score>(size, scale, static_cast<unsigned>(size));
      auto y = x;
      set.posteriors(y.data(), size);
      for (int64_t i = 0; i < size; ++i) {
        const auto expected = static_cast<double>(std::exp(static_cast<long double>(x[i])));
        EXPECT_NEAR(y[i], expected, 1.1 * kUlp<double> * expected);
      }
    }
    for (int64_t at = 0; at < size; ++at) {  // a special value in every lane, tail included
      for (const double special : {kLogZero, -300.1, std::nan("")}) {
        std::vector<Score> x(static_cast<size_t>(size), 0);
        x[at] = special;
        set.posteriors(x.data(), size);
        for (int64_t i = 0; i < size; ++i) {
          EXPECT_TRUE(i != at ? x[i] == 1 : std::isnan(special) ? std::isnan(x[i]) : x[i] == 0);
        }
      }
    }
  }
}

// Rows of integers and their scale, against long double: outliers, zeros, special values.
void TestQuantize(const RowKernelSet& set) {
  constexpr int8_t kGuard = 99;
  for (int64_t size = 1; size <= 70; ++size) {
    std::vector<int8_t> out(size + 1);
    float scale;
    const auto quantize = [&](const std::vector<float>& x) {
      std::fill(out.begin(), out.end(), kGuard);
      set.quantize(x.data(), size, out.data(), &scale);
      EXPECT_TRUE(out[size] == kGuard);
    };
    const auto expect_rounded = [&](const std::vector<float>& x) {
      quantize(x);
      float max = 0;
      for (const float value : x) max = std::max(max, std::abs(value));
      EXPECT_TRUE(scale == max / 127.0f);
      for (int64_t i = 0; i < size; ++i) {
        const long double exact = 127.0L * x[i] / max;
        EXPECT_TRUE(std::abs(out[i] - exact) <= 0.5L + 1e-4L);
        EXPECT_TRUE(std::abs(x[i]) < max || out[i] == (x[i] < 0 ? -127 : 127));
      }
    };
    for (const double spread : {1e-20, 0.1, 100.0, 1e30}) {
      auto x = RandomVector<float>(size, spread, static_cast<unsigned>(size));
      expect_rounded(x);
      for (int64_t at = 0; at < size; ++at) {  // an outlier in every lane, tail included
        const float before = x[at];
        x[at] = -1e4f * static_cast<float>(spread);
        expect_rounded(x);
        x[at] = before;
      }
    }
    for (const float largest : {FLT_MAX, 2e-30f}) {  // the limits of the range that is scaled
      std::vector<float> x(size, largest / 2);
      x[size / 2] = largest;
      expect_rounded(x);
    }
    for (const float small : {0.0f, -0.0f, 1e-31f, FLT_MIN}) {
      quantize(std::vector<float>(size, small));
      EXPECT_TRUE(scale == std::abs(small) / 127.0f);
      for (int64_t i = 0; i < size; ++i) EXPECT_TRUE(out[i] == 0);
    }
    for (int64_t at = 0; at < size; ++at) {
      for (const float special : {kInf, -kInf, std::nanf(""), -std::nanf("")}) {
        std::vector<float> x(size, FLT_MAX);
        x[at] = special;
        quantize(x);
        EXPECT_TRUE(std::isnan(scale));
      }
    }
  }
}

// Logits of integers, x * scale * scales + bias, and the sum of their exponentials, against double.
void TestShiftAndSumExp(const RowKernelSet& set) {
  const float kNan = std::nanf("");
  for (int64_t size = 1; size <= 70; ++size) {
    const auto seed = static_cast<unsigned>(size);
    std::mt19937 random(seed);
    std::vector<int32_t> x(size);
    for (int32_t& value : x) {  // up to the sum of 4096 products of 127 and 127
      value = static_cast<int32_t>(random() % (2 * 66'064'384 + 1)) - 66'064'384;
    }
    x[size / 2] = 0;
    const auto expect_sum = [&](const QuantizedRow& row) {
      double max = -kInf, sum = 0;
      std::vector<double> logits;
      for (int64_t i = 0; i < size; ++i) {
        const double product = static_cast<double>(row.data[i]) * row.scale * row.scales[i];
        const double added = row.bias != nullptr ? row.bias[i] : 0;
        logits.push_back(product + added);
        const double room = 3 * kUlp<float> * (std::abs(product) + std::abs(added));
        EXPECT_NEAR(row[i], logits.back(), room);
        max = std::max(max, logits.back());
      }
      for (const double logit : logits) sum += std::exp(logit - max);
      float shift, total;
      set.shift_and_sum_exp(row, size, &shift, &total);
      // Rounding of large logits, and the exponentials' own error.
      EXPECT_NEAR(shift + std::log(static_cast<double>(total)), max + std::log(sum),
                  2e-4 + 4 * kUlp<float> * (std::abs(max) + std::abs(shift)));
    };
    for (const double spread : {1e-9, 1e-7, 3e-6}) {  // logits up to 0.07, 7 and 200
      const auto column = RandomVector<float>(size, spread, seed),
                 bias = RandomVector<float>(size, 1, 9);
      expect_sum({x.data(), 1.0f, column.data(), bias.data()});
      expect_sum({x.data(), 1.0f, column.data(), nullptr});
      expect_sum({x.data(), 0.0f, column.data(), bias.data()});
    }
    // One logit far from the others, in every lane, and masked ones.
    for (int64_t at = 0; at < size; ++at) {
      const std::vector<float> ones(size, 1.0f);
      const std::vector<int32_t> zeros(size, 0);
      for (const float far : {60.0f, 80.0f, 1000.0f, 3e6f, -30.0f, -1000.0f, -3e6f, -kInf}) {
        if (size == 1 && far == -kInf) continue;
        std::vector<float> bias(size, 1.0f);
        bias[at] = far;
        expect_sum({zeros.data(), 1.0f, ones.data(), bias.data()});
        for (float& value : bias) value = -value;  // all but one
        if (far > -kInf) expect_sum({zeros.data(), 1.0f, ones.data(), bias.data()});
      }
      std::vector<float> only(size, -kInf);
      only[at] = -2.5f;
      expect_sum({zeros.data(), 1.0f, ones.data(), only.data()});
      float shift, total;
      for (const float special : {kInf, kNan}) {
        std::vector<float> bias(size, 1.0f);
        bias[at] = special;
        set.shift_and_sum_exp({zeros.data(), 1.0f, ones.data(), bias.data()}, size, &shift, &total);
        EXPECT_TRUE(std::isnan(total));
        set.shift_and_sum_exp({x.data(), 1.0f, bias.data(), nullptr}, size, &shift, &total);
        EXPECT_TRUE(x[at] < 0 && special == kInf ? size == 1 || !std::isnan(total)
                                                 : std::isnan(total));
      }
    }
    const std::vector<float> masked(size, -kInf), ones(size, 1.0f);
    float shift, total;
    set.shift_and_sum_exp({x.data(), 1.0f, ones.data(), masked.data()}, size, &shift, &total);
    EXPECT_TRUE(std::isnan(total));
    set.shift_and_sum_exp({x.data(), kNan, ones.data(), nullptr}, size, &shift, &total);
    EXPECT_TRUE(std::isnan(total));
  }
}

double Activate(Activation activation, double x) {
  switch (activation) {
    case Activation::kIdentity: return x;
    case Activation::kTanh: return std::tanh(x);
    case Activation::kRelu: return x > 0 ? x : 0;
    case Activation::kGelu: return 0.5 * x * std::erfc(-x * M_SQRT1_2);
    case Activation::kSilu: return x / (1 + std::exp(-x));
  }
  return 0;
}

double Slope(Activation activation, double x) {
  const double h = 1e-6;
  if (activation == Activation::kRelu) return x > 0 ? 1 : 0;
  return (Activate(activation, x + h) - Activate(activation, x - h)) / (2 * h);
}

template <typename T>
void TestActivations(const RowKernels<T>& kernels) {
  for (int k = 0; k < 5; ++k) {
    const auto activation = static_cast<Activation>(k);
    for (int64_t size = 1; size <= 40; ++size) {
      for (const double scale : {1e-3, 1.0, 30.0}) {
        const auto a = RandomVector<T>(size, scale, 1), b = RandomVector<T>(size, scale, 2);
        const auto grad = RandomVector<T>(size, 1, 3);
        std::vector<T> out(size), grad_a(size, T(1)), grad_b(size, T(2));
        kernels.add_activation(a.data(), b.data(), size, activation, out.data());
        kernels.add_activation_backward(grad.data(), out.data(), a.data(), b.data(), size,
                                        activation, grad_a.data(), grad_b.data());
        for (int64_t i = 0; i < size; ++i) {
          const double x = static_cast<double>(static_cast<T>(a[i] + b[i]));
          const double y = Activate(activation, x);
          // gelu is x * Phi(x), and Phi right to an absolute 1e-7.
          const double of_phi = k == 3 ? 2 * std::abs(x) : 0;
          EXPECT_NEAR(out[i], y, kUlp<T> * (4 * std::abs(y) + of_phi) + 1e-36);
          const double g = grad[i] * Slope(activation, x);
          EXPECT_NEAR(grad_a[i] - 1, g, 3e-6 + (sizeof(T) == 4 ? 3e-5 * scale : 1e-8 * scale));
          EXPECT_NEAR(grad_b[i] - 2, g, 3e-6 + (sizeof(T) == 4 ? 3e-5 * scale : 1e-8 * scale));
        }
      }
    }
  }
  const T nan[1] = {static_cast<T>(std::nan(""))}, zero[1] = {0};
  for (int k = 0; k < 5; ++k) {
    T out[1];
    kernels.add_activation(nan, zero, 1, static_cast<Activation>(k), out);
    EXPECT_TRUE(std::isnan(out[0]));
  }
}

// Every 16-bit pattern there and back, and rounding between neighbors.
void TestHalfConversions() {
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const Half half{static_cast<uint16_t>(bits)};
    const BFloat16 bfloat{static_cast<uint16_t>(bits)};
    const float from_half = ToCompute(half), from_bfloat = ToCompute(bfloat);
    if (std::isnan(from_half)) {
      EXPECT_TRUE(std::isnan(ToCompute(FromCompute<Half>(from_half))));
    } else {
      EXPECT_TRUE(FromCompute<Half>(from_half).bits == bits);
    }
    if (std::isnan(from_bfloat)) {
      EXPECT_TRUE(std::isnan(ToCompute(FromCompute<BFloat16>(from_bfloat))));
    } else {
      EXPECT_TRUE(FromCompute<BFloat16>(from_bfloat).bits == bits);
    }
    if ((bits & 0x7fff) < 0x7bff) {  // a finite number with a finite neighbor
      const float next = ToCompute(Half{static_cast<uint16_t>(bits + 1)});
      const float middle = 0.5f * (from_half + next);
      EXPECT_TRUE(FromCompute<Half>(middle).bits == (bits & 1 ? bits + 1 : bits));  // to even
      EXPECT_TRUE(FromCompute<Half>(std::nextafter(middle, next)).bits == bits + 1);
      EXPECT_TRUE(FromCompute<Half>(std::nextafter(middle, from_half)).bits == bits);
    }
  }
  EXPECT_TRUE(ToCompute(Half{0x3c00}) == 1.0f && ToCompute(Half{0x0001}) == 0x1p-24f);
  EXPECT_TRUE(ToCompute(FromCompute<Half>(65519.0f)) == 65504.0f);
  EXPECT_TRUE(std::isinf(ToCompute(FromCompute<Half>(65520.0f))));
}

// 16-bit kernels are float32 kernels with rounding at both ends.
template <typename T>
void TestSixteenBit(const RowKernels<T>& kernels, const RowKernels<float>& exact) {
  for (int64_t size = 1; size <= 40; ++size) {
    const auto same = [&](double scale, unsigned seed, std::vector<float>* wide) {
      std::vector<T> narrow;
      for (const float x : RandomVector<float>(size, scale, seed)) {
        narrow.push_back(FromCompute<T>(x));
        wide->push_back(ToCompute(narrow.back()));
      }
      return narrow;
    };
    std::vector<float> wide_a, wide_b, wide_grad;
    const auto a = same(3, 1, &wide_a), b = same(3, 2, &wide_b), grad = same(1, 3, &wide_grad);
    float max, sum, exact_max, exact_sum;
    kernels.max_and_sum_exp(a.data(), size, &max, &sum);
    exact.max_and_sum_exp(wide_a.data(), size, &exact_max, &exact_sum);
    EXPECT_TRUE(max == exact_max && sum == exact_sum);

    std::vector<T> out(size);
    std::vector<float> exact_out(size);
    const auto expect_rounded = [&] {
      for (int64_t i = 0; i < size; ++i) {
        EXPECT_TRUE(out[i].bits == FromCompute<T>(exact_out[i]).bits);
      }
    };
    kernels.scaled_softmax(a.data(), size, 4.0, 0.5f, 1.0f, 3.0f, out.data());
    exact.scaled_softmax(wide_a.data(), size, 4.0, 0.5f, 1.0f, 3.0f, exact_out.data());
    expect_rounded();
    for (int k = 0; k < 5; ++k) {
      const auto activation = static_cast<Activation>(k);
      kernels.add_activation(a.data(), b.data(), size, activation, out.data());
      exact.add_activation(wide_a.data(), wide_b.data(), size, activation, exact_out.data());
      expect_rounded();
      std::vector<float> wide_out;
      for (const T x : out) wide_out.push_back(ToCompute(x));
      std::vector<float> sums[4];
      for (auto& values : sums) values.assign(size, 0.25f);
      kernels.add_activation_backward(grad.data(), out.data(), a.data(), b.data(), size, activation,
                                      sums[0].data(), sums[1].data());
      exact.add_activation_backward(wide_grad.data(), wide_out.data(), wide_a.data(), wide_b.data(),
                                    size, activation, sums[2].data(), sums[3].data());
      for (int64_t i = 0; i < size; ++i) {  // the compiler may contract a * b + c differently
        EXPECT_NEAR(sums[0][i], sums[2][i], 1e-6);
        EXPECT_NEAR(sums[1][i], sums[3][i], 1e-6);
      }
    }
  }
}

template <typename T>
void TestAll(const RowKernels<T>& kernels) {
  TestMaxAndSumExp(kernels);
  TestShiftedExp(kernels);
  TestScaledSoftmax(kernels);
  TestActivations(kernels);
}

}  // namespace
}  // namespace transducer

int main() {
  using namespace transducer;
  TestHalfConversions();
  for (const RowKernelSet* set : RunnableRowKernelSets()) {
    std::printf("%s\n", set->name);
    TestAll(set->float32);
    TestAll(set->float64);
    TestPosteriors(*set);
    TestQuantize(*set);
    TestShiftAndSumExp(*set);
    TestSixteenBit(set->float16, set->float32);
    TestSixteenBit(set->bfloat16, set->float32);
  }
  return expect::Finish();
}
