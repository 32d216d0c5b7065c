// SPDX-License-Identifier: Apache-2.0
// The stages of 8-bit products: the quantized join and the scores of integer logits, against plain
// loops.
#include <cstring>
#include <exception>
#include <limits>
#include <random>
#include <vector>

#include "../cell_scores.h"
#include "../joint_tile.h"
#include "batch_fixture.h"
#include "expect.h"

namespace transducer {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();

// Calls visit(b, t, u, row) for each cell of the batch.
template <typename Visit>
void ForEachCell(const BatchFixture& fixture, const Visit& visit) {
  const LatticeBatch& batch = fixture.batch;
  for (int64_t b = 0; b < batch.num_utterances; ++b) {
    for (int64_t t = 0; t < batch.num_frames[b]; ++t) {
      for (int64_t u = 0; u <= batch.num_targets[b]; ++u) {
        if (fixture.Has(b, t, u)) visit(b, t, u, batch.Row(b, t, u));
      }
    }
  }
}

void TestJoin(Activation activation, Layout layout, int64_t width) {
  BatchFixture fixture({5, 1, 3}, {4, 2, 0}, layout, 9, 1);
  const LatticeBatch& batch = fixture.batch;
  const int64_t columns = batch.max_targets + 1;
  auto enc = RandomVector<float>(3 * batch.max_frames * width, 1, 1);
  auto pred = RandomVector<float>(3 * columns * width, 1, 2);
  const auto frame = [&](int64_t b, int64_t t) {
    return enc.begin() + (b * batch.max_frames + t) * width;
  };
  for (int64_t b = 0; b < 3; ++b) {  // padding must never be read
    for (int64_t t = batch.num_frames[b]; t < batch.max_frames; ++t) {
      std::fill_n(frame(b, t), width, NAN);
    }
    for (int64_t u = batch.num_targets[b] + 1; u < columns; ++u) {
      std::fill_n(pred.begin() + (b * columns + u) * width, width, NAN);
    }
  }
  for (int64_t d = 0; d < width; ++d) frame(0, 1)[d] *= 1e6f;  // a large frame
  *frame(0, 2) = NAN;
  frame(0, 3)[width - 1] = kInf;  // 1 after tanh
  frame(0, 4)[width / 2] = 1e4f;  // an outlier among the channels
  std::fill_n(frame(2, 1), width, 0.0f);
  std::fill_n(pred.begin() + 2 * columns * width, width, 0.0f);  // the join of (2, 1, 0) is zero

  const JoinInputs<float> inputs{enc.data(), pred.data(), width, activation};
  std::vector<float> exact(batch.num_rows * width);
  JoinForwardCpu(batch, fixture.AllRows(), inputs, 1, exact.data());
  std::vector<int8_t> hidden(batch.num_rows * width, 99);
  std::vector<float> scales(batch.num_rows, 99);
  JoinQuantizedCpu(batch, fixture.AllRows(), inputs, 2, hidden.data(), scales.data());

  std::vector<bool> is_cell(batch.num_rows);
  ForEachCell(fixture, [&](int64_t b, int64_t t, int64_t, int64_t row) {
    is_cell[row] = true;
    const float* x = exact.data() + row * width;
    float max = 0;
    bool is_finite = true;
    for (int64_t d = 0; d < width; ++d) {
      is_finite &= std::isfinite(x[d]);
      max = std::max(max, std::abs(x[d]));
    }
    EXPECT_TRUE(std::isnan(scales[row]) == !is_finite);
    if (b == 2 && t == 1) EXPECT_TRUE(scales[row] == 0);
    if (!is_finite) return;
    const float slack = activation == Activation::kTanh ? 3e-4f : 0.0f;
    EXPECT_NEAR(scales[row], max / 127.0f, slack / 127.0f);
    for (int64_t d = 0; d < width; ++d) {
      EXPECT_NEAR(hidden[row * width + d] * scales[row], x[d], 0.5001 * scales[row] + slack);
    }
  });
  for (int64_t row = 0; row < batch.num_rows; ++row) {
    if (is_cell[row]) continue;
    EXPECT_TRUE(scales[row] == 0);
    for (int64_t d = 0; d < width; ++d) EXPECT_TRUE(hidden[row * width + d] == 0);
  }

  // Lists of rows in pieces, on one thread: the same bits.
  std::vector<int64_t> reversed;
  for (int64_t row = batch.num_rows - 1; row >= 0; --row) reversed.push_back(row);
  std::vector<int8_t> part(7 * width);
  std::vector<float> part_scales(7);
  for (int64_t begin = 0; begin < batch.num_rows; begin += 7) {
    const RowTile tile{reversed.data(), begin, std::min<int64_t>(7, batch.num_rows - begin)};
    JoinQuantizedCpu(batch, tile, inputs, 1, part.data(), part_scales.data());
    for (int64_t i = 0; i < tile.size; ++i) {
      const int64_t row = reversed[begin + i];
      EXPECT_TRUE(std::memcmp(&part_scales[i], &scales[row], sizeof(float)) == 0);
      EXPECT_TRUE(std::memcmp(&part[i * width], &hidden[row * width], width) == 0);
    }
  }
}

void TestTooWide() {
  BatchFixture fixture({1}, {0}, Layout::kPacked, 9, 1);
  const int64_t width = kMaxQuantizedWidth + 1;
  const std::vector<float> enc(width), pred(width);
  std::vector<int8_t> hidden(width);
  float scale;
  bool has_thrown = false;
  try {
    JoinQuantizedCpu(fixture.batch, fixture.AllRows(),
                     {enc.data(), pred.data(), width, Activation::kTanh}, 1, hidden.data(), &scale);
  } catch (const std::exception&) {
    has_thrown = true;
  }
  EXPECT_TRUE(has_thrown);
}

void TestScores(Layout layout, int64_t vocab, bool has_bias) {
  BatchFixture fixture({5, 1, 3}, {4, 2, 0}, layout, vocab, 1);
  fixture.targets[1] = vocab;  // outside of the vocabulary
  const LatticeBatch& batch = fixture.batch;
  const int64_t rows = batch.num_rows, blank = vocab / 2;
  std::mt19937 random(static_cast<unsigned>(vocab));
  std::vector<int32_t> data;
  for (int64_t i = 0; i < rows * vocab; ++i) {
    data.push_back(static_cast<int32_t>(random() % 200'001) - 100'000);
  }
  auto row_scales = RandomVector<float>(rows, 1e-2, 1),
       columns = RandomVector<float>(vocab, 1e-2, 2);
  auto bias = RandomVector<float>(vocab, 3, 3);
  for (float& scale : columns) scale = std::abs(scale);
  columns[vocab - 1] *= 100;       // an outlier
  if (vocab > 2) bias[1] = -kInf;  // impossible
  const int64_t nan_row = batch.Row(0, 1, batch.ColumnBegin(0, 1));
  const int64_t zero_row = batch.Row(0, 2, batch.ColumnBegin(0, 2));
  const int64_t large_row = batch.Row(0, 3, batch.ColumnBegin(0, 3));
  row_scales[nan_row] = NAN;
  row_scales[zero_row] = 0;
  row_scales[large_row] = 1e3f;

  constexpr Score kUnwritten = -12345;
  std::vector<Score> normalizer(rows, kUnwritten), by_blank(rows, kUnwritten);
  std::vector<Score> by_label(rows, kUnwritten);
  const LogitsOptions options{blank, false, 0};
  const float* offset = has_bias ? bias.data() : nullptr;
  QuantizedCellScoresCpu(batch, fixture.AllRows(),
                         {data.data(), row_scales.data(), columns.data(), offset, vocab, vocab},
                         options, 2, {normalizer.data(), by_blank.data(), by_label.data()});

  std::vector<bool> is_cell(rows);
  ForEachCell(fixture, [&](int64_t b, int64_t, int64_t u, int64_t row) {
    is_cell[row] = true;
    std::vector<double> x;
    double size = 0;
    for (int64_t v = 0; v < vocab; ++v) {
      const double product =
          static_cast<double>(data[row * vocab + v]) * row_scales[row] * columns[v];
      size = std::max(size, std::abs(product));
      x.push_back(product + (has_bias ? bias[v] : 0));
    }
    const double max = *std::max_element(x.begin(), x.end());
    double sum = 0;
    for (const double value : x) sum += std::exp(value - max);
    const double expected = row == nan_row ? NAN : max + std::log(sum), room = 1.2e-4 + 1e-6 * size;
    EXPECT_NEAR(normalizer[row], expected, room);
    EXPECT_NEAR(by_blank[row], x[blank] - expected, room);
    if (u == batch.num_targets[b]) {
      EXPECT_TRUE(by_label[row] == kLogZero);
      return;
    }
    const int64_t target = batch.Target(b, u);
    EXPECT_NEAR(by_label[row], target < vocab ? x[target] - expected : NAN, room);
  });
  for (int64_t row = 0; row < rows; ++row) {
    const bool is_written =
        normalizer[row] != kUnwritten || by_blank[row] != kUnwritten || by_label[row] != kUnwritten;
    EXPECT_TRUE(is_written == is_cell[row]);
  }

  // Lists of rows in pieces, on one thread: the same bits.
  std::vector<Score> again[3];
  for (auto& scores : again) scores.assign(rows, kUnwritten);
  for (int64_t begin = 0; begin < rows; begin += 7) {
    const int64_t size = std::min<int64_t>(7, rows - begin);
    std::vector<int64_t> list;
    std::vector<int32_t> part;
    std::vector<float> scales;
    for (int64_t i = size - 1; i >= 0; --i) {
      const int64_t row = begin + i;
      list.push_back(row);
      scales.push_back(row_scales[row]);
      part.insert(part.end(), data.begin() + row * vocab, data.begin() + (row + 1) * vocab);
    }
    QuantizedCellScoresCpu(batch, {list.data(), 0, size},
                           {part.data(), scales.data(), columns.data(), offset, vocab, vocab},
                           options, 1, {again[0].data(), again[1].data(), again[2].data()});
  }
  const size_t bytes = static_cast<size_t>(rows) * sizeof(Score);
  EXPECT_TRUE(std::memcmp(again[0].data(), normalizer.data(), bytes) == 0);
  EXPECT_TRUE(std::memcmp(again[1].data(), by_blank.data(), bytes) == 0);
  EXPECT_TRUE(std::memcmp(again[2].data(), by_label.data(), bytes) == 0);
}

}  // namespace
}  // namespace transducer

int main() {
  using transducer::Activation;
  transducer::TestTooWide();
  for (const auto layout : transducer::kLayouts) {
    for (const auto activation : {Activation::kTanh, Activation::kIdentity, Activation::kRelu}) {
      for (const int64_t width : {1, 7, 16, 31, 33, 128, 300}) {
        transducer::TestJoin(activation, layout, width);
      }
    }
    for (const int64_t vocab : {2, 7, 16, 37, 500}) {
      for (const bool has_bias : {false, true}) transducer::TestScores(layout, vocab, has_bias);
    }
  }
  return expect::Finish();
}
