// SPDX-License-Identifier: Apache-2.0
// A block an utterance: first its threshold and how many rows it keeps, then, with all counts
// known, the rows themselves, in order.
#include "device_rows.cuh"
#include "occupancy.h"
#include "occupancy_grid.h"

namespace transducer {
namespace {

constexpr int kThreads = 512, kWarps = kThreads / kWarp;

// Masses are added as integers, in units of 2^-32 of the bin's power of two and rounded up: integer
// sums do not depend on their order, and the bound on the dropped mass still holds. 2^30 cells of
// one bin fit.
using Units = unsigned long long;
constexpr int64_t kUnitBits = 32;

__device__ inline int64_t OctaveOf(int64_t bin) { return bin / kBinsPerOctave + kLowestExponent; }

__device__ inline Units ToUnits(Score mass, int64_t bin) {
  const Score units = ceil(mass * PowerOfTwo(kUnitBits - OctaveOf(bin)));
  constexpr Score kMost = 17179869184.0;  // 2^34: the last bin has no upper end
  return static_cast<Units>(units < kMost ? units : kMost);
}

// The sum over the block, to every thread. partial is shared, one a warp.
__device__ int64_t BlockSum(int64_t value, int64_t (&partial)[kWarps]) {
  const int64_t of_warp = WarpSum(value);
  if (Lane() == 0) partial[threadIdx.x / kWarp] = of_warp;
  __syncthreads();
  int64_t sum = 0;
  for (int warp = 0; warp < kWarps; ++warp) sum += partial[warp];
  return sum;
}

// The cells of an utterance in the order of their rows; places that are padding are no cells.
class CellWalk {
 public:
  __device__ CellWalk(const LatticeBatch& batch, int64_t b)
      : batch_(batch), b_(b), stride_(batch.Stride(b)), size_(batch.num_frames[b] * stride_) {}

  __device__ int64_t size() const { return size_; }

  // Row of the cell at a place, -1 if there is none.
  __device__ int64_t RowAt(int64_t place) const {
    if (place >= size_) return -1;
    const int64_t t = size_ <= 0xffffffff
                          ? static_cast<uint32_t>(place) / static_cast<uint32_t>(stride_)
                          : place / stride_;
    const int64_t u = place - t * stride_ + batch_.BandStart(b_, t);
    if (u < batch_.ColumnBegin(b_, t) || u >= batch_.ColumnEnd(b_, t)) return -1;
    return batch_.first_row[b_] + place;
  }

 private:
  const LatticeBatch& batch_;
  const int64_t b_, stride_, size_;
};

struct Uses {
  const Score *blank, *label;
  __device__ Score Occupancy(int64_t row) const { return blank[row] + label[row]; }
  __device__ bool IsKept(int64_t row, Score lowest) const {
    const Score occupancy = Occupancy(row);
    return !(occupancy < lowest || occupancy == 0);  // NaN is kept
  }
};

// One warp: the first bin at which the mass up to and with it exceeds the limit, and the mass
// below.
__device__ int64_t FirstKeptBin(const Units* units, Score limit, Score* dropped) {
  constexpr int kBinsPerLane = static_cast<int>(kNumBins) / kWarp;
  static_assert(kNumBins % kWarp == 0, "");
  const int first = Lane() * kBinsPerLane;
  const auto mass_of = [&](int64_t bin) {
    return static_cast<Score>(units[bin]) * PowerOfTwo(OctaveOf(bin) - kUnitBits);
  };
  Score of_lane = 0;
  for (int i = 0; i < kBinsPerLane; ++i) of_lane += mass_of(first + i);
  Score before = 0;  // mass of the lanes before this one, always added up in their order
  for (int lane = 0; lane < kWarp; ++lane) {
    const Score of_other = __shfl_sync(kFullWarp, of_lane, lane);
    if (lane < Lane()) before += of_other;
  }
  int64_t bin = first;
  Score sum = before;
  while (bin < first + kBinsPerLane && bin < kNumBins - 1 && sum + mass_of(bin) <= limit) {
    sum += mass_of(bin++);
  }
  const bool stops = bin < first + kBinsPerLane;
  const int stopping_lane = __ffs(static_cast<int>(__ballot_sync(kFullWarp, stops))) - 1;
  *dropped = __shfl_sync(kFullWarp, sum, stopping_lane);
  return __shfl_sync(kFullWarp, bin, stopping_lane);
}

__global__ void __launch_bounds__(kThreads)
    ThresholdKernel(LatticeBatch batch, Uses uses, Score dropped_mass, Score* lowest_kept,
                    int64_t* num_kept, Score* dropped) {
  __shared__ Units units[kNumBins];
  __shared__ int64_t partial[kWarps];
  __shared__ Score threshold;
  const int64_t b = blockIdx.x;
  const int thread = static_cast<int>(threadIdx.x);
  if (!batch.IsValid(b)) {
    if (thread == 0) {
      lowest_kept[b] = dropped[b] = 0;
      num_kept[b] = 0;
    }
    return;
  }
  const CellWalk cells(batch, b);
  Score lowest = 0, dropped_here = 0;
  if (dropped_mass > 0) {
    for (int64_t bin = thread; bin < kNumBins; bin += kThreads) units[bin] = 0;
    __syncthreads();
    for (int64_t place = thread; place < cells.size(); place += kThreads) {
      const int64_t row = cells.RowAt(place);
      if (row < 0) continue;
      const Score occupancy = uses.Occupancy(row);
      if (!(occupancy > 0)) continue;  // NaN
      const int64_t bin = BinOf(occupancy);
      atomicAdd(&units[bin], ToUnits(occupancy, bin));
    }
    __syncthreads();
    if (thread < kWarp) {
      const Score limit =
          dropped_mass * static_cast<Score>(batch.num_frames[b] + batch.num_targets[b]);
      const int64_t bin = FirstKeptBin(units, limit, &dropped_here);
      if (thread == 0) threshold = EdgeOf(bin);
    }
    __syncthreads();
    lowest = threshold;
  }
  int64_t count = 0;
  for (int64_t place = thread; place < cells.size(); place += kThreads) {
    const int64_t row = cells.RowAt(place);
    count += row >= 0 && uses.IsKept(row, lowest);
  }
  count = BlockSum(count, partial);
  if (thread == 0) {
    lowest_kept[b] = lowest;
    num_kept[b] = count;
    dropped[b] = dropped_here;
  }
}

__global__ void __launch_bounds__(kThreads)
    CompactKernel(LatticeBatch batch, Uses uses, const Score* lowest_kept, const int64_t* num_kept,
                  int64_t* kept_rows) {
  __shared__ int64_t partial[kWarps];
  __shared__ int count_of_warp[2][kWarps];
  const int64_t b = blockIdx.x;
  const int thread = static_cast<int>(threadIdx.x), warp = thread / kWarp;
  if (!batch.IsValid(b)) return;
  int64_t before = 0;
  for (int64_t other = thread; other < b; other += kThreads) before += num_kept[other];
  int64_t out = BlockSum(before, partial);
  const CellWalk cells(batch, b);
  const Score lowest = lowest_kept[b];
  int buffer = 0;  // two in turn: one barrier a round
  for (int64_t begin = 0; begin < cells.size(); begin += kThreads, buffer ^= 1) {
    const int64_t row = cells.RowAt(begin + thread);
    const bool is_kept = row >= 0 && uses.IsKept(row, lowest);
    const unsigned kept = __ballot_sync(kFullWarp, is_kept);
    if (Lane() == 0) count_of_warp[buffer][warp] = __popc(kept);
    __syncthreads();
    int64_t mine = out;
    for (int other = 0; other < kWarps; ++other) {
      const int count = count_of_warp[buffer][other];
      mine += other < warp ? count : 0;
      out += count;
    }
    if (is_kept) kept_rows[mine + __popc(kept & ((1u << Lane()) - 1))] = row;
  }
}

}  // namespace

void KeptRowsCuda(const LatticeBatch& batch, const Score* use_blank, const Score* use_label,
                  double dropped_mass, void* stream, Score* scratch, int64_t* kept_rows,
                  int64_t* num_kept, Score* dropped) {
  const Uses uses{use_blank, use_label};
  TRANSDUCER_LAUNCH(ThresholdKernel, batch.num_utterances, kThreads, stream, batch, uses,
                    dropped_mass, scratch, num_kept, dropped);
  TRANSDUCER_LAUNCH(CompactKernel, batch.num_utterances, kThreads, stream, batch, uses, scratch,
                    num_kept, kept_rows);
}

}  // namespace transducer
