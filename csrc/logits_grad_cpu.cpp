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

// One cell; target < 0 where there is no label arc.
template <typename T>
void CellGrad(const Context& context, const T* x, Score normaliser, Score use_blank,
              Score use_label, int64_t target, Score loss_grad, T* grad) {
  const int64_t size = context.vocab_size;
  const Score occupancy = use_blank + use_label;
  if (loss_grad == 0) {
    std::fill(grad, grad + size, T{});
    return;
  }
  if (std::isnan(occupancy)) {
    std::fill(grad, grad + size, NaNOf<T>());
    return;
  }
  // The two entries with a subtraction, in float64 and before grad overwrites x.
  const auto entry = [&](int64_t v) {
    Score g = 0;
    if (!context.from_log_softmax && occupancy > 0) {
      g = occupancy * std::exp(static_cast<Score>(ToCompute(x[v])) - normaliser);
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
    GetRowKernels<T>().scaled_softmax(x, size, normaliser, static_cast<C>(occupancy),
                                      static_cast<C>(context.limit), static_cast<C>(loss_grad),
                                      grad);
  }
  grad[context.blank] = at_blank;
  if (target >= 0) grad[target] = at_target;
}

}  // namespace

template <typename T>
void LogitsGradCpu(const LatticeBatch& batch, const T* logits, int64_t vocab_size, int64_t blank,
                   bool from_log_softmax, double clamp, const Score* normaliser,
                   const Score* use_blank, const Score* use_label, const Score* loss_grad,
                   int num_threads, T* grad) {
  const Context context{vocab_size, blank, from_log_softmax,
                        clamp > 0 ? clamp : std::numeric_limits<Score>::infinity()};
  const auto fill_rows = [&](int64_t begin, int64_t end, T value) {
    std::fill(grad + begin * vocab_size, grad + end * vocab_size, value);
  };
  // One task a frame, as in stage 1. A task owns the rows from its first cell up to the first cell
  // of the next task's frame, so that padding rows are written exactly once.
  ParallelFor(batch.num_utterances * batch.max_frames, num_threads, [&](int64_t task) {
    const int64_t b = task / batch.max_frames, t = task % batch.max_frames;
    if (!batch.IsValid(b)) {
      if (t == 0) {
        const int64_t begin = std::min(std::max<int64_t>(batch.first_row[b], 0), batch.num_rows);
        const int64_t end = b + 1 < batch.num_utterances ? batch.first_row[b + 1] : batch.num_rows;
        fill_rows(begin, std::max(begin, std::min(end, batch.num_rows)),
                  loss_grad[b] == 0 ? T{} : NaNOf<T>());
      }
      return;
    }
    const int64_t num_targets = batch.num_targets[b];
    const int64_t begin = batch.Row(b, t, 0);
    if (t >= batch.num_frames[b]) {
      if (batch.row_stride != 0) fill_rows(begin, begin + batch.row_stride, T{});
      return;
    }
    for (int64_t u = 0; u <= num_targets; ++u) {
      const int64_t row = begin + u;
      const int64_t target = u < num_targets ? batch.Target(b, u) : -1;
      CellGrad(context, logits + row * vocab_size, normaliser[row], use_blank[row], use_label[row],
               target, loss_grad[b], grad + row * vocab_size);
    }
    fill_rows(begin + num_targets + 1, begin + batch.Stride(b), T{});
  });
}

#define TRANSDUCER_INSTANTIATE(T)                                                               \
  template void LogitsGradCpu<T>(const LatticeBatch&, const T*, int64_t, int64_t, bool, double, \
                                 const Score*, const Score*, const Score*, const Score*, int, T*);
TRANSDUCER_FOR_EACH_DTYPE(TRANSDUCER_INSTANTIATE)

}  // namespace transducer
