// SPDX-License-Identifier: Apache-2.0
// Runs each stage once on fixed input with one thread. benchmarks/instructions.py counts
// instructions.
#include <cstdio>
#include <vector>

#include "../additive_scores.h"
#include "../cell_scores.h"
#include "../joint_tile.h"
#include "../lattice.h"
#include "../logits_grad.h"
#include "../occupancy.h"
#include "../row_kernels.h"
#include "batch_fixture.h"

int main() {
  using namespace transducer;
  constexpr int64_t kVocab = 500, kWidth = 256;
  BatchFixture fixture({60, 50, 47}, {15, 11, 13}, Layout::kPacked, kVocab, 1);
  const LatticeBatch& batch = fixture.batch;
  const RowTile tile = fixture.AllRows();
  const int64_t rows = batch.num_rows;

  const auto enc = RandomVector<float>(3 * batch.max_frames * kWidth, 1, 1);
  const auto pred = RandomVector<float>(3 * (batch.max_targets + 1) * kWidth, 1, 2);
  std::vector<float> hidden(rows * kWidth), grad_enc(enc.size()), grad_pred(pred.size());
  const JoinInputs<float> inputs{enc.data(), pred.data(), kWidth, Activation::kTanh};
  JoinForwardCpu(batch, tile, inputs, 1, hidden.data());
  JoinBackwardCpu<float>(batch, tile, inputs, hidden.data(), hidden.data(), 1, nullptr,
                         {grad_enc.data(), grad_pred.data()});

  std::vector<int8_t> quantized(rows * kWidth);
  std::vector<float> row_scales(rows);
  JoinQuantizedCpu(batch, tile, inputs, 1, quantized.data(), row_scales.data());

  const auto logits = RandomVector<float>(rows * kVocab, 1, 3);
  std::vector<float> grad(logits.size());
  std::vector<Score> normalizer(rows), blank(rows), label(rows), use_blank(rows), use_label(rows);
  std::vector<Score> loss(9);  // and room for dropped mass and thresholds
  const std::vector<Score> loss_grad(3, 1);
  const LogitRows<float> x{logits.data(), kVocab, kVocab};
  const LogitsOptions options{0, false, 0, 0, 0};
  std::vector<int32_t> products(rows * kVocab);
  for (size_t i = 0; i < products.size(); ++i) products[i] = static_cast<int32_t>(1000 * logits[i]);
  const std::vector<float> column_scales(kVocab, 0.1F);
  QuantizedCellScoresCpu(batch, tile,
                         {products.data(), row_scales.data(), column_scales.data(),
                          column_scales.data(), kVocab, kVocab},
                         options, 1, {normalizer.data(), blank.data(), label.data()});
  CellScoresCpu(batch, tile, x, options, 1, {normalizer.data(), blank.data(), label.data()});
  LatticeCpu(batch, {}, {blank.data(), label.data()}, 1, nullptr,
             {loss.data(), use_blank.data(), use_label.data()});
  LogitsGradCpu(batch, tile, x, options,
                {normalizer.data(), use_blank.data(), use_label.data(), loss_grad.data()}, 1,
                grad.data());
  std::vector<int64_t> kept(rows), num_kept(4);
  KeptRowsCpu(batch, {use_blank.data(), use_label.data()}, 1e-6, 1, nullptr,
              {kept.data(), num_kept.data(), loss.data() + 3, loss.data() + 6,
               num_kept.data() + 3});

  constexpr int64_t kFrames = 60, kSymbols = 15, kCells = 3 * kFrames * (kSymbols + 1);
  const auto am = RandomVector<float>(3 * kFrames * kVocab, 1, 4);
  const auto lm = RandomVector<float>(3 * (kSymbols + 1) * kVocab, 1, 5);
  std::vector<float> am_exp(am.size()), lm_exp(lm.size()), am_max(am.size()), lm_max(lm.size());
  const std::vector<float> product(kCells, 9);
  const std::vector<int64_t> symbols(3 * kSymbols, 7);
  std::vector<int64_t> boundary, lattices(4 * 3);
  for (int b = 0; b < 3; ++b) boundary.insert(boundary.end(), {0, 0, kSymbols, kFrames});
  const AdditiveCells<float> cells{3,         kFrames,   kSymbols + 1,   kVocab,
                                   am.data(), lm.data(), product.data(), 1e-6F};
  const AdditiveTerms terms{kSymbols, symbols.data(), boundary.data(), 0, 0.75, 0.25, 0};
  std::vector<Score> norm(kCells), by_blank(kCells), by_label(kCells), lm_sum(lm.size());
  std::vector<Score> of_blank(lm.size()), of_label(lm.size());
  const AdditiveExponentials<float> exps{am_exp.data(), lm_exp.data(), am_max.data(), lm_max.data(),
                                         lm_sum.data()};
  const AdditiveContexts contexts{of_blank.data(), of_label.data(), lattices.data()};
  AdditiveExponentialsCpu(cells, terms, 1, exps, contexts);
  AdditiveScoresCpu(cells, terms, exps, contexts, 1,
                    {norm.data(), by_blank.data(), by_label.data()});
  std::vector<float> weight(kCells), grad_am(am.size(), 1), grad_lm(lm.size(), 1);
  std::vector<Score> grad_norm(kCells);
  const std::vector<Score> factor(3, -1);
  const AdditiveScoreGrads upstream{by_blank.data(), by_label.data(), factor.data()};
  AdditiveWeightsCpu(cells, terms, upstream, 1, grad_norm.data(), weight.data());
  AdditiveGradientsCpu<float>(cells, terms, exps, upstream, {norm.data(), grad_norm.data()}, 1,
                              grad_am.data(), grad_lm.data());
  std::printf("%s %lld cells, loss %.6f\n", GetRowKernelSet().name, static_cast<long long>(rows),
              loss[0]);
  return loss[0] > 0 ? 0 : 1;
}
