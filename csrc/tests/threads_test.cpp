// SPDX-License-Identifier: Apache-2.0
// Calls every CPU stage from several threads at once and compares the bits with those of one
// thread. The thread sanitizer finds races between rows or utterances here.
#include <thread>
#include <vector>

#include "../cell_scores.h"
#include "../coarse_to_fine.h"
#include "../joint_tile.h"
#include "../lattice.h"
#include "../logits_grad.h"
#include "../normalizer_repair.h"
#include "../occupancy.h"
#include "batch_fixture.h"
#include "expect.h"

namespace transducer {
namespace {

constexpr int64_t kVocab = 19, kWidth = 300;

// All that the stages write, one after the other.
struct Outputs {
  std::vector<Score> scores;
  std::vector<float> values;
  std::vector<int64_t> kept;

  template <typename T>
  void Add(const std::vector<T>& part) {
    if constexpr (std::is_same_v<T, Score>) {
      scores.insert(scores.end(), part.begin(), part.end());
    } else {
      values.insert(values.end(), part.begin(), part.end());
    }
  }
  bool operator==(const Outputs& other) const {
    return scores == other.scores && values == other.values && kept == other.kept;
  }
};

Outputs RunStages(const BatchFixture& fixture, Topology topology, int num_threads) {
  const LatticeBatch& batch = fixture.batch;
  const RowTile tile = fixture.AllRows();
  const int64_t rows = batch.num_rows, size = batch.num_utterances;
  Outputs outputs;

  const auto enc = RandomVector<float>(size * batch.max_frames * kWidth, 1, 1);
  const auto pred = RandomVector<float>(size * (batch.max_targets + 1) * kWidth, 1, 2);
  std::vector<float> hidden(rows * kWidth), grad_enc(enc.size()), grad_pred(pred.size());
  const JoinInputs<float> inputs{enc.data(), pred.data(), kWidth, Activation::kTanh};
  JoinForwardCpu(batch, tile, inputs, num_threads, hidden.data());
  JoinBackwardCpu<float>(batch, tile, inputs, hidden.data(), hidden.data(), num_threads, nullptr,
                         {grad_enc.data(), grad_pred.data()});

  const auto logits = RandomVector<float>(rows * kVocab, 3, 3);
  std::vector<float> grad(logits.size());
  std::vector<Score> normalizer(rows), blank(rows), label(rows), use_blank(rows), use_label(rows);
  std::vector<Score> loss(size), loss_alone(size), dropped(size);
  std::vector<char> scratch(LatticeScratchCpu(batch, topology, false));
  const std::vector<Score> loss_grad(size, 1);
  const LatticeOptions options{topology, 0.1, 0.2, true};
  const LogitRows<float> x{logits.data(), kVocab, kVocab};
  const LatticeScores scores{blank.data(), label.data()};
  CellScoresCpu(batch, tile, x, {0, false, 0}, num_threads,
                {normalizer.data(), blank.data(), label.data()});
  LatticeCpu(batch, options, scores, num_threads, nullptr,
             {loss.data(), use_blank.data(), use_label.data()});
  LatticeCpu(batch, options, scores, num_threads, scratch.data(),
             {loss_alone.data(), nullptr, nullptr});
  LogitsGradCpu(batch, tile, x, {0, false, 0},
                {normalizer.data(), use_blank.data(), use_label.data(), loss_grad.data()},
                num_threads, grad.data());
  std::vector<int64_t> num_kept(size);
  std::vector<Score> lowest(size);
  int64_t total;
  outputs.kept.resize(rows);
  KeptRowsCpu(batch, {use_blank.data(), use_label.data()}, 1e-2, num_threads, nullptr,
              {outputs.kept.data(), num_kept.data(), dropped.data(), lowest.data(), &total});
  outputs.kept.resize(total);

  // Every third row is refined.
  std::vector<int64_t> refined, places(rows, -1);
  for (int64_t row = 0; row < rows; row += 3) refined.push_back(row);
  auto coarse_blank = blank, coarse_label = label;
  for (int64_t row = 0; row < rows; ++row) coarse_blank[row] -= 0.01 * (row % 7);
  std::vector<Score> error(size), weight(rows);
  const RowTile list{refined.data(), 0, static_cast<int64_t>(refined.size())};
  ReplaceScoresCpu(batch, list, {blank.data(), label.data(), nullptr, 0}, 0, num_threads,
                   {coarse_blank.data(), coarse_label.data(), nullptr, places.data(),
                    error.data()});
  RowWeightsCpu(batch,
                {coarse_blank.data(), coarse_label.data(), nullptr, use_blank.data(),
                 use_label.data(), nullptr, nullptr, error.data(), places.data()},
                {0, false, 0}, {false, 1, 0, 0, 10, 1e-2}, num_threads, nullptr, weight.data());

  const auto am = RandomVector<float>(2 * 9 * kWidth, 90, 4);
  const auto lm = RandomVector<float>(2 * 5 * kWidth, 90, 5);
  const std::vector<float> product(2 * 9 * 5, 0);  // every cell underflowed
  const AdditiveCells<float> cells{2, 9, 5, kWidth, am.data(), lm.data(), product.data(), 1e-20f};
  std::vector<Score> repaired(product.size());
  const std::vector<Score> ones(product.size(), 1);
  std::vector<float> grad_am(am.size()), grad_lm(lm.size());
  RepairNormalizerCpu(cells, num_threads, repaired.data());
  RepairNormalizerBackwardCpu(cells, repaired.data(), ones.data(), num_threads, grad_am.data(),
                              grad_lm.data());

  outputs.kept.insert(outputs.kept.end(), num_kept.begin(), num_kept.end());
  outputs.kept.insert(outputs.kept.end(), places.begin(), places.end());
  for (const auto& part : {normalizer, blank, label, loss, loss_alone, use_blank, use_label,
                           dropped, repaired, coarse_blank, coarse_label, error, weight}) {
    outputs.Add(part);
  }
  for (const auto& part : {hidden, grad_enc, grad_pred, grad, grad_am, grad_lm}) outputs.Add(part);
  return outputs;
}

void TestManyCallers(Topology topology, Layout layout) {
  const BatchFixture fixture({13, 9, 1, 11, 6}, {5, 7, 1, 0, 4}, layout, kVocab, 7);
  const Outputs expected = RunStages(fixture, topology, 1);
  EXPECT_TRUE(RunStages(fixture, topology, 3) == expected);
  constexpr int kCallers = 4;
  std::vector<int> same(kCallers, 0);
  std::vector<std::thread> callers;
  for (int i = 0; i < kCallers; ++i) {
    callers.emplace_back([&, i] {
      for (int k = 0; k < 3; ++k) same[i] += RunStages(fixture, topology, 1 + k) == expected;
    });
  }
  for (std::thread& caller : callers) caller.join();
  for (const int count : same) EXPECT_TRUE(count == 3);
}

}  // namespace
}  // namespace transducer

int main() {
  using transducer::Topology;
  for (int i = 0; i < transducer::kNumTopologies; ++i) {
    const auto topology = static_cast<Topology>(i);
    for (const auto layout : transducer::kLayouts) transducer::TestManyCallers(topology, layout);
  }
  return expect::Finish();
}
