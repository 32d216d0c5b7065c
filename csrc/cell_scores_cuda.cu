// SPDX-License-Identifier: Apache-2.0
// Stage 1: one warp per row, or one block per row for large vocabularies; one pass over the logits.
#include "cell_scores.h"
#include "device_rows.cuh"

namespace transducer {
namespace {

constexpr int kWarpRow = 4096;  // longer rows get a block
constexpr int kBlockThreads = 256;

// Blocks per multiprocessor. With one more, the kernel for float64 would spill.
template <typename T>
constexpr int kWarpRowBlocks = sizeof(T) == 8 ? kRowBlocksAtOnce - 1 : kRowBlocksAtOnce;
constexpr int kBlockRowBlocks = 3;

// Running logsumexp: `sum` = sum of exp(x - max) so far. After a NaN in x, the sum stays NaN.
template <typename T>
struct MaxAndSum {
  using C = Compute<T>;
  C max, sum;

  // The value to subtract. It is never -inf: -inf - -inf would make masked symbols NaN.
  __device__ static C Reference(C max) { return max == -kInfinityOf<C> ? C(0) : max; }
  __device__ void RaiseTo(C new_max) {
    if (!(new_max > max)) return;
    sum *= ExpOf<T>(max - Reference(new_max));  // exp(-inf) = 0 at first
    max = new_max;
  }
};

// log(sum). A float32 sum 2^k * m, with m near 1, needs no float64 logarithm: the result is
// k log 2 + log m, and the float32 logarithm of m has an error of 3e-8.
__device__ inline Score LogOfSum(double sum) { return log(sum); }
__device__ inline Score LogOfSum(float sum) {
  constexpr Score kLog2 = 0.69314718055994530942;
  const uint32_t bits = BitsOfFloat(sum);
  // The mantissa in [sqrt(1/2), sqrt(2)), in the manner of logf itself.
  const int exponent = static_cast<int32_t>(bits - 0x3f3504f3u) >> 23;
  const float mantissa = FloatFromBits(bits - (static_cast<uint32_t>(exponent) << 23));
  return kLog2 * exponent + static_cast<Score>(logf(mantissa));
}

// The lane's share of the symbols begin ... end - 1, added to `result`.
template <typename T>
__device__ void AddRange(const T* x, int begin, int end, int lane, int num_lanes,
                         MaxAndSum<T>* result) {
  using C = Compute<T>;
  ReadRow(
      x + begin, end - begin, lane, num_lanes,
      [&](const Pack<T>& pack) {
        C values[Pack<T>::kSize], top = -kInfinityOf<C>;
        UnpackValues(pack, values);
#pragma unroll
        for (int i = 0; i < Pack<T>::kSize; ++i) top = values[i] > top ? values[i] : top;
        result->RaiseTo(top);
        const C reference = result->Reference(result->max);
#pragma unroll
        for (int i = 0; i < Pack<T>::kSize; ++i) result->sum += ExpOf<T>(values[i] - reference);
      },
      [&](T element) {
        const C value = ToCompute(element);
        result->RaiseTo(value);
        result->sum += ExpOf<T>(value - result->Reference(result->max));
      });
}

// The lane's share of the row; of all symbols but `skipped` if that is not negative.
template <typename T>
__device__ MaxAndSum<T> LaneMaxAndSum(const T* x, int size, int skipped, int lane, int num_lanes) {
  MaxAndSum<T> result{-kInfinityOf<Compute<T>>, 0};
  int begin = 0;
#pragma unroll 1
  for (int end = skipped < 0 ? size : skipped;; end = size) {
    AddRange(x, begin, end, lane, num_lanes, &result);
    if (end == size) return result;
    begin = skipped + 1;
  }
}

template <typename T>
__device__ MaxAndSum<T> WarpMaxAndSum(MaxAndSum<T> lane) {
  lane.RaiseTo(WarpMax(lane.max));
  lane.sum = WarpSum(lane.sum);
  return lane;
}

// The log-probability of one symbol of a row (cell_scores_cpu.cpp).
template <typename T>
__device__ Score Pick(const T* x, int64_t index, Score max, Score log_sum) {
  const Score score = (static_cast<Score>(ToCompute(x[index])) - max) - log_sum;
  return score == -kLogZero ? kNaN : score;
}

// Options that are the same for every row of a call.
struct RowOptions {
  int size;
  int64_t pitch;
  int64_t blank;
  int num_big_blanks, num_durations;
  bool is_hat;

  __device__ int Skipped() const { return is_hat ? static_cast<int>(blank) : -1; }
};

// log sigmoid(x) (cell_scores_cpu.cpp).
__device__ inline Score LogSigmoid(Score x) {
  if (x == -kLogZero) return kNaN;
  return x < 0 ? x - log1p(exp(x)) : -log1p(exp(-x));
}

// out[k] = log_softmax(x)[k] (cell_scores_cpu.cpp).
template <typename T>
__device__ void LogSoftmax(const T* x, int size, Score* out) {
  Score max = kLogZero, sum = 0;
  for (int k = 0; k < size; ++k) {
    const Score value = static_cast<Score>(ToCompute(x[k]));
    max = value > max ? value : max;
  }
  for (int k = 0; k < size; ++k) sum += exp(static_cast<Score>(ToCompute(x[k])) - max);
  const Score log_sum = log(sum);
  for (int k = 0; k < size; ++k) out[k] = (static_cast<Score>(ToCompute(x[k])) - max) - log_sum;
}

template <typename T>
__device__ void WriteScores(const LatticeBatch& batch, const Cell& cell, int64_t row, const T* x,
                            const RowOptions& options, Score max, Score log_sum,
                            const CellScoresOut& out) {
  out.normalizer[row] = max + log_sum;
  Score any_label = 0;
  if (options.is_hat) {
    const Score z = static_cast<Score>(ToCompute(x[options.blank]));
    any_label = (z == kLogZero ? Score(0) : LogSigmoid(-z)) + 0 * log_sum;  // NaN stays
    out.blank[row] = LogSigmoid(z) + 0 * log_sum;
  } else {
    out.blank[row] = Pick(x, options.blank, max, log_sum);
  }
  Score label = kLogZero;
  if (cell.u != batch.num_targets[cell.b]) {
    const int64_t target = batch.Target(cell.b, cell.u);
    const bool is_label =
        target >= 0 && target < options.size && !(options.is_hat && target == options.blank);
    label = is_label ? any_label + Pick(x, target, max, log_sum) : kNaN;
  }
  out.label[row] = label;
  Score* extra = out.extra + row * (options.num_big_blanks + options.num_durations);
  for (int i = 0; i < options.num_big_blanks; ++i) {
    extra[i] = Pick(x, LogitsOptions::BigBlank(options.blank, i, options.size), max, log_sum);
  }
  if (options.num_durations > 0) {
    LogSoftmax(x + options.size, options.num_durations, extra + options.num_big_blanks);
  }
}

template <typename T>
__device__ void WriteScores(const LatticeBatch& batch, const Cell& cell, int64_t row, const T* x,
                            const RowOptions& options, MaxAndSum<T> total,
                            const CellScoresOut& out) {
  using C = Compute<T>;
  constexpr C kInfinity = kInfinityOf<C>;
  const bool has_sum = total.max > -kInfinity && total.max < kInfinity && total.sum == total.sum;
  const Score log_sum = has_sum ? LogOfSum(total.sum) : kNaN;
  WriteScores(batch, cell, row, x, options, static_cast<Score>(total.max), log_sum, out);
}

template <typename T>
__global__ void __launch_bounds__(kRowThreads, kWarpRowBlocks<T>)
    WarpRowKernel(LatticeBatch batch, RowTile tile, const T* logits, RowOptions options,
                  CellScoresOut out) {
  CellCursor cursor(batch);
  Cell cell, my_cell;
  MaxAndSum<T> mine{};
  bool has_cell = false;
  const int64_t begin = GlobalWarp() * kRowsPerWarp;
#pragma unroll 1
  for (int64_t i = begin; i < begin + kRowsPerWarp && i < tile.size; ++i) {
    if (!cursor.Find(tile.Row(i), &cell)) continue;
    const auto total = WarpMaxAndSum(
        LaneMaxAndSum(logits + i * options.pitch, options.size, options.Skipped(), Lane(), kWarp));
    if (i - begin == Lane()) {
      mine = total;
      my_cell = cell;
      has_cell = true;
    }
  }
  // Each lane finishes one row, so the warp waits for memory once.
  const int64_t i = begin + Lane();
  if (!has_cell) return;
  WriteScores(batch, my_cell, tile.Row(i), logits + i * options.pitch, options, mine, out);
}

template <typename T>
__global__ void __launch_bounds__(kBlockThreads, kBlockRowBlocks)
    BlockRowKernel(LatticeBatch batch, RowTile tile, const T* logits, RowOptions options,
                   CellScoresOut out) {
  using C = Compute<T>;
  __shared__ C max_of_warp[kBlockThreads / kWarp], sum_of_warp[kBlockThreads / kWarp];
  const int64_t row = tile.Row(blockIdx.x);
  Cell cell;
  if (!batch.CellOf(row, &cell)) return;  // the whole block
  const T* x = logits + static_cast<int64_t>(blockIdx.x) * options.pitch;
  const auto part = WarpMaxAndSum(LaneMaxAndSum(x, options.size, options.Skipped(),
                                                static_cast<int>(threadIdx.x), kBlockThreads));
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
  if (Lane() == 0) WriteScores(batch, cell, row, x, options, total, out);
}

// from_log_softmax: two logits per row and no sum.
template <typename T>
__global__ void __launch_bounds__(kRowThreads, kRowBlocksAtOnce)
    PickKernel(LatticeBatch batch, RowTile tile, const T* logits, RowOptions options,
               CellScoresOut out) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kRowThreads + threadIdx.x;
  if (i >= tile.size) return;
  const int64_t row = tile.Row(i);
  Cell cell;
  if (!batch.CellOf(row, &cell)) return;
  WriteScores(batch, cell, row, logits + i * options.pitch, options, Score(0), Score(0), out);
}

}  // namespace

template <typename T>
void CellScoresCuda(const LatticeBatch& batch, const RowTile& tile, const LogitRows<T>& logits,
                    const LogitsOptions& options, void* stream, const CellScoresOut& out) {
  TRANSDUCER_CHECK(logits.vocab_size <= 0x7fffffff, "a vocabulary of more than 2^31 - 1 symbols");
  const RowOptions of_rows{static_cast<int>(logits.vocab_size),
                           logits.pitch,
                           options.blank,
                           static_cast<int>(options.num_big_blanks),
                           static_cast<int>(options.num_durations),
                           options.is_hat};
  if (options.from_log_softmax) {
    TRANSDUCER_LAUNCH(PickKernel<T>, CeilDivide(tile.size, kRowThreads), kRowThreads, stream, batch,
                      tile, logits.data, of_rows, out);
  } else if (logits.vocab_size <= kWarpRow) {
    TRANSDUCER_LAUNCH(WarpRowKernel<T>, RowBlocks(tile), kRowThreads, stream, batch, tile,
                      logits.data, of_rows, out);
  } else {
    TRANSDUCER_LAUNCH(BlockRowKernel<T>, tile.size, kBlockThreads, stream, batch, tile, logits.data,
                      of_rows, out);
  }
}

#define TRANSDUCER_INSTANTIATE(T)                                                           \
  template void CellScoresCuda<T>(const LatticeBatch&, const RowTile&, const LogitRows<T>&, \
                                  const LogitsOptions&, void*, const CellScoresOut&);
TRANSDUCER_FOR_EACH_DTYPE(TRANSDUCER_INSTANTIATE)
#undef TRANSDUCER_INSTANTIATE

}  // namespace transducer
