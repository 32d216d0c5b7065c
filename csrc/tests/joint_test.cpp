// SPDX-License-Identifier: Apache-2.0
// Packing and its segmented sums against plain loops.
#include "../joint_tile.h"

#include <limits>
#include <vector>

#include "batch_fixture.h"
#include "expect.h"

namespace transducer {
namespace {

template <typename T>
void TestJoin(Activation activation, Layout layout, int64_t width) {
  BatchFixture fixture({5, 1, 3}, {4, 2, 0}, layout, 9, 1);
  const LatticeBatch& batch = fixture.batch;
  const int64_t size = batch.num_utterances, columns = batch.max_targets + 1;
  auto enc = RandomVector<T>(size * batch.max_frames * width, 1, 1);
  auto pred = RandomVector<T>(size * columns * width, 1, 2);
  const auto grad_hidden = RandomVector<T>(batch.num_rows * width, 1, 3);
  for (int64_t b = 0; b < size; ++b) {  // padding must never be read
    for (int64_t t = batch.num_frames[b]; t < batch.max_frames; ++t) {
      std::fill_n(enc.begin() + (b * batch.max_frames + t) * width, width, T(NAN));
    }
    for (int64_t u = batch.num_targets[b] + 1; u < columns; ++u) {
      std::fill_n(pred.begin() + (b * columns + u) * width, width, T(NAN));
    }
  }
  std::vector<T> hidden(batch.num_rows * width, T(99));
  const JoinInputs<T> inputs{enc.data(), pred.data(), width, activation};
  JoinForwardCpu(batch, fixture.AllRows(), inputs, 2, hidden.data());
  std::vector<T> grad_enc(enc.size()), grad_pred(pred.size());
  JoinBackwardCpu<T>(batch, fixture.AllRows(), inputs, hidden.data(), grad_hidden.data(), 2,
                     nullptr, {grad_enc.data(), grad_pred.data()});

  std::vector<double> expected_enc(enc.size()), expected_pred(pred.size());
  std::vector<bool> is_cell(batch.num_rows);
  for (int64_t b = 0; b < size; ++b) {
    for (int64_t t = 0; t < batch.num_frames[b]; ++t) {
      for (int64_t u = 0; u <= batch.num_targets[b]; ++u) {
        if (!fixture.Has(b, t, u)) continue;
        const int64_t row = batch.Row(b, t, u);
        is_cell[row] = true;
        for (int64_t d = 0; d < width; ++d) {
          const int64_t at_enc = (b * batch.max_frames + t) * width + d;
          const int64_t at_pred = (b * columns + u) * width + d;
          const double x = static_cast<double>(enc[at_enc]) + pred[at_pred];
          const bool tanh = activation == Activation::kTanh;
          const double y = tanh ? std::tanh(x) : x;
          EXPECT_NEAR(hidden[row * width + d], y, 1e-6);
          const double g = grad_hidden[row * width + d] * (tanh ? 1 - y * y : 1);
          expected_enc[at_enc] += g;
          expected_pred[at_pred] += g;
        }
      }
    }
  }
  for (size_t i = 0; i < enc.size(); ++i) EXPECT_NEAR(grad_enc[i], expected_enc[i], 5e-6);
  for (size_t i = 0; i < pred.size(); ++i) EXPECT_NEAR(grad_pred[i], expected_pred[i], 5e-6);
  for (int64_t row = 0; row < batch.num_rows; ++row) {
    if (!is_cell[row]) EXPECT_TRUE(hidden[row * width] == 0);
  }

  // In pieces, on one thread: the same sums, bit for bit.
  std::vector<T> one_enc(enc.size()), one_pred(pred.size()), tile(7 * width);
  for (int64_t begin = 0; begin < batch.num_rows; begin += 7) {
    const RowTile rows{nullptr, begin, std::min<int64_t>(7, batch.num_rows - begin)};
    JoinForwardCpu(batch, rows, inputs, 1, tile.data());
    JoinBackwardCpu<T>(batch, rows, inputs, tile.data(), grad_hidden.data() + begin * width, 1,
                       nullptr, {one_enc.data(), one_pred.data()});
  }
  EXPECT_TRUE(one_enc == grad_enc && one_pred == grad_pred);
}

}  // namespace
}  // namespace transducer

int main() {
  using transducer::Activation;
  for (const auto activation : {Activation::kTanh, Activation::kIdentity}) {
    for (const auto layout : transducer::kLayouts) {
      for (const int64_t width : {1, 7, 128, 300}) {
        transducer::TestJoin<float>(activation, layout, width);
        transducer::TestJoin<double>(activation, layout, width);
      }
    }
  }
  return expect::Finish();
}
