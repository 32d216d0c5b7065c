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

// log sigmoid(x); NaN for +inf, which is not a valid logit.
Score LogSigmoid(Score x) {
  if (x == -kLogZero) return kNaN;
  return x < 0 ? x - std::log1p(std::exp(x)) : -std::log1p(std::exp(-x));
}

template <typename T>
using MaxAndSumExp = decltype(RowKernels<T>::max_and_sum_exp);

// Maximum and log of the sum of exp(x - maximum) of all symbols, or of all but `skipped`.
template <typename T>
void MaxAndLogSum(MaxAndSumExp<T> max_and_sum_exp, const T* x, int64_t size, int64_t skipped,
                  Score* max, Score* log_sum) {
  const auto part = [&](int64_t begin, int64_t end, Score* top, Score* sum) {
    if (begin == end) return;
    Compute<T> part_max, part_sum;
    max_and_sum_exp(x + begin, end - begin, &part_max, &part_sum);
    *top = static_cast<Score>(part_max);
    *sum = static_cast<Score>(part_sum);
  };
  Score sum = 0;
  *max = kLogZero;
  if (skipped < 0) {
    part(0, size, max, &sum);
  } else {
    Score below_max = kLogZero, below_sum = 0, above_max = kLogZero, above_sum = 0;
    part(0, skipped, &below_max, &below_sum);
    part(skipped + 1, size, &above_max, &above_sum);
    *max = std::max(below_max, above_max);
    // The sum of a part without probability is NaN, as it is after a NaN.
    if (below_max != kLogZero) sum += below_sum * std::exp(below_max - *max);
    if (above_max != kLogZero) sum += above_sum * std::exp(above_max - *max);
    if (*max == kLogZero) sum = kNaN;
  }
  *log_sum = std::log(sum);
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
void ScoreCell(MaxAndSumExp<T> max_and_sum_exp, const LatticeBatch& batch, const Cell& cell,
               int64_t row, const T* x, int64_t vocab_size, const LogitsOptions& options,
               const CellScoresOut& out) {
  Score max = 0, log_sum = 0;
  if (!options.from_log_softmax) {
    const int64_t skipped = options.is_hat ? options.blank : -1;
    MaxAndLogSum(max_and_sum_exp, x, vocab_size, skipped, &max, &log_sum);
  }
  out.normalizer[row] = max + log_sum;
  Score any_label = 0;  // log of the probability that the cell emits a label, which HAT models
  if (options.is_hat) {
    const Score z = static_cast<Score>(ToCompute(x[options.blank]));
    any_label = LogSigmoid(-z) + 0 * log_sum;  // NaN stays
    out.blank[row] = LogSigmoid(z) + 0 * log_sum;
    if (z == kLogZero) any_label = 0 * log_sum;
  } else {
    out.blank[row] = Pick(x, options.blank, max, log_sum);
  }
  if (cell.u == batch.num_targets[cell.b]) {
    out.label[row] = kLogZero;
  } else {
    const int64_t target = batch.Target(cell.b, cell.u);
    const bool is_label =
        target >= 0 && target < vocab_size && !(options.is_hat && target == options.blank);
    out.label[row] = is_label ? any_label + Pick(x, target, max, log_sum) : kNaN;
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
  const auto max_and_sum_exp = GetRowKernels<T>().max_and_sum_exp;
  ParallelForRows(tile.size, num_threads, [&](int64_t begin, int64_t end) {
    CellCursor cursor(batch);
    Cell cell;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = tile.Row(i);
      if (!cursor.Find(row, &cell)) continue;
      ScoreCell(max_and_sum_exp, batch, cell, row, logits.data + i * logits.pitch,
                logits.vocab_size, options, out);
    }
  });
}

void QuantizedCellScoresCpu(const LatticeBatch& batch, const RowTile& tile,
                            const QuantizedLogits& logits, const LogitsOptions& options,
                            int num_threads, const CellScoresOut& out) {
  const RowKernelSet& kernels = GetRowKernelSet();
  ParallelForRows(tile.size, num_threads, [&](int64_t begin, int64_t end) {
    CellCursor cursor(batch);
    Cell cell;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = tile.Row(i);
      if (!cursor.Find(row, &cell)) continue;
      int32_t* data = logits.data + i * logits.pitch;
      kernels.dequantize(data, logits.pitch, logits.row_scales[i], logits.column_scales,
                         logits.bias);
      ScoreCell(kernels.coarse_max_and_sum_exp, batch, cell, row,
                reinterpret_cast<const float*>(data), logits.vocab_size, options, out);
    }
  });
}

#define TRANSDUCER_INSTANTIATE(T)                                                          \
  template void CellScoresCpu<T>(const LatticeBatch&, const RowTile&, const LogitRows<T>&, \
                                 const LogitsOptions&, int, const CellScoresOut&);
TRANSDUCER_FOR_EACH_DTYPE(TRANSDUCER_INSTANTIATE)

}  // namespace transducer
