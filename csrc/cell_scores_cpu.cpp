// SPDX-License-Identifier: Apache-2.0
#include "cell_scores.h"

#include <algorithm>
#include <cmath>

#include "parallel.h"
#include "row_kernels.h"

namespace transducer {
namespace {

// The log-probability of one symbol of a row; NaN for a logit of +inf. Subtracting the maximum
// first avoids the rounding of max + log_sum.
template <typename T>
Score Pick(const T* row, int64_t index, Score max, Score log_sum) {
  const Score score = (static_cast<Score>(ToCompute(row[index])) - max) - log_sum;
  return score == -kLogZero ? kNaN : score;
}

// out[k] = log_softmax(x)[k].
template <typename T>
void LogSoftmax(const T* x, int64_t size, Score* out) {
  Score max = kLogZero, sum = 0;
  for (int64_t k = 0; k < size; ++k) max = std::max(max, static_cast<Score>(ToCompute(x[k])));
  for (int64_t k = 0; k < size; ++k) sum += std::exp(static_cast<Score>(ToCompute(x[k])) - max);
  const Score log_sum = std::log(sum);
  for (int64_t k = 0; k < size; ++k) {
    out[k] = (static_cast<Score>(ToCompute(x[k])) - max) - log_sum;
  }
}

// The scores of a cell from its logits x.
template <typename T>
void ScoreCell(const LatticeBatch& batch, const Cell& cell, int64_t row, const T* x,
               int64_t vocab_size, const LogitsOptions& options, const CellScoresOut& out) {
  Score max = 0, log_sum = 0;
  if (!options.from_log_softmax) {
    Compute<T> row_max, row_sum;
    GetRowKernels<T>().max_and_sum_exp(x, vocab_size, &row_max, &row_sum);
    max = static_cast<Score>(row_max);
    log_sum = std::log(static_cast<Score>(row_sum));
  }
  out.normalizer[row] = max + log_sum;
  out.blank[row] = Pick(x, options.blank, max, log_sum);
  if (cell.u == batch.num_targets[cell.b]) {
    out.label[row] = kLogZero;
  } else {
    const int64_t target = batch.Target(cell.b, cell.u);
    const bool in_vocab = target >= 0 && target < vocab_size;
    out.label[row] = in_vocab ? Pick(x, target, max, log_sum) : kNaN;
  }
  Score* extra = out.extra + row * options.NumExtra();
  for (int64_t i = 0; i < options.num_big_blanks; ++i) {
    extra[i] = Pick(x, options.BigBlank(options.blank, i, vocab_size), max, log_sum);
  }
  LogSoftmax(x + vocab_size, options.num_durations, extra + options.num_big_blanks);
}

}  // namespace

template <typename T>
void CellScoresCpu(const LatticeBatch& batch, const RowTile& tile, const LogitRows<T>& logits,
                   const LogitsOptions& options, int num_threads, const CellScoresOut& out) {
  ParallelForRows(tile.size, num_threads, [&](int64_t begin, int64_t end) {
    CellCursor cursor(batch);
    Cell cell;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = tile.Row(i);
      if (!cursor.Find(row, &cell)) continue;
      ScoreCell(batch, cell, row, logits.data + i * logits.pitch, logits.vocab_size, options, out);
    }
  });
}

void QuantizedCellScoresCpu(const LatticeBatch& batch, const RowTile& tile,
                            const QuantizedLogits& logits, const LogitsOptions& options,
                            int num_threads, const CellScoresOut& out) {
  const auto dequantize = GetRowKernelSet().dequantize;
  ParallelForRows(tile.size, num_threads, [&](int64_t begin, int64_t end) {
    CellCursor cursor(batch);
    Cell cell;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = tile.Row(i);
      if (!cursor.Find(row, &cell)) continue;
      int32_t* data = logits.data + i * logits.pitch;
      dequantize(data, logits.pitch, logits.row_scales[i], logits.column_scales, logits.bias);
      ScoreCell(batch, cell, row, reinterpret_cast<const float*>(data), logits.vocab_size, options,
                out);
    }
  });
}

#define TRANSDUCER_INSTANTIATE(T)                                                          \
  template void CellScoresCpu<T>(const LatticeBatch&, const RowTile&, const LogitRows<T>&, \
                                 const LogitsOptions&, int, const CellScoresOut&);
TRANSDUCER_FOR_EACH_DTYPE(TRANSDUCER_INSTANTIATE)

}  // namespace transducer
