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
constexpr int kPrefetch = 8;  // steps that the scores of a cell are fetched ahead of their use

struct QuickSum {
  using C = float;
  static constexpr int kArcs = 5;  // whose inputs are read at once; most models have 4 or 5
  __device__ static C ExpOf(C x) { return QuickExp(x); }
  __device__ static Score LogOf(C x) { return static_cast<Score>(logf(x)); }
};
struct ExactSum {
  using C = double;
  static constexpr int kArcs = 4;
  __device__ static C ExpOf(C x) { return exp(x); }
  __device__ static Score LogOf(C x) { return log(x); }
};

// Running log of a sum of exponentials of float64 terms; each exponential is of type C.
template <typename Math>
class RunningSum {
 public:
  using C = typename Math::C;
  static constexpr int kArcs = Math::kArcs;

  // Adds term_of(0), ..., term_of(count - 1). A step of the walk takes as long as its chain of
  // waits, so that the terms are computed side by side, without branches.
  template <typename TermOf>
  __device__ void Add(int count, const TermOf& term_of) {
    for (int first = 0; first < count; first += kArcs) {
      Score terms[kArcs];
      Score high = high_;
#pragma unroll
      for (int k = 0; k < kArcs; ++k) {
        const int arc = first + k < count ? first + k : count - 1;
        const Score term = term_of(arc);
        terms[k] = arc == first + k ? term : kLogZero;
        high = terms[k] > high ? terms[k] : high;  // not NaN
      }
      const Score base = high == kLogZero ? 0 : high;
      C sum = 0;
#pragma unroll
      for (int k = 0; k < kArcs; ++k) {
        const C term = Math::ExpOf(static_cast<C>(terms[k] - base));
        sum += terms[k] == base ? C(1) : term;  // +inf is no NaN; NaN stays
      }
      sum_ = sum_ * Math::ExpOf(static_cast<C>(high_ - base)) + sum;
      high_ = high;
    }
  }
  __device__ Score Log() const { return sum_ == 0 ? kLogZero : high_ + Math::LogOf(sum_); }

 private:
  Score high_ = kLogZero;
  C sum_ = 0;
};

struct Arrays {
  ArcScores scores;
  ArcOut out;
  Score *beta, *alpha;  // (num_rows,) workspace; alpha is null without uses
};

// The lattice of one utterance. A whole one has neither a band nor windows.
template <bool kIsWhole>
class Cells {
 public:
  __device__ Cells(const LatticeBatch& batch, const LatticeOptions& options,
                   const DurationArcs& arcs, const Arrays& arrays, int b)
      : batch_(batch),
        arcs_(arcs),
        arrays_(arrays),
        b_(b),
        frames_(static_cast<int>(batch.num_frames[b])),
        labels_(static_cast<int>(batch.num_targets[b])),
        stride_(static_cast<int>(batch.Stride(b))),
        first_row_(batch.first_row[b]),
        delay_penalty_(options.delay_penalty) {
    const int64_t first_frame = batch.first_frame != nullptr ? batch.first_frame[b] : 0;
    middle_ = Score(0.5) * static_cast<Score>(frames_ - 1 - first_frame);
  }

  __device__ int frames() const { return frames_; }
  __device__ int labels() const { return labels_; }

  // The row of a cell, or -1.
  __device__ int64_t RowOf(int t, int u) const {
    int64_t row = first_row_ + static_cast<int64_t>(t) * stride_ + u;
    bool is_cell = t >= 0 && t < frames_ && u >= 0 && u <= labels_;
    if (!kIsWhole && is_cell) {
      is_cell = u >= batch_.ColumnBegin(b_, t) && u < batch_.ColumnEnd(b_, t);
      row -= batch_.BandStart(b_, t);
    }
    return is_cell ? row : -1;
  }
  // Whether a label arc leaves cell (t, u).
  __device__ bool HasLabel(int t, int u) const {
    return u < (kIsWhole ? labels_ : batch_.LabelEnd(b_, t));
  }

  __device__ Score Blank(int64_t row, int k) const {
    return arrays_.scores.blank[row * arcs_.num_blank + k];
  }
  __device__ Score Label(int64_t row, int t, int k) const {
    const Score score = arrays_.scores.label[row * arcs_.num_label + k];
    return score + delay_penalty_ * (middle_ - static_cast<Score>(t));
  }
  __device__ void Prefetch(int64_t row) const {
    if (row < 0) return;
    PrefetchLine(arrays_.scores.blank + row * arcs_.num_blank);
    PrefetchLine(arrays_.scores.label + row * arcs_.num_label);
  }

  // beta at the end of an arc.
  __device__ Score AfterBlank(int t, int u, int k) const {
    const int to = t + arcs_.blank_frames[k];
    const Score after = At(arrays_.beta, RowOf(to, u));
    return to == frames_ && u == labels_ ? 0 : after;
  }
  __device__ Score AfterLabel(int t, int u, int k) const {
    return At(arrays_.beta, RowOf(t + arcs_.label_frames[k], u + 1));
  }

  template <typename Math>
  __device__ Score Beta(int64_t row, int t, int u, bool* has_nan) const {
    RunningSum<Math> sum;
    bool is_nan = false;
    sum.Add(arcs_.num_blank, [&](int k) {
      const Score score = Blank(row, k);
      is_nan |= score != score;
      return score + AfterBlank(t, u, k);
    });
    sum.Add(HasLabel(t, u) ? arcs_.num_label : 0, [&](int k) {
      const Score score = Label(row, t, k);
      is_nan |= score != score;
      return score + AfterLabel(t, u, k);
    });
    *has_nan |= is_nan;
    return sum.Log();
  }

  template <typename Math>
  __device__ Score Alpha(int t, int u) const {
    RunningSum<Math> sum;
    sum.Add(arcs_.num_blank, [&](int k) {
      const int64_t row = RowOf(t - arcs_.blank_frames[k], u);
      const Score score = Blank(row < 0 ? 0 : row, k) + At(arrays_.alpha, row);
      return row < 0 ? kLogZero : score;
    });
    sum.Add(arcs_.num_label, [&](int k) {
      const int from = t - arcs_.label_frames[k];
      const int64_t row = RowOf(from, u - 1);
      const Score score = Label(row < 0 ? 0 : row, from, k) + At(arrays_.alpha, row);
      return row < 0 || !HasLabel(from, u - 1) ? kLogZero : score;
    });
    return t == 0 && u == 0 ? 0 : sum.Log();
  }

 private:
  // For a row that there is not, a lane reads some other number, so that it need not branch.
  __device__ Score At(const Score* values, int64_t row) const {
    const Score value = *(row < 0 ? arrays_.scores.blank : values + row);
    return row < 0 ? kLogZero : value;
  }

  const LatticeBatch& batch_;
  const DurationArcs& arcs_;
  const Arrays& arrays_;
  const int b_, frames_, labels_, stride_;
  const int64_t first_row_;
  const Score delay_penalty_;
  Score middle_;
};

// Blocks [0, B): backward; [B, 2B): forward.
template <typename Math, bool kIsWhole>
__global__ void __launch_bounds__(kMaxLanes, 1)
    DurationWalkKernel(LatticeBatch batch, LatticeOptions options, DurationArcs arcs,
                       Arrays arrays) {
  const bool is_backward = blockIdx.x < batch.num_utterances;
  const int b = static_cast<int>(is_backward ? blockIdx.x : blockIdx.x - batch.num_utterances);
  if (!batch.IsValid(b)) {
    if (is_backward && threadIdx.x == 0) arrays.out.loss[b] = kNaN;
    return;
  }
  const Cells<kIsWhole> cells(batch, options, arcs, arrays, b);
  const int frames = cells.frames(), num_lanes = cells.labels() + 1;
  const int width = static_cast<int>(blockDim.x), lane_in_strip = static_cast<int>(threadIdx.x);
  bool has_nan = false;
  for (int strip = 0; strip < num_lanes; strip += width) {
    const int lane = strip + lane_in_strip;
    const int used = num_lanes - strip < width ? num_lanes - strip : width;
    for (int step = 0; step < frames + used - 1; ++step) {
      const int place = step - lane_in_strip;  // along the walk
      if (lane < num_lanes && place >= 0 && place < frames) {
        const int t = is_backward ? frames - 1 - place : place;
        const int u = is_backward ? cells.labels() - lane : lane;
        cells.Prefetch(cells.RowOf(is_backward ? t - kPrefetch : t + kPrefetch, u));
        const int64_t row = cells.RowOf(t, u);
        if (row >= 0) {
          if (is_backward) {
            arrays.beta[row] = cells.template Beta<Math>(row, t, u, &has_nan);
          } else {
            arrays.alpha[row] = cells.template Alpha<Math>(t, u);
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
template <typename Math, bool kIsWhole>
__global__ void __launch_bounds__(kUsesThreads, 4)
    DurationUsesKernel(LatticeBatch batch, LatticeOptions options, DurationArcs arcs,
                       Arrays arrays) {
  const int64_t warp = GlobalWarp();
  const int b = static_cast<int>(warp / batch.max_frames);
  const int t = static_cast<int>(warp - b * batch.max_frames);
  if (b >= batch.num_utterances || !batch.IsValid(b) || t >= batch.num_frames[b]) return;
  const Cells<kIsWhole> cells(batch, options, arcs, arrays, b);
  const Score total = -arrays.out.loss[b], label_gain = 1 + options.fastemit_lambda;
  const bool is_usual = total == total && total != kLogZero;
  const Score otherwise = total == total ? 0 : total;  // NaN stays
  const auto use = [&](Score log_use) {
    return static_cast<Score>(Math::ExpOf(static_cast<typename Math::C>(log_use)));
  };
  const int end = static_cast<int>(batch.ColumnEnd(b, t));
  for (int u = static_cast<int>(batch.ColumnBegin(b, t)) + Lane(); u < end; u += kWarp) {
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
        value = cells.HasLabel(t, u) ? label_gain * use(alpha + cells.Label(row, t, k) +
                                                        cells.AfterLabel(t, u, k) - total)
                                     : Score(0);
      }
      arrays.out.use_label[row * arcs.num_label + k] = value;
    }
  }
}

template <typename Math, bool kIsWhole>
void Launch(const LatticeBatch& batch, const LatticeOptions& options, const DurationArcs& arcs,
            const Arrays& arrays, void* stream) {
  const bool wants_uses = arrays.alpha != nullptr;
  const int64_t lanes = batch.max_targets + 1;
  const int threads =
      static_cast<int>(lanes < kMaxLanes ? CeilDivide(lanes, kWarp) * kWarp : kMaxLanes);
  TRANSDUCER_LAUNCH((DurationWalkKernel<Math, kIsWhole>),
                    batch.num_utterances * (wants_uses ? 2 : 1), threads, stream, batch, options,
                    arcs, arrays);
  if (!wants_uses) return;
  const int64_t blocks = CeilDivide(batch.num_utterances * batch.max_frames, kUsesThreads / kWarp);
  TRANSDUCER_LAUNCH((DurationUsesKernel<Math, kIsWhole>), blocks, kUsesThreads, stream, batch,
                    options, arcs, arrays);
}

}  // namespace

void DurationLatticeCuda(const LatticeBatch& batch, const LatticeOptions& options,
                         const DurationArcs& arcs, const ArcScores& scores, void* stream,
                         void* scratch, const ArcOut& out) {
  TRANSDUCER_CHECK(batch.max_frames < 0x3fffffff && batch.max_targets < 0x3fffffff,
                   "a lattice of more than 2^30 frames or symbols");
  Score* beta = static_cast<Score*>(scratch);
  Score* alpha = out.use_blank != nullptr ? beta + batch.num_rows : nullptr;
  const Arrays arrays{scores, out, beta, alpha};
  const bool is_whole = batch.band_start == nullptr && batch.windows == nullptr;
  const auto launch = options.exact ? (is_whole ? Launch<ExactSum, true> : Launch<ExactSum, false>)
                                    : (is_whole ? Launch<QuickSum, true> : Launch<QuickSum, false>);
  launch(batch, options, arcs, arrays, stream);
}

}  // namespace transducer
