// SPDX-License-Identifier: Apache-2.0
// One block computes the forward variables of an utterance and one the backward variables,
// concurrently. Lanes are along the symbols, and each is one step behind the lane before it, so that
// all arcs of a cell lead to (or from) cells of earlier steps. These are read from memory, which the
// barrier of each step makes visible to the block. A second kernel computes the posteriors.
#include "device_rows.cuh"
#include "duration_lattice.h"

namespace transducer {
namespace {

constexpr int kMaxLanes = 512;

struct QuickSum {
  using C = float;
  __device__ static C ExpOf(C x) { return expf(x); }
  __device__ static Score LogOf(C x) { return static_cast<Score>(logf(x)); }
};
struct ExactSum {
  using C = double;
  __device__ static C ExpOf(C x) { return exp(x); }
  __device__ static Score LogOf(C x) { return log(x); }
};

// Running log of a sum of exponentials of float64 terms; each exponential is of type C.
template <typename Math>
struct RunningSum {
  using C = typename Math::C;
  Score high = kLogZero;
  C sum = 0;

  __device__ void Add(Score term) {
    if (term == kLogZero) return;
    const Score difference = term - high;  // +inf at first
    if (difference > 0) {
      sum = sum * Math::ExpOf(static_cast<C>(-difference)) + 1;
      high = term;
    } else {
      sum += Math::ExpOf(static_cast<C>(difference));  // NaN stays
    }
  }
  __device__ Score Log() const { return sum == 0 ? kLogZero : high + Math::LogOf(sum); }
};

struct Arrays {
  ArcScores scores;
  ArcOut out;
  Score *beta, *alpha;  // (num_rows,) workspace; alpha is null without uses
};

// The lattice of one utterance.
class Cells {
 public:
  __device__ Cells(const LatticeBatch& batch, const LatticeOptions& options,
                   const DurationArcs& arcs, const Arrays& arrays, int64_t b)
      : batch_(batch),
        arcs_(arcs),
        arrays_(arrays),
        b_(b),
        frames_(batch.num_frames[b]),
        labels_(batch.num_targets[b]),
        delay_penalty_(options.delay_penalty) {
    const int64_t first_frame = batch.first_frame != nullptr ? batch.first_frame[b] : 0;
    middle_ = Score(0.5) * static_cast<Score>(frames_ - 1 - first_frame);
  }

  __device__ int64_t frames() const { return frames_; }
  __device__ int64_t labels() const { return labels_; }

  // The row of a cell, or -1.
  __device__ int64_t RowOf(int64_t t, int64_t u) const {
    if (t < 0 || t >= frames_ || u < batch_.ColumnBegin(b_, t) || u >= batch_.ColumnEnd(b_, t)) {
      return -1;
    }
    return batch_.Row(b_, t, u);
  }
  __device__ Score Blank(int64_t row, int k) const {
    return arrays_.scores.blank[row * arcs_.num_blank + k];
  }
  __device__ Score Label(int64_t row, int64_t t, int k) const {
    const Score score = arrays_.scores.label[row * arcs_.num_label + k];
    return score + delay_penalty_ * (middle_ - static_cast<Score>(t));
  }

  // beta at the end of an arc.
  __device__ Score AfterBlank(int64_t t, int64_t u, int k) const {
    const int64_t to = t + arcs_.blank_frames[k];
    if (to == frames_) return u == labels_ ? 0 : kLogZero;
    return At(arrays_.beta, to, u);
  }
  __device__ Score AfterLabel(int64_t t, int64_t u, int k) const {
    return At(arrays_.beta, t + arcs_.label_frames[k], u + 1);
  }

  template <typename Math>
  __device__ Score Beta(int64_t row, int64_t t, int64_t u, bool* has_nan) const {
    RunningSum<Math> sum;
    for (int k = 0; k < arcs_.num_blank; ++k) {
      const Score score = Blank(row, k);
      *has_nan |= score != score;
      sum.Add(score + AfterBlank(t, u, k));
    }
    const bool has_label = u < batch_.LabelEnd(b_, t);
    for (int k = 0; k < arcs_.num_label && has_label; ++k) {
      const Score score = Label(row, t, k);
      *has_nan |= score != score;
      sum.Add(score + AfterLabel(t, u, k));
    }
    return sum.Log();
  }

  template <typename Math>
  __device__ Score Alpha(int64_t t, int64_t u) const {
    RunningSum<Math> sum;
    if (t == 0 && u == 0) sum.Add(0);
    for (int k = 0; k < arcs_.num_blank; ++k) {
      const int64_t row = RowOf(t - arcs_.blank_frames[k], u);
      if (row >= 0) sum.Add(arrays_.alpha[row] + Blank(row, k));
    }
    for (int k = 0; k < arcs_.num_label; ++k) {
      const int64_t from = t - arcs_.label_frames[k], row = RowOf(from, u - 1);
      if (row >= 0 && u <= batch_.LabelEnd(b_, from))
        sum.Add(arrays_.alpha[row] + Label(row, from, k));
    }
    return sum.Log();
  }

 private:
  __device__ Score At(const Score* values, int64_t t, int64_t u) const {
    const int64_t row = RowOf(t, u);
    return row >= 0 ? values[row] : kLogZero;
  }

  const LatticeBatch& batch_;
  const DurationArcs& arcs_;
  const Arrays& arrays_;
  const int64_t b_, frames_, labels_;
  const Score delay_penalty_;
  Score middle_;
};

// Blocks [0, B): backward; [B, 2B): forward.
template <typename Math>
__global__ void __launch_bounds__(kMaxLanes, 1)
    DurationWalkKernel(LatticeBatch batch, LatticeOptions options, DurationArcs arcs,
                       Arrays arrays) {
  const bool is_backward = blockIdx.x < batch.num_utterances;
  const int64_t b = is_backward ? blockIdx.x : blockIdx.x - batch.num_utterances;
  if (!batch.IsValid(b)) {
    if (is_backward && threadIdx.x == 0) arrays.out.loss[b] = kNaN;
    return;
  }
  const Cells cells(batch, options, arcs, arrays, b);
  const int64_t frames = cells.frames(), num_lanes = cells.labels() + 1;
  const int64_t width = blockDim.x;
  bool has_nan = false;
  for (int64_t strip = 0; strip < num_lanes; strip += width) {
    const int64_t lane = strip + threadIdx.x;
    const int64_t used = num_lanes - strip < width ? num_lanes - strip : width;
    for (int64_t step = 0; step < frames + used - 1; ++step) {
      const int64_t place = step - threadIdx.x;  // along the walk
      if (lane < num_lanes && place >= 0 && place < frames) {
        const int64_t t = is_backward ? frames - 1 - place : place;
        const int64_t u = is_backward ? cells.labels() - lane : lane;
        const int64_t row = cells.RowOf(t, u);
        if (row >= 0) {
          if (is_backward) {
            arrays.beta[row] = cells.Beta<Math>(row, t, u, &has_nan);
          } else {
            arrays.alpha[row] = cells.Alpha<Math>(t, u);
          }
        }
      }
      __syncthreads();
    }
  }
  if (!is_backward) return;
  has_nan = __syncthreads_or(has_nan);
  if (threadIdx.x == 0) {
    const int64_t row = cells.RowOf(0, 0);
    arrays.out.loss[b] = has_nan ? kNaN : row >= 0 ? -arrays.beta[row] : -kLogZero;
  }
}

constexpr int kUsesThreads = 256;

// The posteriors of each arc. One warp per frame.
template <typename Math>
__global__ void __launch_bounds__(kUsesThreads, 4)
    DurationUsesKernel(LatticeBatch batch, LatticeOptions options, DurationArcs arcs,
                       Arrays arrays) {
  const int64_t warp = GlobalWarp();
  const int64_t b = warp / batch.max_frames, t = warp - b * batch.max_frames;
  if (b >= batch.num_utterances || !batch.IsValid(b) || t >= batch.num_frames[b]) return;
  const Cells cells(batch, options, arcs, arrays, b);
  const Score total = -arrays.out.loss[b], label_gain = 1 + options.fastemit_lambda;
  const bool is_usual = total == total && total != kLogZero;
  const Score otherwise = total == total ? 0 : total;  // NaN stays
  const auto use = [&](Score log_use) {
    return static_cast<Score>(Math::ExpOf(static_cast<typename Math::C>(log_use)));
  };
  const int64_t end = batch.ColumnEnd(b, t), label_end = batch.LabelEnd(b, t);
  for (int64_t u = batch.ColumnBegin(b, t) + Lane(); u < end; u += kWarp) {
    const int64_t row = batch.Row(b, t, u);
    const Score alpha = is_usual ? arrays.alpha[row] : 0;
    for (int k = 0; k < arcs.num_blank; ++k) {
      arrays.out.use_blank[row * arcs.num_blank + k] =
          is_usual ? use(alpha + cells.Blank(row, k) + cells.AfterBlank(t, u, k) - total)
                   : otherwise;
    }
    for (int k = 0; k < arcs.num_label; ++k) {
      Score value = otherwise;
      if (is_usual) {
        value = u < label_end ? label_gain * use(alpha + cells.Label(row, t, k) +
                                                 cells.AfterLabel(t, u, k) - total)
                              : Score(0);
      }
      arrays.out.use_label[row * arcs.num_label + k] = value;
    }
  }
}

template <typename Math>
void Launch(const LatticeBatch& batch, const LatticeOptions& options, const DurationArcs& arcs,
            const Arrays& arrays, void* stream) {
  const bool wants_uses = arrays.alpha != nullptr;
  const int64_t lanes = batch.max_targets + 1;
  const int threads =
      static_cast<int>(lanes < kMaxLanes ? CeilDivide(lanes, kWarp) * kWarp : kMaxLanes);
  TRANSDUCER_LAUNCH(DurationWalkKernel<Math>, batch.num_utterances * (wants_uses ? 2 : 1), threads,
                    stream, batch, options, arcs, arrays);
  if (!wants_uses) return;
  const int64_t blocks = CeilDivide(batch.num_utterances * batch.max_frames, kUsesThreads / kWarp);
  TRANSDUCER_LAUNCH(DurationUsesKernel<Math>, blocks, kUsesThreads, stream, batch, options, arcs,
                    arrays);
}

}  // namespace

void DurationLatticeCuda(const LatticeBatch& batch, const LatticeOptions& options,
                         const DurationArcs& arcs, const ArcScores& scores, void* stream,
                         void* scratch, const ArcOut& out) {
  Score* beta = static_cast<Score*>(scratch);
  Score* alpha = out.use_blank != nullptr ? beta + batch.num_rows : nullptr;
  const Arrays arrays{scores, out, beta, alpha};
  if (options.exact) {
    Launch<ExactSum>(batch, options, arcs, arrays, stream);
  } else {
    Launch<QuickSum>(batch, options, arcs, arrays, stream);
  }
}

}  // namespace transducer
