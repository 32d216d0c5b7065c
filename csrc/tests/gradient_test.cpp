// SPDX-License-Identifier: Apache-2.0
// Stage 3 against finite differences of stages 1 and 2.
#include "../logits_grad.h"

#include <limits>
#include <vector>

#include "../cell_scores.h"
#include "../duration_lattice.h"
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

// Durations or big blanks: logits have kPitch columns, of which the last ones are not used.
struct DurationStages {
  static constexpr int kDurations[] = {0, 1, 3}, kBigBlanks[] = {4, 2};
  static constexpr int64_t kPitch = kVocab + 5;
  const LatticeBatch& batch;
  const bool is_tdt;
  LogitsOptions options;
  DurationArcs arcs;
  std::vector<Score> normalizer, blank, label, extra, use_blank, use_label, use_extra, loss;

  DurationStages(const LatticeBatch& batch, bool is_tdt, bool from_log_softmax)
      : batch(batch),
        is_tdt(is_tdt),
        options{kBlank, from_log_softmax, 0, is_tdt ? 0 : 2, is_tdt ? 3 : 0},
        arcs{is_tdt ? 2 : 3, is_tdt ? 3 : 1, {1, 3}, {0}},
        normalizer(batch.num_rows),
        blank(batch.num_rows),
        label(batch.num_rows),
        extra(batch.num_rows * options.NumExtra()),
        use_blank(batch.num_rows),
        use_label(batch.num_rows),
        use_extra(extra.size()),
        loss(batch.num_utterances) {
    if (is_tdt) {
      std::copy_n(kDurations, 3, arcs.label_frames);
    } else {
      std::copy_n(kBigBlanks, 2, arcs.blank_frames + 1);
    }
  }

  int64_t NumColumns() const { return kVocab + options.num_durations; }

  void Forward(const std::vector<double>& logits) {
    CellScoresCpu<double>(batch, {nullptr, 0, batch.num_rows}, {logits.data(), kVocab, kPitch},
                          options, 2,
                          {normalizer.data(), blank.data(), label.data(), extra.data()});
    // Scores of arcs from those of symbols and extras, and back for the uses.
    const int64_t num_extra = options.NumExtra();
    std::vector<Score> by_blank, by_label;
    for (int64_t row = 0; row < batch.num_rows; ++row) {
      const Score* x = extra.data() + row * num_extra;
      for (int k = 0; k < arcs.num_blank; ++k) {
        by_blank.push_back(is_tdt ? blank[row] + x[k + 1] : k > 0 ? x[k - 1] : blank[row]);
      }
      for (int k = 0; k < arcs.num_label; ++k) by_label.push_back(label[row] + (is_tdt ? x[k] : 0));
    }
    std::vector<Score> uses_of_blank(by_blank.size()), uses_of_label(by_label.size());
    std::vector<char> scratch(DurationLatticeScratch(batch, true));
    DurationLatticeCpu(batch, {}, arcs, {by_blank.data(), by_label.data()}, 2, scratch.data(),
                       {loss.data(), uses_of_blank.data(), uses_of_label.data()});
    std::fill(use_extra.begin(), use_extra.end(), 0);
    for (int64_t row = 0; row < batch.num_rows; ++row) {
      use_blank[row] = use_label[row] = 0;
      Score* x = use_extra.data() + row * num_extra;
      for (int k = 0; k < arcs.num_blank; ++k) {
        const Score use = uses_of_blank[row * arcs.num_blank + k];
        if (is_tdt || k == 0) use_blank[row] += use;
        if (is_tdt) x[k + 1] += use;
        if (!is_tdt && k > 0) x[k - 1] = use;
      }
      for (int k = 0; k < arcs.num_label; ++k) {
        const Score use = uses_of_label[row * arcs.num_label + k];
        use_label[row] += use;
        if (is_tdt) x[k] += use;
      }
    }
  }

  void Backward(const RowTile& tile, const double* logits, const std::vector<Score>& loss_grad,
                double clamp, double* grad) {
    options.clamp = clamp;
    LogitsGradCpu<double>(batch, tile, {logits, kVocab, kPitch}, options,
                          {normalizer.data(), use_blank.data(), use_label.data(), loss_grad.data(),
                           use_extra.data()},
                          2, grad);
  }
};

void TestDurationsAgainstDifferences(Layout layout, bool is_tdt, bool from_log_softmax) {
  constexpr int64_t kPitch = DurationStages::kPitch;
  constexpr double kUnused = std::numeric_limits<double>::quiet_NaN(), kUntouched = 99;
  BatchFixture fixture({5, 3, 4}, {3, 0, 1}, layout, kVocab, 3);
  if (!from_log_softmax) fixture.targets[0] = kBlank;  // label == blank: both subtractions
  if (!is_tdt) fixture.targets[1] = kVocab - 1;        // label == big blank
  const LatticeBatch& batch = fixture.batch;
  DurationStages stages(batch, is_tdt, from_log_softmax), shifted = stages;
  const int64_t columns = stages.NumColumns();
  auto logits = RandomVector<double>(batch.num_rows * kPitch, 2, 4);
  const auto is_used = [&](size_t i) {
    const auto at = static_cast<int64_t>(i);
    return at % kPitch < columns && IsCell(fixture, at / kPitch);
  };
  for (size_t i = 0; i < logits.size(); ++i) {
    if (!is_used(i)) logits[i] = kUnused;
  }
  const std::vector<Score> loss_grad = {1, -0.5, 3};
  const RowTile all{nullptr, 0, batch.num_rows};
  stages.Forward(logits);
  std::vector<double> grad(logits.size(), kUntouched);
  stages.Backward(all, logits.data(), loss_grad, 0, grad.data());

  const auto total = [&](const std::vector<double>& x) {
    shifted.Forward(x);
    double sum = 0;
    for (size_t b = 0; b < loss_grad.size(); ++b) sum += loss_grad[b] * shifted.loss[b];
    return sum;
  };
  constexpr double kStep = 1e-5;
  for (size_t i = 0; i < logits.size(); ++i) {
    if (!is_used(i)) {
      EXPECT_TRUE(grad[i] == (static_cast<int64_t>(i) % kPitch < columns ? 0 : kUntouched));
      continue;
    }
    auto x = logits;
    x[i] += kStep;
    const double above = total(x);
    x[i] -= 2 * kStep;
    EXPECT_NEAR(grad[i], (above - total(x)) / (2 * kStep), 1e-8);
  }

  std::vector<double> clamped(logits.size());
  stages.Backward(all, logits.data(), loss_grad, 0.1, clamped.data());
  for (size_t i = 0; i < logits.size(); ++i) {
    if (!is_used(i)) continue;
    Cell cell;
    batch.CellOf(static_cast<int64_t>(i) / kPitch, &cell);
    const double plain = grad[i] / loss_grad[cell.b];
    EXPECT_NEAR(clamped[i], loss_grad[cell.b] * std::min(std::max(plain, -0.1), 0.1), 1e-12);
  }

  // Some rows, from logits that stay where they are; then every row in place.
  std::vector<int64_t> rows;
  for (int64_t row = 1; row < batch.num_rows; row += 3) rows.push_back(row);
  std::vector<double> some(rows.size() * kPitch, kUntouched);
  stages.Backward({rows.data(), 0, static_cast<int64_t>(rows.size()), true}, logits.data(),
                  loss_grad, 0, some.data());
  for (size_t i = 0; i < some.size(); ++i) {
    EXPECT_TRUE(some[i] == grad[rows[i / kPitch] * kPitch + static_cast<int64_t>(i) % kPitch]);
  }
  stages.Backward(all, logits.data(), loss_grad, 0, logits.data());
  for (size_t i = 0; i < logits.size(); ++i) {
    EXPECT_TRUE(logits[i] == grad[i] || (std::isnan(logits[i]) && grad[i] == kUntouched));
  }
}

// A duration without a finite logit makes the loss NaN, and only that of its utterance.
void TestNonFiniteDurations() {
  constexpr int64_t kPitch = DurationStages::kPitch;
  constexpr double kInf = std::numeric_limits<double>::infinity();
  BatchFixture fixture({3, 3}, {1, 1}, Layout::kPacked, kVocab, 3);
  DurationStages stages(fixture.batch, true, false);
  const auto logits = RandomVector<double>(fixture.batch.num_rows * kPitch, 1, 4);
  for (const double value : {kInf, std::numeric_limits<double>::quiet_NaN()}) {
    auto x = logits;
    x[kVocab + 1] = value;
    stages.Forward(x);
    EXPECT_TRUE(std::isnan(stages.loss[0]) && std::isfinite(stages.loss[1]));
    for (int64_t k = 0; k < 3; ++k) EXPECT_TRUE(std::isnan(stages.extra[k]));
    std::vector<double> grad(x.size());
    stages.Backward({nullptr, 0, fixture.batch.num_rows}, x.data(), {0, 1}, 0, grad.data());
    for (const double g : grad) EXPECT_TRUE(std::isfinite(g));  // masked by a zero gradient
  }
  auto x = logits;
  for (int64_t k = 0; k < 3; ++k) x[kVocab + k] = -kInf;
  stages.Forward(x);
  EXPECT_TRUE(std::isnan(stages.loss[0]) && std::isfinite(stages.loss[1]));
  x[kVocab + 1] = 0;  // the others are excluded
  stages.Forward(x);
  EXPECT_TRUE(std::isfinite(stages.loss[0]) && stages.extra[0] == -kInf && stages.extra[1] == 0);
  std::vector<double> grad(x.size());
  stages.Backward({nullptr, 0, fixture.batch.num_rows}, x.data(), {1, 1}, 0, grad.data());
  for (const double g : grad) EXPECT_TRUE(std::isfinite(g));
  EXPECT_TRUE(grad[kVocab] == 0 && grad[kVocab + 2] == 0);
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
  for (const auto layout : transducer::kLayouts) {
    transducer::TestTiles(layout);
    for (const bool is_tdt : {false, true}) {
      transducer::TestDurationsAgainstDifferences(layout, is_tdt, false);
      transducer::TestDurationsAgainstDifferences(layout, is_tdt, true);
    }
  }
  transducer::TestNonFiniteDurations();
  transducer::TestFloatIsAsGoodAsItsInputs();
  transducer::TestMaskedByZeroGradient();
  return expect::Finish();
}
