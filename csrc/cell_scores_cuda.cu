// SPDX-License-Identifier: Apache-2.0
// Stage 1: one warp a row, or one block where the vocabulary is large; one pass over the logits.
#include "cell_scores.h"
#include "device_rows.cuh"

namespace transducer {
namespace {

constexpr int kWarpRow = 4096;  // longest row that a warp takes alone
constexpr int kBlockThreads = 256;

// Blocks of a multiprocessor: float64 rows would spill for one more.
template <typename T>
constexpr int kWarpRowBlocks = sizeof(T) == 8 ? kRowBlocksAtOnce - 1 : kRowBlocksAtOnce;
constexpr int kBlockRowBlocks = 3;

// Running logsumexp: `sum` = sum of exp(x - max) so far. NaN in x makes the sum NaN for good.
template <typename T>
struct MaxAndSum {
  using C = Compute<T>;
  C max, sum;

  // What to subtract: never -inf, which would make NaN of the -inf logits of a masked vocabulary.
  __device__ static C Reference(C max) { return max == -kInfinityOf<C> ? C(0) : max; }
  __device__ void RaiseTo(C new_max) {
    if (!(new_max > max)) return;
    sum *= ExpOf<T>(max - Reference(new_max));  // exp(-inf) = 0 at first
    max = new_max;
  }
};

// log(sum) to float64's accuracy where the sum is float64's; else to that of the sum, without a
// float64 logarithm: 2^k * m -> k log 2 + log m with m near 1, whose float32 logarithm errs by
// 3e-8.
__device__ inline Score LogOfSum(double sum) { return log(sum); }
__device__ inline Score LogOfSum(float sum) {
  constexpr Score kLog2 = 0.69314718055994530942;
  const uint32_t bits = BitsOfFloat(sum);
  // The mantissa in [sqrt(1/2), sqrt(2)), in the manner of logf itself.
  const int exponent = static_cast<int32_t>(bits - 0x3f3504f3u) >> 23;
  const float mantissa = FloatFromBits(bits - (static_cast<uint32_t>(exponent) << 23));
  return kLog2 * exponent + static_cast<Score>(logf(mantissa));
}

// The lane's share of the row.
template <typename T>
__device__ MaxAndSum<T> LaneMaxAndSum(const T* x, int size, int lane, int num_lanes) {
  using C = Compute<T>;
  constexpr C kLowest = -kInfinityOf<C>;
  MaxAndSum<T> result{kLowest, 0};
  ReadRow(
      x, size, lane, num_lanes,
      [&](const Pack<T>& pack) {
        C values[Pack<T>::kSize], top = kLowest;
        UnpackValues(pack, values);
#pragma unroll
        for (int i = 0; i < Pack<T>::kSize; ++i) top = values[i] > top ? values[i] : top;
        result.RaiseTo(top);
        const C reference = result.Reference(result.max);
#pragma unroll
        for (int i = 0; i < Pack<T>::kSize; ++i) result.sum += ExpOf<T>(values[i] - reference);
      },
      [&](T element) {
        const C value = ToCompute(element);
        result.RaiseTo(value);
        result.sum += ExpOf<T>(value - result.Reference(result.max));
      });
  return result;
}

template <typename T>
__device__ MaxAndSum<T> WarpMaxAndSum(MaxAndSum<T> lane) {
  lane.RaiseTo(WarpMax(lane.max));
  lane.sum = WarpSum(lane.sum);
  return lane;
}

// A log-probability picked from a row (cell_scores_cpu.cpp).
template <typename T>
__device__ Score Pick(const T* x, int64_t index, Score max, Score log_sum) {
  const Score score = (static_cast<Score>(ToCompute(x[index])) - max) - log_sum;
  return score == -kLogZero ? kNaN : score;
}

template <typename T>
__device__ void WriteScores(const LatticeBatch& batch, const Cell& cell, int64_t row, const T* x,
                            int size, int64_t blank, Score max, Score log_sum,
                            const CellScoresOut& out) {
  out.normalizer[row] = max + log_sum;
  out.blank[row] = Pick(x, blank, max, log_sum);
  Score label = kLogZero;
  if (cell.u != batch.num_targets[cell.b]) {
    const int64_t target = batch.Target(cell.b, cell.u);
    label = target >= 0 && target < size ? Pick(x, target, max, log_sum) : kNaN;
  }
  out.label[row] = label;
}

template <typename T>
__device__ void WriteScores(const LatticeBatch& batch, const Cell& cell, int64_t row, const T* x,
                            int size, int64_t blank, MaxAndSum<T> total, const CellScoresOut& out) {
  using C = Compute<T>;
  constexpr C kInfinity = kInfinityOf<C>;
  const bool has_sum = total.max > -kInfinity && total.max < kInfinity && total.sum == total.sum;
  const Score log_sum = has_sum ? LogOfSum(total.sum) : kNaN;
  WriteScores(batch, cell, row, x, size, blank, static_cast<Score>(total.max), log_sum, out);
}

template <typename T>
__global__ void __launch_bounds__(kRowThreads, kWarpRowBlocks<T>)
    WarpRowKernel(LatticeBatch batch, RowTile tile, const T* logits, int size, int64_t blank,
                  CellScoresOut out) {
  CellCursor cursor(batch);
  Cell cell, my_cell;
  MaxAndSum<T> mine{};
  bool has_cell = false;
  const int64_t begin = GlobalWarp() * kRowsPerWarp;
#pragma unroll 1
  for (int64_t i = begin; i < begin + kRowsPerWarp && i < tile.size; ++i) {
    if (!cursor.Find(tile.Row(i), &cell)) continue;
    const auto total = WarpMaxAndSum(LaneMaxAndSum(logits + i * size, size, Lane(), kWarp));
    if (i - begin == Lane()) {
      mine = total;
      my_cell = cell;
      has_cell = true;
    }
  }
  // A lane a row: what they read is waited for once.
  const int64_t i = begin + Lane();
  if (!has_cell) return;
  WriteScores(batch, my_cell, tile.Row(i), logits + i * size, size, blank, mine, out);
}

template <typename T>
__global__ void __launch_bounds__(kBlockThreads, kBlockRowBlocks)
    BlockRowKernel(LatticeBatch batch, RowTile tile, const T* logits, int size, int64_t blank,
                   CellScoresOut out) {
  using C = Compute<T>;
  __shared__ C max_of_warp[kBlockThreads / kWarp], sum_of_warp[kBlockThreads / kWarp];
  const int64_t row = tile.Row(blockIdx.x);
  Cell cell;
  if (!batch.CellOf(row, &cell)) return;  // the whole block
  const T* x = logits + static_cast<int64_t>(blockIdx.x) * size;
  const auto part =
      WarpMaxAndSum(LaneMaxAndSum(x, size, static_cast<int>(threadIdx.x), kBlockThreads));
  if (Lane() == 0) {
    max_of_warp[threadIdx.x / kWarp] = part.max;
    sum_of_warp[threadIdx.x / kWarp] = part.sum;
  }
  __syncthreads();
  if (threadIdx.x >= kWarp) return;
  const int warp = Lane() % (kBlockThreads / kWarp);
  const C max = WarpMax(max_of_warp[warp]);
  MaxAndSum<T> total{max_of_warp[warp], sum_of_warp[warp]};
  total.RaiseTo(max);
  total.sum = WarpSum(Lane() < kBlockThreads / kWarp ? total.sum : C(0));
  if (Lane() == 0) WriteScores(batch, cell, row, x, size, blank, total, out);
}

// from_log_softmax: two numbers a row and nothing to add up.
template <typename T>
__global__ void __launch_bounds__(kRowThreads, kRowBlocksAtOnce)
    PickKernel(LatticeBatch batch, RowTile tile, const T* logits, int size, int64_t blank,
               CellScoresOut out) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kRowThreads + threadIdx.x;
  if (i >= tile.size) return;
  const int64_t row = tile.Row(i);
  Cell cell;
  if (!batch.CellOf(row, &cell)) return;
  WriteScores(batch, cell, row, logits + i * size, size, blank, Score(0), Score(0), out);
}

}  // namespace

template <typename T>
void CellScoresCuda(const LatticeBatch& batch, const RowTile& tile, const LogitRows<T>& logits,
                    const LogitsOptions& options, void* stream, const CellScoresOut& out) {
  TRANSDUCER_CHECK(logits.vocab_size <= 0x7fffffff, "a vocabulary of more than 2^31 - 1 symbols");
  const int size = static_cast<int>(logits.vocab_size);
  if (options.from_log_softmax) {
    TRANSDUCER_LAUNCH(PickKernel<T>, CeilDivide(tile.size, kRowThreads), kRowThreads, stream, batch,
                      tile, logits.data, size, options.blank, out);
  } else if (size <= kWarpRow) {
    TRANSDUCER_LAUNCH(WarpRowKernel<T>, RowBlocks(tile), kRowThreads, stream, batch, tile,
                      logits.data, size, options.blank, out);
  } else {
    TRANSDUCER_LAUNCH(BlockRowKernel<T>, tile.size, kBlockThreads, stream, batch, tile, logits.data,
                      size, options.blank, out);
  }
}

#define TRANSDUCER_INSTANTIATE(T)                                                           \
  template void CellScoresCuda<T>(const LatticeBatch&, const RowTile&, const LogitRows<T>&, \
                                  const LogitsOptions&, void*, const CellScoresOut&);
TRANSDUCER_FOR_EACH_DTYPE(TRANSDUCER_INSTANTIATE)
#undef TRANSDUCER_INSTANTIATE

}  // namespace transducer
