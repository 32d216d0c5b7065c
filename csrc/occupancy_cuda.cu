// SPDX-License-Identifier: Apache-2.0
// Several blocks per utterance, each with a run of its cells. The first kernel computes a histogram
// of the run's occupancies; the second the threshold, from all histograms, and the number of rows
// that the run keeps; the third writes the rows, in order.
#include "device_rows.cuh"
#include "occupancy.h"
#include "occupancy_grid.h"

namespace transducer {
namespace {

constexpr int kThreads = 512, kWarps = kThreads / kWarp;
constexpr int kBlocksAtOnce = 2;  // per multiprocessor; without this bound the compiler spills

// Masses are added as integers, in units of 2^-32 of the bin's power of two, rounded up. Integer
// sums do not depend on their order, and the bound on the dropped mass still holds. The sum of 2^30
// cells of one bin does not overflow.
using Units = unsigned long long;
constexpr int64_t kUnitBits = 32;

__device__ inline int64_t OctaveOf(int64_t bin) { return bin / kBinsPerOctave + kLowestExponent; }

__device__ inline Units ToUnits(Score mass, int64_t bin) {
  const Score units = ceil(mass * PowerOfTwo(kUnitBits - OctaveOf(bin)));
  constexpr Score kMost = 17179869184.0;  // 2^34: the last bin has no upper end
  return static_cast<Units>(units < kMost ? units : kMost);
}

// Returns the sum over the block to every thread. partial is in shared memory, one element per
// warp.
__device__ int64_t BlockSum(int64_t value, int64_t (&partial)[kWarps]) {
  const int64_t of_warp = WarpSum(value);
  if (Lane() == 0) partial[threadIdx.x / kWarp] = of_warp;
  __syncthreads();
  int64_t sum = 0;
  for (int warp = 0; warp < kWarps; ++warp) sum += partial[warp];
  return sum;
}

// A run of the cells of an utterance in the order of their rows. Places 0, 1, ... are the rows of
// the utterance; places of padding have no cell.
class CellRun {
 public:
  __device__ CellRun(const LatticeBatch& batch, int64_t b, int64_t run, int64_t num_runs)
      : batch_(batch), b_(b), stride_(batch.Stride(b)), size_(batch.num_frames[b] * stride_) {
    const int64_t length = (size_ + num_runs - 1) / num_runs;
    begin_ = run * length;
    end_ = begin_ + length < size_ ? begin_ + length : size_;
  }

  __device__ int64_t begin() const { return begin_; }
  __device__ int64_t end() const { return end_; }

  // Row of the cell at a place, -1 if there is none.
  __device__ int64_t RowAt(int64_t place) const {
    if (place >= end_) return -1;
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
  int64_t begin_, end_;
};

constexpr int64_t kRowsPerRun = 4096;

// Results of one kernel that the next one reads. All of it is written before it is read.
struct Scratch {
  Units* units;       // (B, runs, kNumBins): the histograms
  int64_t* num_kept;  // (B, runs)
  int64_t num_runs;

  Scratch(const LatticeBatch& batch, Score* memory) : num_runs(NumRuns(batch, kRowsPerRun)) {
    const int64_t total = batch.num_utterances * num_runs;
    num_kept = reinterpret_cast<int64_t*>(memory);
    units = reinterpret_cast<Units*>(memory + total);
  }
  __device__ Units* UnitsOf(int64_t b, int64_t run) const {
    return units + (b * num_runs + run) * kNumBins;
  }
};
static_assert(sizeof(Units) == sizeof(Score) && sizeof(int64_t) == sizeof(Score), "");

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

__global__ void __launch_bounds__(kThreads, kBlocksAtOnce)
    HistogramKernel(LatticeBatch batch, Uses uses, Scratch scratch) {
  __shared__ Units units[kNumBins];
  const int64_t b = blockIdx.x / scratch.num_runs, run = blockIdx.x - b * scratch.num_runs;
  if (!batch.IsValid(b)) return;
  const int thread = static_cast<int>(threadIdx.x);
  for (int64_t bin = thread; bin < kNumBins; bin += kThreads) units[bin] = 0;
  __syncthreads();
  const CellRun cells(batch, b, run, scratch.num_runs);
  Units of_bin_0 = 0;  // bin 0 has most cells of a trained model: atomics on it would be slow
  for (int64_t place = cells.begin() + thread; place < cells.end(); place += kThreads) {
    const int64_t row = cells.RowAt(place);
    if (row < 0) continue;
    const Score occupancy = uses.Occupancy(b, row);
    if (!(occupancy > 0)) continue;  // NaN
    const int64_t bin = BinOf(occupancy);
    const Units mass = ToUnits(occupancy, bin);
    if (bin == 0) {
      of_bin_0 += mass;
    } else {
      atomicAdd(&units[bin], mass);
    }
  }
  of_bin_0 = WarpSum(of_bin_0);
  if (Lane() == 0 && of_bin_0 != 0) atomicAdd(&units[0], of_bin_0);
  __syncthreads();
  Units* out = scratch.UnitsOf(b, run);
  for (int64_t bin = thread; bin < kNumBins; bin += kThreads) out[bin] = units[bin];
}

// Every block of an utterance finds the same threshold and counts the rows that its run keeps.
__global__ void __launch_bounds__(kThreads, kBlocksAtOnce)
    CountKernel(LatticeBatch batch, Uses uses, Score dropped_mass, Scratch scratch,
                Score* lowest_kept, Score* dropped) {
  __shared__ Units units[kNumBins];
  __shared__ int64_t partial[kWarps];
  __shared__ Score threshold;
  const int64_t b = blockIdx.x / scratch.num_runs, run = blockIdx.x - b * scratch.num_runs;
  const int thread = static_cast<int>(threadIdx.x);
  if (!batch.IsValid(b)) {
    if (thread == 0) {
      scratch.num_kept[blockIdx.x] = 0;
      if (run == 0) lowest_kept[b] = dropped[b] = 0;
    }
    return;
  }
  Score lowest = 0, dropped_here = 0;
  if (dropped_mass > 0) {
    for (int64_t bin = thread; bin < kNumBins; bin += kThreads) {
      Units sum = 0;
      for (int64_t other = 0; other < scratch.num_runs; ++other) {
        sum += scratch.UnitsOf(b, other)[bin];
      }
      units[bin] = sum;
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
  const CellRun cells(batch, b, run, scratch.num_runs);
  int64_t count = 0;
  for (int64_t place = cells.begin() + thread; place < cells.end(); place += kThreads) {
    const int64_t row = cells.RowAt(place);
    count += row >= 0 && Uses::IsKept(uses.Occupancy(b, row), lowest);
  }
  count = BlockSum(count, partial);
  if (thread == 0) {
    scratch.num_kept[blockIdx.x] = count;
    if (run == 0) {
      lowest_kept[b] = lowest;
      dropped[b] = dropped_here;
    }
  }
}

__global__ void __launch_bounds__(kThreads, kBlocksAtOnce)
    CompactKernel(LatticeBatch batch, Uses uses, Scratch scratch, KeptRowsOut result) {
  __shared__ int64_t partial[kWarps];
  __shared__ int count_of_warp[2][kWarps];
  const int64_t b = blockIdx.x / scratch.num_runs, run = blockIdx.x - b * scratch.num_runs;
  const int thread = static_cast<int>(threadIdx.x), warp = thread / kWarp;
  if (run == 0 && thread == 0) {
    int64_t total = 0;
    for (int64_t other = 0; other < scratch.num_runs; ++other) {
      total += scratch.num_kept[blockIdx.x + other];
    }
    result.num_kept[b] = total;
  }
  const bool has_rows = batch.IsValid(b) && scratch.num_kept[blockIdx.x] != 0;
  const bool is_last = blockIdx.x + 1 == batch.num_utterances * scratch.num_runs;
  if (!has_rows && !is_last) return;
  int64_t before = 0;
  for (int64_t other = thread; other < blockIdx.x; other += kThreads) {
    before += scratch.num_kept[other];
  }
  int64_t out = BlockSum(before, partial);
  if (is_last && thread == 0) *result.total = out + scratch.num_kept[blockIdx.x];
  if (!has_rows) return;
  const CellRun cells(batch, b, run, scratch.num_runs);
  const Score lowest = result.lowest[b];
  int buffer = 0;  // two alternate, so that a round needs one barrier
  for (int64_t begin = cells.begin(); begin < cells.end(); begin += kThreads, buffer ^= 1) {
    const int64_t row = cells.RowAt(begin + thread);
    const bool is_kept = row >= 0 && Uses::IsKept(uses.Occupancy(b, row), lowest);
    const unsigned kept = __ballot_sync(kFullWarp, is_kept);
    if (Lane() == 0) count_of_warp[buffer][warp] = __popc(kept);
    __syncthreads();
    int64_t mine = out;
    for (int other = 0; other < kWarps; ++other) {
      const int count = count_of_warp[buffer][other];
      mine += other < warp ? count : 0;
      out += count;
    }
    if (is_kept) result.rows[mine + __popc(kept & ((1u << Lane()) - 1))] = row;
  }
}

}  // namespace

int64_t KeptRowsScratchCuda(const LatticeBatch& batch) {
  const int64_t numbers = batch.num_utterances * NumRuns(batch, kRowsPerRun) * (1 + kNumBins);
  return numbers * static_cast<int64_t>(sizeof(Score));
}

void KeptRowsCuda(const LatticeBatch& batch, const Uses& uses, double dropped_mass, void* stream,
                  void* scratch, const KeptRowsOut& out) {
  const Scratch parts(batch, static_cast<Score*>(scratch));
  const int64_t blocks = batch.num_utterances * parts.num_runs;
  if (dropped_mass > 0) {
    TRANSDUCER_LAUNCH(HistogramKernel, blocks, kThreads, stream, batch, uses, parts);
  }
  TRANSDUCER_LAUNCH(CountKernel, blocks, kThreads, stream, batch, uses, dropped_mass, parts,
                    out.lowest, out.dropped);
  TRANSDUCER_LAUNCH(CompactKernel, blocks, kThreads, stream, batch, uses, parts, out);
}

}  // namespace transducer
