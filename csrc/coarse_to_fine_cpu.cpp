// SPDX-License-Identifier: Apache-2.0
#include "coarse_to_fine.h"

#include <algorithm>
#include <vector>

#include "parallel.h"
#include "row_gradient.h"
#include "row_kernels.h"

namespace transducer {
namespace {

constexpr int64_t kRowsAtOnce = 256;  // their probabilities stay in the cache

}  // namespace

void ReplaceScoresCpu(const LatticeBatch& batch, const RowTile& tile, const FineScores& fine,
                      int64_t first_place, int num_threads, const RefinedOut& out) {
  // The first row of the tile that belongs to utterance b or a later one.
  const auto begin_of = [&](int64_t b) {
    int64_t low = 0, high = tile.size;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (batch.UtteranceOf(tile.Row(middle)) < b) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    return low;
  };
  ParallelFor(batch.num_utterances, num_threads, [&](int64_t b) {
    CellCursor cursor(batch);
    Cell cell;
    Score error = out.error[b];
    const int64_t end = begin_of(b + 1);
    for (int64_t i = begin_of(b); i < end; ++i) {
      const int64_t row = tile.Row(i);
      out.places[row] = first_place + i;
      if (!cursor.Find(row, &cell)) continue;  // padding has no fine scores
      const Score of_blank = ErrorOfScore(fine.blank[row], out.blank[row]);
      const Score of_label = ErrorOfScore(fine.label[row], out.label[row]);
      out.blank[row] = fine.blank[row];
      out.label[row] = fine.label[row];
      Score of_extra = 0;
      for (int64_t k = row * fine.num_extra; k < (row + 1) * fine.num_extra; ++k) {
        of_extra = std::max(of_extra, ErrorOfScore(fine.extra[k], out.extra[k]));
        out.extra[k] = fine.extra[k];
      }
      error = std::max(error, std::max(of_blank, of_label) + of_extra);
    }
    out.error[b] = error;
  });
}

int64_t RowWeightsScratchCpu(const LatticeBatch&) { return 0; }

void RowWeightsCpu(const LatticeBatch& batch, const RowWeightsIn& in, const LogitsOptions& logits,
                   const RowWeightsOptions& options, int num_threads, void*, Score* weight) {
  const auto exp_of = GetRowKernelSet().posteriors;
  const int64_t num_extra = logits.NumExtra();
  ParallelFor(batch.num_utterances, num_threads, [&](int64_t b) {
    if (!batch.IsValid(b)) return;
    const int64_t begin = batch.first_row[b], end = begin + NumRowsOf(batch, b);
    Score blank[kRowsAtOnce], label[kRowsAtOnce], gradient = 0;
    std::vector<Score> extra(static_cast<size_t>(num_extra * kRowsAtOnce));
    for (int64_t first = begin; first < end; first += kRowsAtOnce) {
      const int64_t size = std::min(kRowsAtOnce, end - first);
      exp_of(std::copy_n(in.blank + first, size, blank) - size, size);
      exp_of(std::copy_n(in.label + first, size, label) - size, size);
      if (num_extra > 0) {
        std::copy_n(in.extra + first * num_extra, size * num_extra, extra.data());
        exp_of(extra.data(), size * num_extra);
      }
      for (int64_t i = 0; i < size; ++i) {
        const int64_t row = first + i;
        const RowGradient of_row = GradientOfRow(
            logits, blank[i], label[i], in.use_blank[row], in.use_label[row],
            [&](int64_t k) { return extra[static_cast<size_t>(i * num_extra + k)]; },
            [&](int64_t k) { return in.use_extra[row * num_extra + k]; });
        gradient += of_row.size;
        weight[row] = options.of_fine_rows ? of_row.size + of_row.spread : of_row.occupancy;
      }
    }
    const Score scale = WeightScale(batch, b, in, options, gradient);
    for (int64_t row = begin; row < end; ++row) {
      const bool is_fine = in.places[row] >= 0;
      weight[row] = is_fine == options.of_fine_rows ? weight[row] * scale : 0;
    }
  });
}

}  // namespace transducer
