// SPDX-License-Identifier: Apache-2.0
#include "cell_scores.h"

#include <algorithm>
#include <cmath>

#include "parallel.h"
#include "row_kernels.h"

namespace transducer {
namespace {

// A row of logits: an element, and a shift near the maximum of some elements with the sum of
// exp(x - shift).
template <typename T>
struct PlainRow {
  const RowKernels<T>& kernels;
  const T* x;

  Score operator[](int64_t i) const { return static_cast<Score>(ToCompute(x[i])); }
  void ShiftAndSum(int64_t begin, int64_t end, Score* shift, Score* sum) const {
    Compute<T> max, total;
    kernels.max_and_sum_exp(x + begin, end - begin, &max, &total);
    *shift = static_cast<Score>(max);
    *sum = static_cast<Score>(total);
  }
};

struct CoarseRow {
  const RowKernelSet& kernels;
  QuantizedRow x;

  Score operator[](int64_t i) const { return static_cast<Score>(x[i]); }
  void ShiftAndSum(int64_t begin, int64_t end, Score* shift, Score* sum) const {
    float near_max, total;
    kernels.shift_and_sum_exp(x.From(begin), end - begin, &near_max, &total);
    *shift = static_cast<Score>(near_max);
    *sum = static_cast<Score>(total);
  }
};

// The log-probability of one symbol of a row; NaN for a logit of +inf. Subtracting the shift first
// avoids the rounding of shift + log_sum.
template <typename Row>
Score Pick(const Row& row, int64_t index, Score shift, Score log_sum) {
  const Score score = (row[index] - shift) - log_sum;
  return score == -kLogZero ? kNaN : score;
}

// log sigmoid(x); NaN for +inf, which is not a valid logit.
Score LogSigmoid(Score x) {
  if (x == -kLogZero) return kNaN;
  return x < 0 ? x - std::log1p(std::exp(x)) : -std::log1p(std::exp(-x));
}

// A shift and the log of the sum of exp(x - shift) of all symbols, or of all but `skipped`.
template <typename Row>
void ShiftAndLogSum(const Row& row, int64_t size, int64_t skipped, Score* shift, Score* log_sum) {
  Score sum = 0;
  *shift = kLogZero;
  if (skipped < 0) {
    row.ShiftAndSum(0, size, shift, &sum);
  } else {
    Score below = kLogZero, below_sum = 0, above = kLogZero, above_sum = 0;
    if (skipped > 0) row.ShiftAndSum(0, skipped, &below, &below_sum);
    if (skipped + 1 < size) row.ShiftAndSum(skipped + 1, size, &above, &above_sum);
    *shift = std::max(below, above);
    // The sum of a part without probability is NaN, as it is after a NaN.
    if (below != kLogZero) sum += below_sum * std::exp(below - *shift);
    if (above != kLogZero) sum += above_sum * std::exp(above - *shift);
    if (*shift == kLogZero) sum = kNaN;
  }
  *log_sum = std::log(sum);
}

// out[k] = log_softmax(x)[k] for the elements of the row from `first` on.
template <typename Row>
void LogSoftmax(const Row& row, int64_t first, int64_t size, Score* out) {
  Score max = kLogZero, sum = 0;
  for (int64_t k = 0; k < size; ++k) max = std::max(max, row[first + k]);
  for (int64_t k = 0; k < size; ++k) sum += std::exp(row[first + k] - max);
  const Score log_sum = std::log(sum);
  for (int64_t k = 0; k < size; ++k) out[k] = (row[first + k] - max) - log_sum;
}

// The scores of a cell from its logits x.
template <typename Row>
void ScoreCell(const LatticeBatch& batch, const Cell& cell, int64_t row, const Row& x,
               int64_t vocab_size, const LogitsOptions& options, const CellScoresOut& out) {
  Score shift = 0, log_sum = 0;
  if (!options.from_log_softmax) {
    const int64_t skipped = options.is_hat ? options.blank : -1;
    ShiftAndLogSum(x, vocab_size, skipped, &shift, &log_sum);
  }
  out.normalizer[row] = shift + log_sum;
  Score any_label = 0;  // log of the probability that the cell emits a label, which HAT models
  if (options.is_hat) {
    const Score z = x[options.blank];
    any_label = LogSigmoid(-z) + 0 * log_sum;  // NaN stays
    out.blank[row] = LogSigmoid(z) + 0 * log_sum;
    if (z == kLogZero) any_label = 0 * log_sum;
  } else {
    out.blank[row] = Pick(x, options.blank, shift, log_sum);
  }
  if (cell.u == batch.num_targets[cell.b]) {
    out.label[row] = kLogZero;
  } else {
    const int64_t target = batch.Target(cell.b, cell.u);
    const bool is_label =
        target >= 0 && target < vocab_size && !(options.is_hat && target == options.blank);
    out.label[row] = is_label ? any_label + Pick(x, target, shift, log_sum) : kNaN;
  }
  Score* extra = out.extra + row * options.NumExtra();
  for (int64_t i = 0; i < options.num_big_blanks; ++i) {
    extra[i] = Pick(x, options.BigBlank(options.blank, i, vocab_size), shift, log_sum);
  }
  LogSoftmax(x, vocab_size, options.num_durations, extra + options.num_big_blanks);
}

}  // namespace

template <typename T>
void CellScoresCpu(const LatticeBatch& batch, const RowTile& tile, const LogitRows<T>& logits,
                   const LogitsOptions& options, int num_threads, const CellScoresOut& out) {
  const RowKernels<T>& kernels = GetRowKernels<T>();
  ParallelForRows(tile.size, num_threads, [&](int64_t begin, int64_t end) {
    CellCursor cursor(batch);
    Cell cell;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = tile.Row(i);
      if (!cursor.Find(row, &cell)) continue;
      const PlainRow<T> x{kernels, logits.data + i * logits.pitch};
      ScoreCell(batch, cell, row, x, logits.vocab_size, options, out);
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
      const CoarseRow x{kernels,
                        {logits.data + i * logits.pitch, logits.row_scales[i], logits.column_scales,
                         logits.bias}};
      ScoreCell(batch, cell, row, x, logits.vocab_size, options, out);
    }
  });
}

#define TRANSDUCER_INSTANTIATE(T)                                                          \
  template void CellScoresCpu<T>(const LatticeBatch&, const RowTile&, const LogitRows<T>&, \
                                 const LogitsOptions&, int, const CellScoresOut&);
TRANSDUCER_FOR_EACH_DTYPE(TRANSDUCER_INSTANTIATE)

}  // namespace transducer
