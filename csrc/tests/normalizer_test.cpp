// SPDX-License-Identifier: Apache-2.0
// Repaired normalizers and their gradients against plain float64 loops; other cells untouched.
#include "../normalizer_repair.h"

#include <vector>

#include "batch_fixture.h"
#include "expect.h"

namespace transducer {
namespace {

template <typename T>
void TestRepair(int64_t vocab_size, double scale, double tolerance) {
  constexpr int64_t kBatch = 2, kFrames = 3, kColumns = 4;
  constexpr int64_t kCells = kBatch * kFrames * kColumns;
  const auto am = RandomVector<T>(kBatch * kFrames * vocab_size, scale, 1);
  const auto lm = RandomVector<T>(kBatch * kColumns * vocab_size, scale, 2);
  const auto grad = RandomVector<Score>(kCells, 1, 3);
  std::vector<T> product(kCells);
  for (int64_t i = 0; i < kCells; ++i) product[i] = i % 3 == 0 ? T(1) : T(0);
  product[1] = std::numeric_limits<T>::quiet_NaN();
  const AdditiveCells<T> cells{kBatch,    kFrames,   kColumns,       vocab_size,
                               am.data(), lm.data(), product.data(), T(0.5)};
  std::vector<Score> normalizer(kCells, 7);
  RepairNormalizerCpu(cells, 2, normalizer.data());
  std::vector<T> grad_am(am.size(), T(1)), grad_lm(lm.size(), T(1));
  RepairNormalizerBackwardCpu(cells, normalizer.data(), grad.data(), 2, grad_am.data(),
                              grad_lm.data());

  std::vector<double> expected_am(am.size(), 1), expected_lm(lm.size(), 1);
  for (int64_t cell = 0; cell < kCells; ++cell) {
    if (cell % 3 == 0 || cell == 1) {
      EXPECT_TRUE(normalizer[cell] == 7);
      continue;
    }
    const int64_t bt = cell / kColumns;
    const int64_t bu = bt / kFrames * kColumns + cell % kColumns;
    const auto logit = [&](int64_t v) {
      return static_cast<double>(am[bt * vocab_size + v]) + lm[bu * vocab_size + v];
    };
    double max = kLogZero, sum = 0;
    for (int64_t v = 0; v < vocab_size; ++v) max = std::max(max, logit(v));
    for (int64_t v = 0; v < vocab_size; ++v) sum += std::exp(logit(v) - max);
    EXPECT_NEAR(normalizer[cell], max + std::log(sum), tolerance);
    for (int64_t v = 0; v < vocab_size; ++v) {
      const double g = grad[cell] * std::exp(logit(v) - max) / sum;
      expected_am[bt * vocab_size + v] += g;
      expected_lm[bu * vocab_size + v] += g;
    }
  }
  for (size_t i = 0; i < am.size(); ++i) EXPECT_NEAR(grad_am[i], expected_am[i], tolerance);
  for (size_t i = 0; i < lm.size(); ++i) EXPECT_NEAR(grad_lm[i], expected_lm[i], tolerance);

  std::vector<T> one_am(am.size(), T(1)), one_lm(lm.size(), T(1));
  RepairNormalizerBackwardCpu(cells, normalizer.data(), grad.data(), 1, one_am.data(),
                              one_lm.data());
  EXPECT_TRUE(one_am == grad_am && one_lm == grad_lm);  // bit for bit
}

// Each of am and lm is a distribution, but no symbol is possible in both: not a normalizer.
void TestNothingLeft() {
  const float inf = std::numeric_limits<float>::infinity();
  const std::vector<float> am{0, -inf}, lm{-inf, 0}, product{0};
  Score normalizer = 7;
  RepairNormalizerCpu<float>({1, 1, 1, 2, am.data(), lm.data(), product.data(), 1}, 1, &normalizer);
  EXPECT_TRUE(std::isnan(normalizer));
}

}  // namespace
}  // namespace transducer

int main() {
  for (const int64_t vocab_size : {1, 5, 33, 600}) {
    for (const double scale : {1.0, 100.0}) {
      transducer::TestRepair<float>(vocab_size, scale, 2e-6);
      transducer::TestRepair<double>(vocab_size, scale, 1e-12);
    }
  }
  transducer::TestNothingLeft();
  return expect::Finish();
}
