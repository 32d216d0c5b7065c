// SPDX-License-Identifier: Apache-2.0
// Stage 2: one block walks the forward and one the backward variables of an utterance, side by
// side; then a third of each cell's work, the posteriors, is done for all cells at once.
//
// A block's lanes stand along one axis of the lattice and walk along the other. A cell is made of
// two values, one that its lane had at the step before (`own`) and one that the lane before it had
// (`neighbor`), so a step costs one barrier and two values a lane in shared memory:
//
//   regular                lane i is i steps behind lane 0: lanes walk an anti-diagonal. The arcs
//                          along both axes are alike, so lanes stand along the shorter one.
//   one symbol a frame     lanes stand along the symbols and walk the frames.
//
// A lattice with more lanes than a block has is cut into strips, one after the other; the last lane
// of a strip leaves what it hands over for the first lane of the next. The backward walk is the
// forward walk with both axes turned round.
#include "device_rows.cuh"
#include "lattice.h"
#include "log_add.h"

namespace transducer {
namespace {

constexpr int kMaxLanes = 512;  // of a block; more would not leave registers enough
constexpr int kPrefetch = 4;    // steps that a score is read ahead of its use; even

// Sums of logarithms are float64 always: that is where thousands of terms add up. What is added
// each time is small, and float32's transcendental functions are good to 6e-8 of it. Float64 ones
// would be most of the kernel where a GPU has few float64 units.
struct QuickMath {
  __device__ static Score LogAdd(Score a, Score b) {
    const Score high = a > b ? a : b;
    const Score low = a > b ? b : a;
    if (low == kLogZero) return high;
    return high + static_cast<Score>(log1pf(expf(static_cast<float>(low - high))));
  }
  __device__ static Score Exp(Score x) { return static_cast<Score>(expf(static_cast<float>(x))); }
};
struct ExactMath {
  __device__ static Score LogAdd(Score a, Score b) { return transducer::LogAdd(a, b); }
  __device__ static Score Exp(Score x) { return exp(x); }
};

// Scores of a call, and where its results go. Without uses there is no alpha, and use_* are null.
struct LatticeArrays {
  const Score *blank_score, *label_score;
  Score* loss;
  Score* alpha;                  // (num_rows,) workspace
  Score *use_blank, *use_label;  // first: log-probability of all ways on by either arc
  Score* edges;                  // (B, 2 walks, 2, steps) workspace, where there are strips
};

// What a step needs to know of its cell, read kPrefetch steps before.
struct CellInputs {
  int64_t row;  // -1: no such cell
  Score blank, label;
  Score forced;  // constrained: the blank that follows the label
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

  // All threads of the block. exchange is shared. Backward returns true in one thread, which has
  // set *total to beta(0, 0); *has_nan is each lane's own.
  __device__ bool Run(Score (*exchange)[kMaxLanes], Score* total, bool* has_nan) {
    const int lane_in_strip = static_cast<int>(threadIdx.x), width = static_cast<int>(blockDim.x);
    const int num_lanes = NumLanes(), length = Length();
    bool has_total = false;
    for (int strip = 0, parity = 0; strip < num_lanes; strip += width, parity ^= 1) {
      const int lane = strip + lane_in_strip;
      const int used = num_lanes - strip < width ? num_lanes - strip : width;
      const int num_steps = length + (kSkew ? used - 1 : 0);
      const Score* edge_before = EdgeOf(parity ^ 1);
      Score* edge = strip + width < num_lanes ? EdgeOf(parity) : nullptr;

      Score own = !kLanesAreFrames && lane == 0 ? 0 : kLogZero;  // before the first step
      exchange[1][lane_in_strip] = HandedBeforeFirst(lane);
      CellInputs inputs[kPrefetch];
#pragma unroll
      for (int k = 0; k < kPrefetch; ++k) {
        inputs[k] = Load(lane, k - (kSkew ? lane_in_strip : 0));
      }
      __syncthreads();
      for (int first = 0; first < num_steps; first += kPrefetch) {
#pragma unroll
        for (int k = 0; k < kPrefetch; ++k) {
          const int place = first + k - (kSkew ? lane_in_strip : 0);  // of the lane on its way
          const Score neighbor = lane_in_strip > 0 ? exchange[(k & 1) ^ 1][lane_in_strip - 1]
                                                   : BeforeStrip(lane, place, edge_before);
          Score handed = kLogZero;
          if (place >= 0) {
            const CellInputs cell = inputs[k];
            Score next_own = kLogZero;
            if (cell.row >= 0) {
              Visit(lane, place, cell, own, neighbor, &next_own, &handed, has_nan);
              if (kBackward && FrameAt(lane, place) == 0 && SymbolAt(lane, place) == 0) {
                *total = handed;
                has_total = true;
              }
            }
            own = next_own;
          }
          exchange[k & 1][lane_in_strip] = handed;
          if (edge != nullptr && lane_in_strip == width - 1 && place >= 0 && place < length) {
            edge[place] = handed;
          }
          inputs[k] = Load(lane, place + kPrefetch);
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

  __device__ CellInputs Load(int lane, int place) const {
    CellInputs inputs{-1, kLogZero, kLogZero, kLogZero};
    if (lane >= NumLanes() || place < 0 || place >= Length()) return inputs;
    const int t = FrameAt(lane, place), u = SymbolAt(lane, place);
    int64_t start = 0, end = labels_ + 1;
    if (batch_.band_start != nullptr) {
      start = batch_.BandStart(b_, t);
      end = batch_.ColumnEnd(b_, t);
      if (u < start || u >= end) return inputs;
    }
    inputs.row = first_row_ + t * stride_ + u - start;
    inputs.blank = arrays_.blank_score[inputs.row];
    if (u < labels_) inputs.label = arrays_.label_score[inputs.row];
    if (Traits::kLabelTakesBlank && u + 1 < end) {
      inputs.forced = arrays_.blank_score[inputs.row + 1];
    }
    return inputs;
  }

  // Behind the last frame, (T, U) is the end; a label from (T - 1, U - 1) also leads there in a
  // topology whose paths may end with one. Before the first frame nothing hands over a label.
  __device__ static Score HandedBeforeFirst(int lane) {
    return kBackward && Traits::kEndsWithLabel && lane == 0 ? 0 : kLogZero;
  }

  // What the first lane of a strip gets. Lane 0 with lanes along the frames: the way in, or out.
  __device__ Score BeforeStrip(int lane, int place, const Score* edge_before) const {
    if (lane == 0) return kLanesAreFrames && place == 0 ? 0 : kLogZero;
    const int at = kSkew ? place : place - 1;
    return at >= 0 && at < Length() ? edge_before[at] : kLogZero;
  }

  __device__ void Visit(int lane, int place, const CellInputs& cell, Score own, Score neighbor,
                        Score* next_own, Score* handed, bool* has_nan) const {
    const int t = FrameAt(lane, place);
    Score label = cell.label;
    if (Traits::kLabelTakesBlank) label += cell.forced;
    label += delay_penalty_ * (middle_ - static_cast<Score>(t));
    if (kBackward) {
      *has_nan |= cell.blank != cell.blank || cell.label != cell.label;
      const Score by_blank = cell.blank + (kLanesAreFrames ? neighbor : own);
      const Score by_label = label + (kLanesAreFrames ? own : neighbor);
      if (arrays_.use_blank != nullptr) {
        arrays_.use_blank[cell.row] = by_blank;
        arrays_.use_label[cell.row] = by_label;
      }
      *next_own = *handed = Math::LogAdd(by_blank, by_label);
    } else {
      const Score alpha = Math::LogAdd(own, neighbor);
      arrays_.alpha[cell.row] = alpha;
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
};

// Blocks [0, B): backward; [B, 2B): forward.
template <Topology kTopology, bool kLanesAreFrames, typename Math>
__global__ void __launch_bounds__(kMaxLanes, 1)
    WalkKernel(LatticeBatch batch, LatticeOptions options, LatticeArrays arrays) {
  __shared__ Score exchange[2][kMaxLanes];
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

// use = exp(alpha + ways on - total), cell by cell. A warp a frame.
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

// constrained: the blank after a label is a use of the cell above's blank score.
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
