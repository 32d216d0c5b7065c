// SPDX-License-Identifier: Apache-2.0
// Stage 2: one block computes the forward variables of an utterance and one the backward variables,
// concurrently. A second kernel computes the posteriors of all cells in parallel.
//
// The lanes of a block are placed along one axis of the lattice and walk along the other. A cell is
// computed from two values: one of its own lane at the step before (`own`) and one of the lane
// before it (`neighbor`). So a step costs one barrier and two values per lane in shared memory:
//
//   regular                lane i is i steps behind lane 0: lanes walk an anti-diagonal. The arcs
//                          along both axes are alike, so lanes are along the shorter axis.
//   one symbol a frame     lanes are along the symbols and walk the frames.
//
// A lattice that needs more lanes than a block has is processed in strips, one after the other; the
// last lane of a strip stores its values for the first lane of the next. The backward walk is the
// forward walk with both axes reversed.
#include "device_rows.cuh"
#include "lattice.h"
#include "log_add.h"

namespace transducer {
namespace {

constexpr int kMaxLanes = 512;  // of a block; with more there are too few registers
constexpr int kPrefetch = 4;    // steps that a score is read ahead of its use; even

// log(1 + e) for e in [0, 1]. The polynomial errs by 5e-9, and its rounding by up to 8e-8. Its three
// chains are short: at each step a thread waits for its result.
__device__ inline float Log1p(float e) {
  const float e2 = e * e, e4 = e2 * e2;
  const float low = fmaf(e, -0.499970943f, 0.999999344f);
  const float middle = fmaf(e, -0.246726885f, 0.332896680f);
  const float high = fmaf(e, -0.126908898f, 0.185698196f);
  const float top = fmaf(e2, 0.0039304602f, fmaf(e, -0.0238554683f, 0.0680847093f));
  return e * fmaf(e4, fmaf(e2, top, high), fmaf(e2, middle, low));
}

// Sums of logarithms are always float64, because thousands of terms add up. Each term is small, so
// the error of 1e-7 of float32 functions is enough for it. On a GPU with few float64 units, float64
// functions would take most of the time of the kernel.
struct QuickMath {
  __device__ static Score LogAdd(Score a, Score b) {
    const Score high = a > b ? a : b;
    const Score low = a > b ? b : a;
    const Score sum = high + static_cast<Score>(Log1p(QuickExp(static_cast<float>(low - high))));
    return low == kLogZero ? high : sum;  // not a branch: lanes would take turns
  }
  __device__ static Score Exp(Score x) { return static_cast<Score>(expf(static_cast<float>(x))); }
};
struct ExactMath {
  __device__ static Score LogAdd(Score a, Score b) { return transducer::LogAdd(a, b); }
  __device__ static Score Exp(Score x) { return exp(x); }
};

// Inputs, outputs and scratch of a call. Without uses there is no alpha, and use_* are null.
struct LatticeArrays {
  const Score *blank_score, *label_score;
  Score* loss;
  Score* alpha;                  // (num_rows,) workspace
  Score *use_blank, *use_label;  // at first: log-probability of all paths that continue by that arc
  Score* edges;                  // (B, 2 walks, 2, steps) workspace, where there are strips
};

// Inputs of a cell, read kPrefetch steps before their use.
struct CellInputs {
  int64_t row;  // -1: no such cell
  Score blank, label;
  Score forced;        // constrained: the blank that follows the label
  Score before_strip;  // in the first lane of a strip, what the strip before hands over
};

template <Topology kTopology, bool kLanesAreFrames, bool kBackward, typename Math>
class Walk {
  using Traits = StaticTraits<kTopology>;

 public:
  static_assert(Traits::kLabelFrames == 0 || !kLanesAreFrames, "");

  __device__ Walk(const LatticeBatch& batch, const LatticeOptions& options, int b,
                  const LatticeArrays& arrays)
      : batch_(batch),
        arrays_(arrays),
        b_(b),
        frames_(static_cast<int>(batch.num_frames[b])),
        labels_(static_cast<int>(batch.num_targets[b])),
        stride_(batch.Stride(b)),
        first_row_(batch.first_row[b]),
        delay_penalty_(options.delay_penalty) {
    const int64_t first_frame = batch.first_frame != nullptr ? batch.first_frame[b] : 0;
    middle_ = Score(0.5) * static_cast<Score>(frames_ - 1 - first_frame);
  }

  // Called by all threads of the block; exchange is in shared memory. For the backward walk, the
  // thread that computes beta(0, 0) stores it in *total and returns true. *has_nan is per lane.
  __device__ bool Run(Score (*exchange)[kMaxLanes + 1], Score* total, bool* has_nan) {
    const int lane_in_strip = static_cast<int>(threadIdx.x), width = static_cast<int>(blockDim.x);
    const int num_lanes = NumLanes(), length = Length();
    bool has_total = false;
    for (int strip = 0, parity = 0; strip < num_lanes; strip += width, parity ^= 1) {
      const int lane = strip + lane_in_strip;
      const int used = num_lanes - strip < width ? num_lanes - strip : width;
      const int num_steps = length + (kSkew ? used - 1 : 0);
      StartLane(lane);
      const Score* edge_before = EdgeOf(parity ^ 1);
      Score* edge = strip + width < num_lanes ? EdgeOf(parity) : nullptr;

      Score own = !kLanesAreFrames && lane == 0 ? 0 : kLogZero;  // before the first step
      exchange[1][lane_in_strip + 1] = HandedBeforeFirst(lane);
      CellInputs inputs[kPrefetch];
#pragma unroll
      for (int k = 0; k < kPrefetch; ++k) {
        inputs[k] = Load(lane, k - (kSkew ? lane_in_strip : 0), edge_before);
      }
      __syncthreads();
      for (int first = 0; first < num_steps; first += kPrefetch) {
#pragma unroll
        for (int k = 0; k < kPrefetch; ++k) {
          // A thread waits for each of its instructions here, so that a condition selects a value,
          // and does not branch.
          const int place = first + k - (kSkew ? lane_in_strip : 0);  // along the walk
          const CellInputs cell = inputs[k];
          const Score before = exchange[(k & 1) ^ 1][lane_in_strip];
          const Score neighbor = lane_in_strip > 0 ? before : cell.before_strip;
          Score next_own, handed;
          Visit(FrameAt(lane, place), cell, own, neighbor, &next_own, &handed, has_nan);
          const bool is_cell = cell.row >= 0;
          handed = is_cell ? handed : kLogZero;
          if (place >= 0) own = is_cell ? next_own : kLogZero;
          if (kBackward && is_cell && FrameAt(lane, place) == 0 && SymbolAt(lane, place) == 0) {
            *total = handed;
            has_total = true;
          }
          exchange[k & 1][lane_in_strip + 1] = handed;
          if (edge != nullptr && lane_in_strip == width - 1 && place >= 0 && place < length) {
            edge[place] = handed;
          }
          inputs[k] = Load(lane, place + kPrefetch, edge_before);
          __syncthreads();
        }
      }
    }
    return has_total;
  }

 private:
  static constexpr bool kSkew = Traits::kLabelFrames == 0;

  __device__ int NumLanes() const { return kLanesAreFrames ? frames_ : labels_ + 1; }
  __device__ int Length() const { return kLanesAreFrames ? labels_ + 1 : frames_; }
  __device__ int FrameAt(int lane, int place) const {
    const int t = kLanesAreFrames ? lane : place;
    return kBackward ? frames_ - 1 - t : t;
  }
  __device__ int SymbolAt(int lane, int place) const {
    const int u = kLanesAreFrames ? place : lane;
    return kBackward ? labels_ - u : u;
  }

  // The rows of a lane in a lattice without a band: lane_row_ + place * row_step_.
  __device__ void StartLane(int lane) {
    lane_row_ = first_row_ + FrameAt(lane, 0) * stride_ + SymbolAt(lane, 0);
    row_step_ = (kBackward ? -1 : 1) * static_cast<int>(kLanesAreFrames ? 1 : stride_);
  }

  __device__ CellInputs Load(int lane, int place, const Score* edge_before) const {
    const int u = SymbolAt(lane, place);
    int64_t end = labels_ + 1, label_end = labels_;
    int64_t row = lane_row_ + static_cast<int64_t>(place) * row_step_;
    bool is_cell = lane < NumLanes() && place >= 0 && place < Length();
    if (batch_.band_start != nullptr || batch_.windows != nullptr) {
      const int t = FrameAt(lane, place);
      const int64_t begin = is_cell ? batch_.ColumnBegin(b_, t) : 0;
      end = is_cell ? batch_.ColumnEnd(b_, t) : 0;
      label_end = is_cell ? batch_.LabelEnd(b_, t) : 0;
      row = first_row_ + t * stride_ + u - (is_cell ? batch_.BandStart(b_, t) : 0);
      is_cell = u >= begin && u < end;
    }
    CellInputs inputs{-1, kLogZero, kLogZero, kLogZero, kLogZero};
    if (is_cell) inputs.row = row;
    if (is_cell) inputs.blank = arrays_.blank_score[row];
    if (is_cell && u < label_end) inputs.label = arrays_.label_score[row];
    if (Traits::kLabelTakesBlank && is_cell && u + 1 < end) {
      inputs.forced = arrays_.blank_score[row + 1];
    }
    if (threadIdx.x == 0) inputs.before_strip = BeforeStrip(lane, place, edge_before);
    return inputs;
  }

  // (T, U), behind the last frame, is the end. In topologies whose paths may end with a label, a
  // label arc from (T - 1, U - 1) also leads there. No label arc leads into the first frame.
  __device__ static Score HandedBeforeFirst(int lane) {
    return kBackward && Traits::kEndsWithLabel && lane == 0 ? 0 : kLogZero;
  }

  // The neighbor value of the first lane of a strip. Lane 0 with lanes along the frames gets the
  // start of the paths, or their end.
  __device__ Score BeforeStrip(int lane, int place, const Score* edge_before) const {
    if (lane == 0) return kLanesAreFrames && place == 0 ? 0 : kLogZero;
    const int at = kSkew ? place : place - 1;
    return at >= 0 && at < Length() ? edge_before[at] : kLogZero;
  }

  // Without a cell the results mean nothing, and nothing is stored.
  __device__ void Visit(int t, const CellInputs& cell, Score own, Score neighbor, Score* next_own,
                        Score* handed, bool* has_nan) const {
    const bool is_cell = cell.row >= 0;
    Score label = cell.label;
    if (Traits::kLabelTakesBlank) label += cell.forced;
    if (delay_penalty_ != 0) label += delay_penalty_ * (middle_ - static_cast<Score>(t));
    if (kBackward) {
      *has_nan |= cell.blank != cell.blank || cell.label != cell.label;
      const Score by_blank = cell.blank + (kLanesAreFrames ? neighbor : own);
      const Score by_label = label + (kLanesAreFrames ? own : neighbor);
      if (arrays_.use_blank != nullptr && is_cell) {
        arrays_.use_blank[cell.row] = by_blank;
        arrays_.use_label[cell.row] = by_label;
      }
      *next_own = *handed = Math::LogAdd(by_blank, by_label);
    } else {
      const Score alpha = Math::LogAdd(own, neighbor);
      if (is_cell) arrays_.alpha[cell.row] = alpha;
      *next_own = alpha + (kLanesAreFrames ? label : cell.blank);
      *handed = alpha + (kLanesAreFrames ? cell.blank : label);
    }
  }

  __device__ Score* EdgeOf(int parity) const {
    const int64_t longest = kLanesAreFrames ? batch_.max_targets + 1 : batch_.max_frames;
    return arrays_.edges + ((b_ * 2 + (kBackward ? 0 : 1)) * 2 + parity) * longest;
  }

  const LatticeBatch& batch_;
  const LatticeArrays& arrays_;
  const int64_t b_;
  const int frames_, labels_;
  const int64_t stride_, first_row_;
  const Score delay_penalty_;
  Score middle_;
  int64_t lane_row_ = 0;
  int row_step_ = 0;
};

// Blocks [0, B): backward; [B, 2B): forward.
template <Topology kTopology, bool kLanesAreFrames, typename Math>
__global__ void __launch_bounds__(kMaxLanes, 1)
    WalkKernel(LatticeBatch batch, LatticeOptions options, LatticeArrays arrays) {
  __shared__ Score exchange[2][kMaxLanes + 1];  // slot 0 is unused
  const bool is_backward = blockIdx.x < batch.num_utterances;
  const int b = static_cast<int>(is_backward ? blockIdx.x : blockIdx.x - batch.num_utterances);
  if (!batch.IsValid(b)) {
    if (is_backward && threadIdx.x == 0) arrays.loss[b] = kNaN;
    return;
  }
  Score total = kLogZero;
  bool has_nan = false;
  if (!is_backward) {
    Walk<kTopology, kLanesAreFrames, false, Math>(batch, options, b, arrays)
        .Run(exchange, &total, &has_nan);
    return;
  }
  const bool has_total = Walk<kTopology, kLanesAreFrames, true, Math>(batch, options, b, arrays)
                             .Run(exchange, &total, &has_nan);
  // In a band there may be no cell (0, 0): then no thread has the total, and no path exists.
  has_nan = __syncthreads_or(has_nan);
  if (__syncthreads_or(has_total) ? has_total : threadIdx.x == 0) {
    arrays.loss[b] = has_nan ? kNaN : -total;
  }
}

constexpr int kUsesThreads = 256;

// use = exp(alpha + log-probability of what follows - total) for each cell. One warp per frame.
template <typename Math>
__global__ void __launch_bounds__(kUsesThreads, 4)
    UsesKernel(LatticeBatch batch, Score label_gain, LatticeArrays arrays) {
  const int64_t warp = GlobalWarp();
  const int64_t b = warp / batch.max_frames, t = warp - b * batch.max_frames;
  if (b >= batch.num_utterances || !batch.IsValid(b) || t >= batch.num_frames[b]) return;
  const Score total = -arrays.loss[b];
  const int64_t end = batch.ColumnEnd(b, t), labels = batch.num_targets[b];
  for (int64_t u = batch.ColumnBegin(b, t) + Lane(); u < end; u += kWarp) {
    const int64_t row = batch.Row(b, t, u);
    Score use_blank = total, use_label = total;  // NaN
    if (total == kLogZero) {
      use_blank = use_label = 0;
    } else if (total == total) {
      const Score alpha = arrays.alpha[row];
      use_blank = Math::Exp(alpha + arrays.use_blank[row] - total);
      use_label =
          u < labels ? label_gain * Math::Exp(alpha + arrays.use_label[row] - total) : Score(0);
    }
    arrays.use_blank[row] = use_blank;
    arrays.use_label[row] = use_label;
  }
}

// constrained: the blank after a label is a use of the blank score of the next symbol's cell.
__global__ void __launch_bounds__(kUsesThreads, 4)
    ForcedBlankKernel(LatticeBatch batch, LatticeArrays arrays) {
  const int64_t warp = GlobalWarp();
  const int64_t b = warp / batch.max_frames, t = warp - b * batch.max_frames;
  if (b >= batch.num_utterances || !batch.IsValid(b) || t >= batch.num_frames[b]) return;
  const int64_t end = batch.ColumnEnd(b, t);
  for (int64_t u = batch.ColumnBegin(b, t) + 1 + Lane(); u < end; u += kWarp) {
    const int64_t row = batch.Row(b, t, u);
    arrays.use_blank[row] += arrays.use_label[row - 1];
  }
}

bool LanesAreFrames(const LatticeBatch& batch, Topology topology) {
  return TraitsOf(topology).label_frames == 0 && batch.max_frames < batch.max_targets + 1;
}

int64_t MostLanes(const LatticeBatch& batch, Topology topology) {
  return LanesAreFrames(batch, topology) ? batch.max_frames : batch.max_targets + 1;
}

int64_t EdgeScratch(const LatticeBatch& batch, Topology topology) {
  if (MostLanes(batch, topology) <= kMaxLanes) return 0;
  const bool lanes_are_frames = LanesAreFrames(batch, topology);
  return batch.num_utterances * 4 * (lanes_are_frames ? batch.max_targets + 1 : batch.max_frames);
}

template <Topology kTopology, bool kLanesAreFrames, typename Math>
void LaunchAll(const LatticeBatch& batch, const LatticeOptions& options,
               const LatticeArrays& arrays, void* stream) {
  const bool wants_uses = arrays.use_blank != nullptr;
  const int64_t lanes = MostLanes(batch, kTopology);
  const int threads =
      static_cast<int>(lanes < kMaxLanes ? CeilDivide(lanes, kWarp) * kWarp : kMaxLanes);
  TRANSDUCER_LAUNCH((WalkKernel<kTopology, kLanesAreFrames, Math>),
                    batch.num_utterances * (wants_uses ? 2 : 1), threads, stream, batch, options,
                    arrays);
  if (!wants_uses) return;
  const int64_t blocks = CeilDivide(batch.num_utterances * batch.max_frames, kUsesThreads / kWarp);
  TRANSDUCER_LAUNCH(UsesKernel<Math>, blocks, kUsesThreads, stream, batch,
                    1 + options.fastemit_lambda, arrays);
  if (StaticTraits<kTopology>::kLabelTakesBlank) {
    TRANSDUCER_LAUNCH(ForcedBlankKernel, blocks, kUsesThreads, stream, batch, arrays);
  }
}

template <typename Math>
void LaunchTopology(const LatticeBatch& batch, const LatticeOptions& options,
                    const LatticeArrays& arrays, void* stream) {
  CallWithTopology(options.topology, [&](auto topology) {
    constexpr Topology kTopology = decltype(topology)::value;
    if constexpr (StaticTraits<kTopology>::kLabelFrames == 0) {
      if (LanesAreFrames(batch, kTopology)) {
        return LaunchAll<kTopology, true, Math>(batch, options, arrays, stream);
      }
    }
    LaunchAll<kTopology, false, Math>(batch, options, arrays, stream);
  });
}

}  // namespace

int64_t LatticeScratchCuda(const LatticeBatch& batch, Topology topology, bool with_uses) {
  const int64_t numbers = EdgeScratch(batch, topology) + (with_uses ? batch.num_rows : 0);
  return numbers * static_cast<int64_t>(sizeof(Score));
}

void LatticeCuda(const LatticeBatch& batch, const LatticeOptions& options,
                 const LatticeScores& scores, void* stream, void* scratch, const LatticeOut& out) {
  TRANSDUCER_CHECK(batch.max_frames < 0x3fffffff && batch.max_targets < 0x3fffffff,
                   "a lattice of more than 2^30 frames or symbols");
  Score* edges = static_cast<Score*>(scratch);
  Score* alpha = edges + EdgeScratch(batch, options.topology);
  const LatticeArrays arrays{scores.blank,  scores.label,  out.loss, alpha,
                             out.use_blank, out.use_label, edges};
  if (options.exact) {
    LaunchTopology<ExactMath>(batch, options, arrays, stream);
  } else {
    LaunchTopology<QuickMath>(batch, options, arrays, stream);
  }
}

}  // namespace transducer
