// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <limits>

#include "logits_grad.h"
#include "parallel.h"
#include "row_kernels.h"

namespace transducer {
namespace {

template <typename T>
T NaNOf() {
  return FromCompute<T>(std::numeric_limits<Compute<T>>::quiet_NaN());
}

// What is the same for every row of a call.
struct Context {
  int64_t vocab_size, blank;
  bool from_log_softmax;
  Score limit;  // of the magnitude of d loss / d logit
};

// One cell; target = -1 where there is no label arc.
template <typename T>
void CellGrad(const Context& context, const T* x, Score normalizer, Score use_blank,
              Score use_label, int64_t target, Score loss_grad, T* grad) {
  const int64_t size = context.vocab_size;
  const Score occupancy = use_blank + use_label;
  if (loss_grad == 0) {
    std::fill(grad, grad + size, T{});
    return;
  }
  // A target beyond the vocabulary was NaN in stage 1; here it is one that has changed since.
  if (std::isnan(occupancy) || target >= size) {
    std::fill(grad, grad + size, NaNOf<T>());
    return;
  }
  // The two entries with a subtraction, in float64 and before grad overwrites x.
  const auto entry = [&](int64_t v) {
    Score g = 0;
    if (!context.from_log_softmax && occupancy > 0) {
      g = occupancy * std::exp(static_cast<Score>(ToCompute(x[v])) - normalizer);
    }
    if (v == context.blank) g -= use_blank;
    if (v == target) g -= use_label;
    g = loss_grad * std::min(std::max(g, -context.limit), context.limit);
    return std::abs(g) < kFlushBelow<T> ? T{} : FromCompute<T>(static_cast<Compute<T>>(g));
  };
  const T at_blank = entry(context.blank);
  const T at_target = target >= 0 ? entry(target) : T{};
  // No entry can exceed the occupancy times the upstream gradient: skip rows that round to zero.
  const bool negligible = occupancy * std::abs(loss_grad) < kFlushBelow<T>;
  if (context.from_log_softmax || negligible) {
    std::fill(grad, grad + size, T{});
  } else {
    using C = Compute<T>;
    GetRowKernels<T>().scaled_softmax(x, size, normalizer, static_cast<C>(occupancy),
                                      static_cast<C>(context.limit), static_cast<C>(loss_grad),
                                      grad);
  }
  grad[context.blank] = at_blank;
  if (target >= 0) grad[target] = at_target;
}

}  // namespace

template <typename T>
void LogitsGradCpu(const LatticeBatch& batch, const RowTile& tile, const LogitRows<T>& logits,
                   const LogitsOptions& options, const Posteriors& posteriors, int num_threads,
                   T* grad) {
  const int64_t vocab_size = logits.vocab_size;
  const Context context{vocab_size, options.blank, options.from_log_softmax,
                        options.clamp > 0 ? options.clamp : std::numeric_limits<Score>::infinity()};
  ParallelForRows(tile.size, num_threads, [&](int64_t begin, int64_t end) {
    CellCursor cursor(batch);
    Cell cell;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = tile.Row(i);
      T* out = grad + i * vocab_size;
      if (cursor.Find(row, &cell)) {
        const bool has_label = cell.u < batch.num_targets[cell.b];
        CellGrad(context, logits.data + tile.LogitsRow(i) * vocab_size, posteriors.normalizer[row],
                 posteriors.use_blank[row], posteriors.use_label[row],
                 has_label ? batch.Target(cell.b, cell.u) : -1, posteriors.loss_grad[cell.b], out);
      } else {
        const bool is_nan = !batch.IsValid(cell.b) && posteriors.loss_grad[cell.b] != 0;
        std::fill(out, out + vocab_size, is_nan ? NaNOf<T>() : T{});
      }
    }
  });
}

#define TRANSDUCER_INSTANTIATE(T)                                                          \
  template void LogitsGradCpu<T>(const LatticeBatch&, const RowTile&, const LogitRows<T>&, \
                                 const LogitsOptions&, const Posteriors&, int, T*);
TRANSDUCER_FOR_EACH_DTYPE(TRANSDUCER_INSTANTIATE)

}  // namespace transducer
