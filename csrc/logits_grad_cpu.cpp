// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <limits>

#include "check.h"
#include "logits_grad.h"
#include "parallel.h"
#include "row_kernels.h"

namespace transducer {
namespace {

template <typename T>
T NaNOf() {
  return FromCompute<T>(std::numeric_limits<Compute<T>>::quiet_NaN());
}

// Options that are the same for every row of a call.
struct Context {
  int64_t vocab_size, blank, num_big_blanks, num_durations;
  bool from_log_softmax, is_hat;
  Score limit;  // of the magnitude of d loss / d logit
};

// An entry of the gradient from d loss_b / d logit.
template <typename T>
T Scaled(const Context& context, Score g, Score loss_grad) {
  g = loss_grad * std::min(std::max(g, -context.limit), context.limit);
  return std::abs(g) < kFlushBelow<T> ? T{} : FromCompute<T>(static_cast<Compute<T>>(g));
}

// The expected uses of the scores of one cell.
struct CellUses {
  Score blank, label;
  const Score* extra;  // of big blanks or durations
};

// The logits x of durations of one cell. grad may be x.
template <typename T>
void DurationsGrad(const Context& context, const T* x, const CellUses& uses, Score loss_grad,
                   T* grad) {
  const int64_t size = context.num_durations;
  const Score occupancy = uses.blank + uses.label;
  Score probability[kMaxDurations], max = kLogZero, sum = 0;
  for (int64_t k = 0; k < size; ++k) max = std::max(max, static_cast<Score>(ToCompute(x[k])));
  for (int64_t k = 0; k < size; ++k) {
    sum += probability[k] = std::exp(static_cast<Score>(ToCompute(x[k])) - max);
  }
  for (int64_t k = 0; k < size; ++k) {
    // The softmax of a cell without occupancy may be NaN.
    const Score g = occupancy > 0 ? occupancy * (probability[k] / sum) - uses.extra[k] : 0;
    grad[k] = Scaled<T>(context, g, loss_grad);
  }
}

// One cell; target = -1 where there is no label arc.
template <typename T>
void CellGrad(const Context& context, const T* x, Score normalizer, const CellUses& uses,
              int64_t target, Score loss_grad, T* grad) {
  const int64_t size = context.vocab_size, columns = size + context.num_durations;
  Score occupancy = uses.blank + uses.label;
  for (int64_t i = 0; i < context.num_big_blanks; ++i) occupancy += uses.extra[i];
  if (loss_grad == 0) {
    std::fill(grad, grad + columns, T{});
    return;
  }
  // Stage 1 makes the scores of such a target NaN, unless the caller changed the targets since.
  if (std::isnan(occupancy) || target >= size) {
    std::fill(grad, grad + columns, NaNOf<T>());
    return;
  }
  DurationsGrad(context, x + size, uses, loss_grad, grad + size);
  // The entries with a subtraction, in float64 and before grad overwrites x.
  const Score weight = context.is_hat ? uses.label : occupancy;  // of the softmax
  const auto entry = [&](int64_t v) {
    const Score value = static_cast<Score>(ToCompute(x[v]));
    Score g = 0;
    if (context.is_hat && v == context.blank) {
      g = occupancy / (1 + std::exp(-value));
    } else if (!context.from_log_softmax && weight > 0) {
      g = weight * std::exp(value - normalizer);
    }
    if (v == context.blank) g -= uses.blank;
    if (v == target) g -= uses.label;
    const int64_t i = LogitsOptions::BigBlank(context.blank, v, size);  // its own inverse
    if (i < context.num_big_blanks) g -= uses.extra[i];
    return Scaled<T>(context, g, loss_grad);
  };
  const T at_blank = entry(context.blank);
  const T at_target = target >= 0 ? entry(target) : T{};
  T at_big_blank[kMaxBigBlanks];
  for (int64_t i = 0; i < context.num_big_blanks; ++i) {
    at_big_blank[i] = entry(LogitsOptions::BigBlank(context.blank, i, size));
  }
  // No entry can exceed the weight times the upstream gradient: fill rows that round to zero.
  const bool negligible = weight * std::abs(loss_grad) < kFlushBelow<T>;
  if (context.from_log_softmax || negligible) {
    std::fill(grad, grad + size, T{});
  } else {
    using C = Compute<T>;
    GetRowKernels<T>().scaled_softmax(x, size, normalizer, static_cast<C>(weight),
                                      static_cast<C>(context.limit), static_cast<C>(loss_grad),
                                      grad);
  }
  grad[context.blank] = at_blank;
  for (int64_t i = 0; i < context.num_big_blanks; ++i) {
    grad[LogitsOptions::BigBlank(context.blank, i, size)] = at_big_blank[i];
  }
  if (target >= 0) grad[target] = at_target;
}

}  // namespace

template <typename T>
void LogitsGradCpu(const LatticeBatch& batch, const RowTile& tile, const LogitRows<T>& logits,
                   const LogitsOptions& options, const Posteriors& posteriors, int num_threads,
                   T* grad) {
  TRANSDUCER_CHECK(options.num_big_blanks <= kMaxBigBlanks, "too many big blanks");
  const int64_t vocab_size = logits.vocab_size, pitch = logits.pitch;
  TRANSDUCER_CHECK(options.num_durations <= kMaxDurations, "too many durations");
  const Context context{vocab_size,
                        options.blank,
                        options.num_big_blanks,
                        options.num_durations,
                        options.from_log_softmax,
                        options.is_hat,
                        options.clamp > 0 ? options.clamp : std::numeric_limits<Score>::infinity()};
  ParallelForRows(tile.size, num_threads, [&](int64_t begin, int64_t end) {
    CellCursor cursor(batch);
    Cell cell;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = tile.Row(i);
      T* out = grad + i * pitch;
      if (cursor.Find(row, &cell)) {
        const bool has_label = cell.u < batch.num_targets[cell.b];
        const CellUses uses{posteriors.use_blank[row], posteriors.use_label[row],
                            posteriors.use_extra + row * options.NumExtra()};
        CellGrad(context, logits.data + tile.LogitsRow(i) * pitch, posteriors.normalizer[row], uses,
                 has_label ? batch.Target(cell.b, cell.u) : -1, posteriors.loss_grad[cell.b], out);
      } else {
        const bool is_nan = !batch.IsValid(cell.b) && posteriors.loss_grad[cell.b] != 0;
        std::fill(out, out + vocab_size + options.num_durations, is_nan ? NaNOf<T>() : T{});
      }
    }
  });
}

#define TRANSDUCER_INSTANTIATE(T)                                                          \
  template void LogitsGradCpu<T>(const LatticeBatch&, const RowTile&, const LogitRows<T>&, \
                                 const LogitsOptions&, const Posteriors&, int, T*);
TRANSDUCER_FOR_EACH_DTYPE(TRANSDUCER_INSTANTIATE)

}  // namespace transducer
