// SPDX-License-Identifier: Apache-2.0
// Stage 3 against finite differences of stages 1 and 2.
#include "../logits_grad.h"

#include <limits>
#include <vector>

#include "../cell_scores.h"
#include "../lattice.h"
#include "batch_fixture.h"
#include "expect.h"

namespace transducer {
namespace {

constexpr int64_t kVocab = 7, kBlank = 0;

struct Stages {
  const LatticeBatch& batch;
  Topology topology;
  bool from_log_softmax;
  std::vector<Score> normalizer, blank, label, use_blank, use_label, loss;

  Stages(const LatticeBatch& batch, Topology topology, bool from_log_softmax)
      : batch(batch),
        topology(topology),
        from_log_softmax(from_log_softmax),
        normalizer(batch.num_rows),
        blank(batch.num_rows),
        label(batch.num_rows),
        use_blank(batch.num_rows),
        use_label(batch.num_rows),
        loss(batch.num_utterances) {}

  template <typename T>
  void Forward(const std::vector<T>& logits) {
    CellScoresCpu<T>(batch, {nullptr, 0, batch.num_rows}, {logits.data(), kVocab, kVocab},
                     {kBlank, from_log_softmax, 0}, 2,
                     {normalizer.data(), blank.data(), label.data()});
    LatticeCpu(batch, {topology, 0, 0}, {blank.data(), label.data()}, 2, nullptr,
               {loss.data(), use_blank.data(), use_label.data()});
  }

  template <typename T>
  void Backward(const std::vector<T>& logits, const std::vector<Score>& loss_grad, double clamp,
                T* grad) {
    LogitsGradCpu<T>(batch, {nullptr, 0, batch.num_rows}, {logits.data(), kVocab, kVocab},
                     {kBlank, from_log_softmax, clamp},
                     {normalizer.data(), use_blank.data(), use_label.data(), loss_grad.data()}, 2,
                     grad);
  }
};

bool IsCell(const BatchFixture& fixture, int64_t row) {
  const LatticeBatch& batch = fixture.batch;
  for (int64_t b = 0; b < batch.num_utterances; ++b) {
    for (int64_t t = 0; t < batch.num_frames[b]; ++t) {
      for (int64_t u = 0; u <= batch.num_targets[b]; ++u) {
        if (fixture.Has(b, t, u) && batch.Row(b, t, u) == row) return true;
      }
    }
  }
  return false;
}

// Tiles of rows give, piece by piece and in any order, what one call gives.
void TestTiles(Layout layout) {
  BatchFixture fixture({4, 2, 6}, {2, 0, 5}, layout, kVocab, 3);
  const LatticeBatch& batch = fixture.batch;
  const auto logits = RandomVector<float>(batch.num_rows * kVocab, 2, 4);
  Stages whole(batch, Topology::kRegular, false), tiled(batch, Topology::kRegular, false);
  whole.Forward(logits);
  std::vector<float> grad(logits.size(), 99);
  const std::vector<Score> loss_grad = {1, -0.5, 3};
  whole.Backward(logits, loss_grad, 0, grad.data());

  constexpr int64_t kTile = 5;
  for (int64_t begin = (batch.num_rows - 1) / kTile * kTile; begin >= 0; begin -= kTile) {
    const int64_t size = std::min(kTile, batch.num_rows - begin);
    CellScoresCpu<float>(batch, {nullptr, begin, size},
                         {logits.data() + begin * kVocab, kVocab, kVocab}, {kBlank, false, 0}, 1,
                         {tiled.normalizer.data(), tiled.blank.data(), tiled.label.data()});
  }
  EXPECT_TRUE(whole.normalizer == tiled.normalizer && whole.blank == tiled.blank);
  EXPECT_TRUE(whole.label == tiled.label);
  std::vector<int64_t> every_third;
  for (int64_t row = 0; row < batch.num_rows; row += 3) every_third.push_back(row);
  std::vector<float> x, expected;
  for (const int64_t row : every_third) {
    x.insert(x.end(), logits.begin() + row * kVocab, logits.begin() + (row + 1) * kVocab);
    expected.insert(expected.end(), grad.begin() + row * kVocab, grad.begin() + (row + 1) * kVocab);
  }
  const RowTile tile{every_third.data(), 1, static_cast<int64_t>(every_third.size()) - 1};
  LogitsGradCpu<float>(batch, tile, {x.data() + kVocab, kVocab, kVocab}, {kBlank, false, 0},
                       {whole.normalizer.data(), whole.use_blank.data(), whole.use_label.data(),
                        loss_grad.data()},
                       1, x.data() + kVocab);
  for (size_t i = kVocab; i < x.size(); ++i) EXPECT_TRUE(x[i] == expected[i]);
}

void TestAgainstDifferences(Topology topology, Layout layout, bool from_log_softmax) {
  BatchFixture fixture({5, 2, 3}, {4, 0, 1}, layout, kVocab, 3);
  if (!from_log_softmax) fixture.targets[0] = kBlank;  // label == blank: both subtractions
  const LatticeBatch& batch = fixture.batch;
  auto logits = RandomVector<double>(batch.num_rows * kVocab, 2, 4);
  for (int64_t row = 0; row < batch.num_rows; ++row) {
    if (!IsCell(fixture, row)) {
      std::fill_n(logits.begin() + row * kVocab, kVocab, std::numeric_limits<double>::quiet_NaN());
    }
  }
  const std::vector<Score> loss_grad = {1, -0.5, 3};
  Stages stages(batch, topology, from_log_softmax);
  stages.Forward(logits);
  std::vector<double> grad(logits.size(), 99);
  stages.Backward(logits, loss_grad, 0, grad.data());

  Stages shifted(batch, topology, from_log_softmax);
  const auto total = [&](const std::vector<double>& x) {
    shifted.Forward(x);
    double sum = 0;
    for (size_t b = 0; b < loss_grad.size(); ++b) sum += loss_grad[b] * shifted.loss[b];
    return sum;
  };
  constexpr double kStep = 1e-5;
  for (size_t i = 0; i < logits.size(); ++i) {
    if (std::isnan(logits[i])) {
      EXPECT_TRUE(grad[i] == 0);  // padding
      continue;
    }
    auto x = logits;
    x[i] += kStep;
    const double above = total(x);
    x[i] -= 2 * kStep;
    EXPECT_NEAR(grad[i], (above - total(x)) / (2 * kStep), 1e-8);
  }

  std::vector<double> clamped(logits.size());
  stages.Backward(logits, loss_grad, 0.1, clamped.data());
  for (int64_t b = 0; b < batch.num_utterances; ++b) {
    for (int64_t t = 0; t < batch.num_frames[b]; ++t) {
      for (int64_t u = 0; u <= batch.num_targets[b]; ++u) {
        for (int64_t v = 0; v < kVocab && fixture.Has(b, t, u); ++v) {
          const int64_t i = batch.Row(b, t, u) * kVocab + v;
          const double plain = grad[i] / loss_grad[b];
          const double limited = std::min(std::max(plain, -0.1), 0.1);
          EXPECT_NEAR(clamped[i], loss_grad[b] * limited, 1e-12);
        }
      }
    }
  }

  stages.Backward(logits, loss_grad, 0, logits.data());  // in place
  EXPECT_TRUE(logits == grad);
}

void TestFloatIsAsGoodAsItsInputs() {
  BatchFixture fixture({60, 40}, {20, 11}, Layout::kPacked, kVocab, 3);
  const auto logits = RandomVector<float>(fixture.batch.num_rows * kVocab, 30, 4);
  const std::vector<double> same(logits.begin(), logits.end());
  Stages stages(fixture.batch, Topology::kRegular, false);
  std::vector<float> grad(logits.size());
  std::vector<double> expected(logits.size());
  stages.Forward(logits);
  stages.Backward(logits, {1, 1}, 0, grad.data());
  stages.Forward(same);
  stages.Backward(same, {1, 1}, 0, expected.data());
  for (size_t i = 0; i < grad.size(); ++i) {
    EXPECT_NEAR(grad[i], expected[i], 2e-6);
    EXPECT_TRUE(grad[i] == 0 || std::abs(grad[i]) >= std::numeric_limits<float>::min());
  }
}

void TestMaskedByZeroGradient() {
  BatchFixture fixture({3, 3}, {1, 1}, Layout::kPacked, kVocab, 3);
  auto logits = RandomVector<float>(fixture.batch.num_rows * kVocab, 1, 4);
  logits[0] = std::numeric_limits<float>::quiet_NaN();
  Stages stages(fixture.batch, Topology::kRegular, false);
  stages.Forward(logits);
  EXPECT_TRUE(std::isnan(stages.loss[0]) && std::isfinite(stages.loss[1]));
  std::vector<float> grad(logits.size());
  stages.Backward(logits, {1, 1}, 0, grad.data());
  EXPECT_TRUE(std::isnan(grad[0]) && std::isnan(grad[6 * kVocab - 1]));
  EXPECT_TRUE(std::isfinite(grad[6 * kVocab]));
  stages.Backward(logits, {0, 1}, 0, grad.data());
  for (const float g : grad) EXPECT_TRUE(std::isfinite(g));
}

}  // namespace
}  // namespace transducer

int main() {
  using transducer::Topology;
  for (int i = 0; i < transducer::kNumTopologies; ++i) {
    const auto topology = static_cast<Topology>(i);
    for (const auto layout : transducer::kLayouts) {
      transducer::TestAgainstDifferences(topology, layout, false);
      transducer::TestAgainstDifferences(topology, layout, true);
    }
  }
  for (const auto layout : transducer::kLayouts) transducer::TestTiles(layout);
  transducer::TestFloatIsAsGoodAsItsInputs();
  transducer::TestMaskedByZeroGradient();
  return expect::Finish();
}
