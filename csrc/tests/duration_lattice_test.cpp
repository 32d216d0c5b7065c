// SPDX-License-Identifier: Apache-2.0
// Stage 2 with durations against the list of all paths, and long lattices against a plain recursion.
#include "../duration_lattice.h"

#include <functional>
#include <vector>

#include "../log_add.h"
#include "batch_fixture.h"
#include "expect.h"

namespace transducer {
namespace {

constexpr Score kUnwritten = 12345;

DurationArcs MakeArcs(const std::vector<int>& blank, const std::vector<int>& label) {
  DurationArcs arcs{static_cast<int>(blank.size()), static_cast<int>(label.size()), {}, {}};
  std::copy(blank.begin(), blank.end(), arcs.blank_frames);
  std::copy(label.begin(), label.end(), arcs.label_frames);
  return arcs;
}

// One call of the stage: its inputs, and memory for its outputs.
struct Stage {
  const LatticeBatch& batch;
  DurationArcs arcs;
  LatticeOptions options;
  std::vector<Score> blank, label, loss, use_blank, use_label;

  Stage(const LatticeBatch& batch, const DurationArcs& arcs, const LatticeOptions& options,
        double scale)
      : batch(batch),
        arcs(arcs),
        options(options),
        blank(RandomVector<Score>(batch.num_rows * arcs.num_blank, scale, 1)),
        label(RandomVector<Score>(batch.num_rows * arcs.num_label, scale, 2)) {}

  void Run(int num_threads, bool with_uses = true) {
    loss.assign(batch.num_utterances, kUnwritten);
    use_blank.assign(blank.size(), kUnwritten);
    use_label.assign(label.size(), kUnwritten);
    // All bits set: every number in it is NaN.
    std::vector<unsigned char> scratch(DurationLatticeScratch(batch, with_uses), 0xff);
    DurationLatticeCpu(batch, options, arcs, {blank.data(), label.data()}, num_threads,
                       scratch.data(),
                       {loss.data(), with_uses ? use_blank.data() : nullptr,
                        with_uses ? use_label.data() : nullptr});
  }

  Score& Blank(int64_t row, int k) { return blank[row * arcs.num_blank + k]; }
  Score& Label(int64_t row, int k) { return label[row * arcs.num_label + k]; }

  // A label score with its delay penalty.
  Score Penalized(int64_t b, int64_t t, int64_t row, int k) {
    const int64_t first = batch.first_frame != nullptr ? batch.first_frame[b] : 0;
    const double middle = 0.5 * static_cast<double>(first + batch.num_frames[b] - 1);
    return Label(row, k) + options.delay_penalty * (middle - static_cast<double>(first + t));
  }
};

struct Expected {
  double probability = 0;
  std::vector<double> use_blank, use_label;  // unnormalized, by arc
};

// Walks every path of utterance b.
Expected Enumerate(Stage& stage, const BatchFixture& fixture, int64_t b) {
  const LatticeBatch& batch = stage.batch;
  const int64_t frames = batch.num_frames[b], labels = batch.num_targets[b];
  Expected expected;
  expected.use_blank.assign(stage.blank.size(), 0);
  expected.use_label.assign(stage.label.size(), 0);
  std::vector<double*> used;
  std::function<void(int64_t, int64_t, double)> walk = [&](int64_t t, int64_t u, double score) {
    if (!fixture.Has(b, t, u)) return;
    const int64_t row = batch.Row(b, t, u);
    for (int k = 0; k < stage.arcs.num_blank; ++k) {
      const int64_t to = t + stage.arcs.blank_frames[k];
      const double next = score + stage.Blank(row, k);
      used.push_back(&expected.use_blank[row * stage.arcs.num_blank + k]);
      if (to == frames && u == labels) {
        expected.probability += std::exp(next);
        for (double* use : used) *use += std::exp(next);
      } else {
        walk(to, u, next);
      }
      used.pop_back();
    }
    for (int k = 0; k < stage.arcs.num_label && u < labels; ++k) {
      used.push_back(&expected.use_label[row * stage.arcs.num_label + k]);
      walk(t + stage.arcs.label_frames[k], u + 1, score + stage.Penalized(b, t, row, k));
      used.pop_back();
    }
  };
  walk(0, 0, 0);
  return expected;
}

void TestAgainstEnumeration(const DurationArcs& arcs, Layout layout, double delay_penalty,
                            double fastemit_lambda) {
  BatchFixture fixture({6, 1, 5, 3, 2}, {3, 0, 2, 0, 4}, layout, 9, 5);
  const std::vector<int64_t> first_frame = {3, 0, 1, 0, 7};
  if (fastemit_lambda > 0) fixture.batch.first_frame = first_frame.data();
  const LatticeBatch& batch = fixture.batch;
  Stage stage(batch, arcs, {Topology::kRegular, delay_penalty, fastemit_lambda}, 2);
  stage.Run(1, false);
  const std::vector<Score> loss_only = stage.loss;
  stage.Run(3);
  EXPECT_TRUE(stage.loss == loss_only);
  std::vector<bool> is_cell(batch.num_rows, false);
  for (int64_t b = 0; b < batch.num_utterances; ++b) {
    const Expected expected = Enumerate(stage, fixture, b);
    const double p = expected.probability > 0 ? expected.probability : 1;
    EXPECT_NEAR(stage.loss[b], -std::log(expected.probability), 1e-12);
    for (int64_t t = 0; t < batch.num_frames[b]; ++t) {
      for (int64_t u = 0; u <= batch.num_targets[b]; ++u) {
        if (!fixture.Has(b, t, u)) continue;
        const int64_t row = batch.Row(b, t, u);
        is_cell[row] = true;
        for (int64_t i = row * arcs.num_blank; i < (row + 1) * arcs.num_blank; ++i) {
          EXPECT_NEAR(stage.use_blank[i], expected.use_blank[i] / p, 1e-12);
        }
        for (int64_t i = row * arcs.num_label; i < (row + 1) * arcs.num_label; ++i) {
          EXPECT_NEAR(stage.use_label[i], (1 + fastemit_lambda) * expected.use_label[i] / p, 1e-12);
        }
      }
    }
  }
  for (int64_t row = 0; row < batch.num_rows; ++row) {
    if (is_cell[row]) continue;
    EXPECT_TRUE(stage.use_blank[row * arcs.num_blank] == kUnwritten);
    EXPECT_TRUE(stage.use_label[row * arcs.num_label] == kUnwritten);
  }
}

// The forward recursion, arc by arc.
double PlainLoss(Stage& stage, const BatchFixture& fixture, int64_t b) {
  const LatticeBatch& batch = stage.batch;
  const int64_t frames = batch.num_frames[b], labels = batch.num_targets[b], width = labels + 1;
  std::vector<Score> alpha(frames * width, kLogZero);
  Score end = kLogZero;
  alpha[0] = 0;
  for (int64_t t = 0; t < frames; ++t) {
    for (int64_t u = 0; u <= labels; ++u) {
      if (!fixture.Has(b, t, u)) continue;
      const int64_t row = batch.Row(b, t, u);
      const Score here = alpha[t * width + u];
      for (int k = 0; k < stage.arcs.num_blank; ++k) {
        const int64_t to = t + stage.arcs.blank_frames[k];
        if (to > frames || (to == frames && u < labels)) continue;
        Score& there = to == frames ? end : alpha[to * width + u];
        there = LogAdd(there, here + stage.Blank(row, k));
      }
      for (int k = 0; k < stage.arcs.num_label && u < labels; ++k) {
        const int64_t to = t + stage.arcs.label_frames[k];
        if (to >= frames || !fixture.Has(b, to, u + 1)) continue;
        Score& there = alpha[to * width + u + 1];
        there = LogAdd(there, here + stage.Penalized(b, t, row, k));
      }
    }
  }
  return -end;
}

// Longer lattices, on any number of threads. The labels of a path are U, its frames T.
void TestLong(const DurationArcs& arcs, Layout layout) {
  BatchFixture fixture({200, 90, 131, 70}, {40, 25, 0, 21}, layout, 9, 6);
  const LatticeBatch& batch = fixture.batch;
  Stage stage(batch, arcs, {Topology::kRegular, 0.01, 0.25}, 3);
  stage.Run(1);
  const std::vector<Score> loss = stage.loss, use_blank = stage.use_blank;
  const std::vector<Score> use_label = stage.use_label;
  for (const int threads : {2, 3, 7}) {
    stage.Run(threads);
    EXPECT_TRUE(stage.loss == loss && stage.use_blank == use_blank);
    EXPECT_TRUE(stage.use_label == use_label);
  }
  for (int64_t b = 0; b < batch.num_utterances; ++b) {
    EXPECT_NEAR(loss[b], PlainLoss(stage, fixture, b), 1e-9);
    if (loss[b] == -kLogZero) continue;
    double num_labels = 0, num_frames = 0;
    for (int64_t t = 0; t < batch.num_frames[b]; ++t) {
      for (int64_t u = 0; u <= batch.num_targets[b]; ++u) {
        if (!fixture.Has(b, t, u)) continue;
        const int64_t row = batch.Row(b, t, u);
        for (int k = 0; k < arcs.num_blank; ++k) {
          num_frames += arcs.blank_frames[k] * use_blank[row * arcs.num_blank + k];
        }
        for (int k = 0; k < arcs.num_label; ++k) {
          const double use = use_label[row * arcs.num_label + k] / 1.25;
          num_labels += use;
          num_frames += arcs.label_frames[k] * use;
        }
      }
    }
    EXPECT_NEAR(num_labels, static_cast<double>(batch.num_targets[b]), 1e-8);
    EXPECT_NEAR(num_frames, static_cast<double>(batch.num_frames[b]), 1e-8);
  }
}

void TestNonFinite() {
  const DurationArcs arcs = MakeArcs({1, 2}, {0, 1, 2});
  BatchFixture fixture({3, 3, 3, 3, 1}, {2, 2, 2, 2, 1}, Layout::kPacked, 9, 5);
  const LatticeBatch& batch = fixture.batch;
  Stage stage(batch, arcs, {}, 1);
  stage.Run(1);
  const std::vector<Score> clean = stage.loss, clean_use = stage.use_label;
  // On no path: a blank of 2 frames from the last frame.
  stage.Blank(batch.Row(0, 2, 1), 1) = kNaN;
  // On no path: a label that leaves the last frame.
  stage.Label(batch.Row(2, 2, 0), 2) = kNaN;
  // The ways to the end of utterance 3: by 1 frame from the last frame, by 2 from that before.
  stage.Blank(batch.Row(3, 2, 2), 0) = kLogZero;
  stage.Blank(batch.Row(3, 1, 2), 1) = kLogZero;
  // The scores of the last column of labels are of no arc.
  stage.Label(batch.Row(1, 1, 2), 0) = kNaN;
  stage.Run(2);
  for (const int64_t b : {0, 2}) {
    EXPECT_TRUE(std::isnan(stage.loss[b]));
    const int64_t first = batch.first_row[b], end = batch.first_row[b + 1];
    for (int64_t i = first * 2; i < end * 2; ++i) EXPECT_TRUE(std::isnan(stage.use_blank[i]));
    for (int64_t i = first * 3; i < end * 3; ++i) EXPECT_TRUE(std::isnan(stage.use_label[i]));
  }
  EXPECT_TRUE(stage.loss[1] == clean[1] && stage.loss[4] == clean[4]);
  for (int64_t i = batch.first_row[1] * 3; i < batch.first_row[2] * 3; ++i) {
    EXPECT_TRUE(stage.use_label[i] == clean_use[i]);
  }
  EXPECT_TRUE(stage.loss[3] == -kLogZero);
  for (int64_t i = batch.first_row[3] * 2; i < batch.first_row[4] * 2; ++i) {
    EXPECT_TRUE(stage.use_blank[i] == 0);
  }
  for (int64_t i = batch.first_row[3] * 3; i < batch.first_row[4] * 3; ++i) {
    EXPECT_TRUE(stage.use_label[i] == 0);
  }
  // A score of -inf takes one arc away and leaves the others.
  stage.Blank(batch.Row(3, 2, 2), 0) = -1;
  stage.Run(1);
  EXPECT_TRUE(std::isfinite(stage.loss[3]));
  EXPECT_TRUE(stage.use_blank[batch.Row(3, 1, 2) * 2 + 1] == 0);
  EXPECT_NEAR(stage.use_blank[batch.Row(3, 2, 2) * 2], 1, 1e-12);
}

// Durations that no path can use, and lengths that no durations add up to.
void TestNoPath() {
  BatchFixture fixture({7, 6, 3}, {2, 0, 2}, Layout::kPadded, 9, 5);
  Stage stage(fixture.batch, MakeArcs({2, 50}, {2, 50}), {}, 1);
  stage.Run(1);
  EXPECT_TRUE(stage.loss[0] == -kLogZero && stage.loss[2] == -kLogZero);  // 7 is odd; 3 < 6
  double sum = 0;
  for (int64_t t = 0; t < 6; t += 2) sum += stage.Blank(fixture.batch.Row(1, t, 0), 0);
  EXPECT_NEAR(stage.loss[1], -sum, 1e-12);  // the only path
  for (int64_t t = 0; t < 6; ++t) {
    const int64_t row = fixture.batch.Row(1, t, 0);
    EXPECT_NEAR(stage.use_blank[row * 2], t % 2 == 0 ? 1 : 0, 1e-12);
    EXPECT_TRUE(stage.use_blank[row * 2 + 1] == 0);
  }
}

// An utterance with invalid lengths gets NaN, its neighbors what they had. Its uses are not written.
void TestInvalidLengths() {
  const DurationArcs arcs = MakeArcs({1, 3}, {0, 3});
  for (const auto layout : kLayouts) {
    BatchFixture fixture({4, 3, 4}, {2, 1, 2}, layout, 9, 5);
    const LatticeBatch& batch = fixture.batch;
    Stage stage(batch, arcs, {}, 1);
    stage.Run(2);
    const std::vector<Score> clean = stage.loss;
    const int64_t rows[] = {batch.Row(1, 0, 0), batch.Row(1, 2, 1)};
    for (const int64_t frames : {int64_t{0}, int64_t{-1}, int64_t{5}, INT64_MAX, INT64_MIN}) {
      fixture.num_frames[1] = frames;
      stage.Run(2);
      EXPECT_TRUE(stage.loss[0] == clean[0] && stage.loss[2] == clean[2]);
      EXPECT_TRUE(std::isnan(stage.loss[1]));
      for (const int64_t row : rows) EXPECT_TRUE(stage.use_blank[row * 2] == kUnwritten);
    }
    fixture.num_frames[1] = 3;
    for (const int64_t labels : {int64_t{-1}, int64_t{3}, INT64_MAX, INT64_MIN}) {
      fixture.num_targets[1] = labels;
      stage.Run(2);
      EXPECT_TRUE(stage.loss[0] == clean[0] && stage.loss[2] == clean[2]);
      EXPECT_TRUE(std::isnan(stage.loss[1]));
    }
  }
}

}  // namespace
}  // namespace transducer

int main() {
  using transducer::MakeArcs;
  // Arcs of TDT, with and without durations 0 and 1, and of multi-blank.
  std::vector<int> all(transducer::kMaxDurations);
  for (int k = 0; k < transducer::kMaxDurations; ++k) all[k] = k + 1;
  const transducer::DurationArcs cases[] = {
      MakeArcs({1, 2, 3}, {0, 1, 2, 3}), MakeArcs({1}, {0, 1}),    MakeArcs({1, 2}, {1, 2}),
      MakeArcs({2, 5}, {0, 2, 5}),       MakeArcs({2, 3}, {2, 3}), MakeArcs({1, 4, 2}, {0}),
      MakeArcs({1, 2, 900}, {0}),        MakeArcs({1}, {0}),       MakeArcs(all, all)};
  for (const auto& arcs : cases) {
    for (const auto layout : transducer::kLayouts) {
      transducer::TestAgainstEnumeration(arcs, layout, 0, 0);
      transducer::TestAgainstEnumeration(arcs, layout, 0.3, 0.5);
      transducer::TestLong(arcs, layout);
    }
  }
  transducer::TestNonFinite();
  transducer::TestNoPath();
  transducer::TestInvalidLengths();
  return expect::Finish();
}
