// SPDX-License-Identifier: Apache-2.0
// Stage 2 against the list of all paths, for every topology and layout.
#include "../lattice.h"

#include <functional>
#include <vector>

#include "batch_fixture.h"
#include "expect.h"

namespace transducer {
namespace {

struct Expected {
  double probability = 0;
  std::vector<double> use_blank, use_label;  // unnormalized, by cell t * (U + 1) + u
};

// Walks every path of one utterance through cells that it `has`. `blank(t, u)` and `label(t, u)` are
// log scores.
Expected Enumerate(Topology topology, int64_t frames, int64_t labels,
                   const std::function<bool(int64_t, int64_t)>& has,
                   const std::function<double(int64_t, int64_t)>& blank,
                   const std::function<double(int64_t, int64_t)>& label) {
  const int64_t columns = labels + 1;
  Expected expected;
  expected.use_blank.assign(frames * columns, 0);
  expected.use_label.assign(frames * columns, 0);
  std::vector<int64_t> blanks, label_cells;  // cells whose scores the path so far has used
  std::function<void(int64_t, int64_t, double)> walk = [&](int64_t t, int64_t u, double score) {
    if (t == frames) {
      if (u != labels) return;
      const double p = std::exp(score);
      expected.probability += p;
      for (const int64_t cell : blanks) expected.use_blank[cell] += p;
      for (const int64_t cell : label_cells) expected.use_label[cell] += p;
      return;
    }
    if (!has(t, u)) return;
    blanks.push_back(t * columns + u);
    walk(t + 1, u, score + blank(t, u));
    blanks.pop_back();
    if (u == labels) return;
    const auto& traits = transducer::TraitsOf(topology);
    if (traits.label_frames == 1 && !traits.ends_with_label && t + 1 == frames) return;
    label_cells.push_back(t * columns + u);
    if (traits.label_frames == 0) {
      walk(t, u + 1, score + label(t, u));
    } else if (traits.label_takes_blank && has(t, u + 1)) {
      blanks.push_back(t * columns + u + 1);
      walk(t + 1, u + 1, score + label(t, u) + blank(t, u + 1));
      blanks.pop_back();
    } else if (!traits.label_takes_blank) {
      walk(t + 1, u + 1, score + label(t, u));
    }
    label_cells.pop_back();
  };
  walk(0, 0, 0);
  return expected;
}

void TestAgainstEnumeration(Topology topology, Layout layout, double delay_penalty,
                            double fastemit_lambda) {
  BatchFixture fixture({6, 1, 5, 3, 3}, {5, 0, 2, 0, 3}, layout, 9, 5);
  const std::vector<int64_t> first_frame = {3, 0, 1, 0, 7};
  if (fastemit_lambda > 0) fixture.batch.first_frame = first_frame.data();
  const LatticeBatch& batch = fixture.batch;
  const auto blank = RandomVector<Score>(batch.num_rows, 2, 1);
  const auto label = RandomVector<Score>(batch.num_rows, 2, 2);
  const LatticeOptions options{topology, delay_penalty, fastemit_lambda};
  const int64_t size = batch.num_utterances;
  std::vector<Score> loss(size), loss_only(size);
  std::vector<char> scratch(LatticeScratchCpu(batch, topology, false));
  std::vector<Score> use_blank(batch.num_rows), use_label(batch.num_rows);
  const LatticeScores scores{blank.data(), label.data()};
  LatticeCpu(batch, options, scores, 2, nullptr, {loss.data(), use_blank.data(), use_label.data()});
  LatticeCpu(batch, options, scores, 1, scratch.data(), {loss_only.data(), nullptr, nullptr});
  EXPECT_TRUE(loss == loss_only);
  for (int64_t b = 0; b < size; ++b) {
    const int64_t frames = batch.num_frames[b], labels = batch.num_targets[b];
    const Expected expected = Enumerate(
        topology, frames, labels, [&](int64_t t, int64_t u) { return fixture.Has(b, t, u); },
        [&](int64_t t, int64_t u) { return blank[batch.Row(b, t, u)]; },
        [&](int64_t t, int64_t u) {
          const int64_t first = batch.first_frame != nullptr ? first_frame[b] : 0;
          const double middle = 0.5 * (first + frames - 1);
          return label[batch.Row(b, t, u)] + delay_penalty * (middle - (first + t));
        });
    EXPECT_NEAR(loss[b], -std::log(expected.probability), 1e-12);
    const double p = expected.probability > 0 ? expected.probability : 1;
    for (int64_t t = 0; t < frames; ++t) {
      for (int64_t u = 0; u <= labels; ++u) {
        if (!fixture.Has(b, t, u)) continue;
        const int64_t cell = t * (labels + 1) + u, row = batch.Row(b, t, u);
        double by_blank = expected.use_blank[cell] / p;
        if (transducer::TraitsOf(topology).label_takes_blank &&
            u > 0) {  // FastEmit scales the forced blank too
          by_blank += fastemit_lambda * expected.use_label[cell - 1] / p;
        }
        EXPECT_NEAR(use_blank[row], by_blank, 1e-12);
        EXPECT_NEAR(use_label[row], (1 + fastemit_lambda) * expected.use_label[cell] / p, 1e-12);
      }
    }
  }
}

void TestNonFinite() {
  BatchFixture fixture({3, 3, 3}, {2, 2, 2}, Layout::kPacked, 9, 5);
  const LatticeBatch& batch = fixture.batch;
  auto blank = RandomVector<Score>(batch.num_rows, 1, 1);
  auto label = RandomVector<Score>(batch.num_rows, 1, 2);
  std::vector<Score> loss(3), clean(3), use_blank(batch.num_rows), use_label(batch.num_rows);
  const auto run = [&](std::vector<Score>& out) {
    LatticeCpu(batch, {}, {blank.data(), label.data()}, 1, nullptr,
               {out.data(), use_blank.data(), use_label.data()});
  };
  run(clean);
  blank[batch.Row(0, 0, 2)] = kNaN;
  blank[batch.Row(2, 2, 2)] = kLogZero;  // the only way out
  run(loss);
  EXPECT_TRUE(std::isnan(loss[0]) && std::isnan(use_label[batch.Row(0, 1, 1)]));
  EXPECT_TRUE(loss[1] == clean[1]);
  EXPECT_TRUE(loss[2] == -kLogZero && use_blank[batch.Row(2, 1, 1)] == 0);

  fixture.num_frames[0] = 4;  // more than max_frames: NaN, and nothing out of bounds is touched
  run(loss);
  EXPECT_TRUE(std::isnan(loss[0]));
}

}  // namespace
}  // namespace transducer

int main() {
  using transducer::Topology;
  for (int i = 0; i < transducer::kNumTopologies; ++i) {
    const auto topology = static_cast<Topology>(i);
    for (const auto layout : transducer::kLayouts) {
      transducer::TestAgainstEnumeration(topology, layout, 0, 0);
      transducer::TestAgainstEnumeration(topology, layout, 0.3, 0.5);
    }
  }
  transducer::TestNonFinite();
  return expect::Finish();
}
