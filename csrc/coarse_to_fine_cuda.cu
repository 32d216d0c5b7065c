// SPDX-License-Identifier: Apache-2.0
// Weights: several blocks per utterance, each with a run of its rows. The first kernel computes
// what the rows weigh by themselves, and the sum of the gradients of the run; the second adds up
// the sums of the utterance's runs in their order and scales the weights.
#include "coarse_to_fine.h"
#include "device_rows.cuh"
#include "row_gradient.h"

namespace transducer {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / kWarp;
constexpr int kBlocksAtOnce = 3;  // per multiprocessor; with one more the compiler spills
constexpr int64_t kRowsPerRun = 2048;

// Run `run` of the rows of utterance b, without those of an invalid one.
struct RowRun {
  int64_t begin = 0, end = 0;

  __device__ RowRun(const LatticeBatch& batch, int64_t b, int64_t run, int64_t num_runs) {
    if (!batch.IsValid(b)) return;
    const int64_t size = NumRowsOf(batch, b), length = (size + num_runs - 1) / num_runs;
    begin = run * length;
    end = begin + length < size ? begin + length : size;
    begin += batch.first_row[b];
    end += batch.first_row[b];
  }
};

// Non-negative numbers are in the order of their bits, so the largest does not depend on the order.
__device__ inline void RaiseTo(Score value, Score* largest) {
  if (!(value > 0)) return;
  unsigned long long bits;
  memcpy(&bits, &value, sizeof(bits));
  atomicMax(reinterpret_cast<unsigned long long*>(largest), bits);
}

__global__ void __launch_bounds__(kThreads, kBlocksAtOnce)
    ReplaceScoresKernel(LatticeBatch batch, RowTile tile, FineScores fine, int64_t first_place,
                        RefinedOut out) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  Cell cell;
  Score error = 0;
  if (i < tile.size) {
    const int64_t row = tile.Row(i);
    out.places[row] = first_place + i;
    if (batch.CellOf(row, &cell)) {  // padding has no fine scores
      const Score of_blank = ErrorOfScore(fine.blank[row], out.blank[row]);
      const Score of_label = ErrorOfScore(fine.label[row], out.label[row]);
      out.blank[row] = fine.blank[row];
      out.label[row] = fine.label[row];
      for (int64_t k = row * fine.num_extra; k < (row + 1) * fine.num_extra; ++k) {
        const Score of_extra = ErrorOfScore(fine.extra[k], out.extra[k]);
        error = of_extra > error ? of_extra : error;
        out.extra[k] = fine.extra[k];
      }
      error += of_blank > of_label ? of_blank : of_label;
    }
  }
  // Most warps have rows of one utterance.
  const int b = static_cast<int>(cell.b), first_b = __shfl_sync(kFullWarp, b, 0);
  if (__ballot_sync(kFullWarp, b == first_b || error == 0) == kFullWarp) {
    error = WarpMax(error);
    if (Lane() == 0) RaiseTo(error, &out.error[first_b]);
  } else {
    RaiseTo(error, &out.error[b]);
  }
}

__global__ void __launch_bounds__(kThreads, kBlocksAtOnce)
    OwnWeightsKernel(LatticeBatch batch, RowWeightsIn in, LogitsOptions logits, bool of_fine_rows,
                     int64_t num_runs, Score* sums, Score* weight) {
  __shared__ Score partial[kWarps];
  const int64_t b = blockIdx.x / num_runs, run = blockIdx.x - b * num_runs;
  const RowRun rows(batch, b, run, num_runs);
  const int64_t num_extra = logits.NumExtra();
  Score gradient = 0;
  for (int64_t row = rows.begin + threadIdx.x; row < rows.end; row += kThreads) {
    const RowGradient of_row = GradientOfRow(
        logits, exp(in.blank[row]), exp(in.label[row]), in.use_blank[row], in.use_label[row],
        [&](int64_t k) { return exp(in.extra[row * num_extra + k]); },
        [&](int64_t k) { return in.use_extra[row * num_extra + k]; });
    gradient += of_row.size;
    const bool is_fine = in.places[row] >= 0;
    weight[row] = is_fine != of_fine_rows ? 0
                  : of_fine_rows          ? of_row.size + of_row.spread
                                          : of_row.occupancy;
  }
  gradient = WarpSum(gradient);
  if (Lane() == 0) partial[threadIdx.x / kWarp] = gradient;
  __syncthreads();
  if (threadIdx.x != 0) return;
  Score sum = 0;
  for (int warp = 0; warp < kWarps; ++warp) sum += partial[warp];
  sums[blockIdx.x] = sum;
}

__global__ void __launch_bounds__(kThreads, kBlocksAtOnce)
    ScaleWeightsKernel(LatticeBatch batch, RowWeightsIn in, RowWeightsOptions options,
                       int64_t num_runs, const Score* sums, Score* weight) {
  const int64_t b = blockIdx.x / num_runs, run = blockIdx.x - b * num_runs;
  const RowRun rows(batch, b, run, num_runs);
  if (rows.begin >= rows.end) return;
  Score gradient = 0;
  for (int64_t other = 0; other < num_runs; ++other) gradient += sums[b * num_runs + other];
  const Score scale = WeightScale(batch, b, in, options, gradient);
  for (int64_t row = rows.begin + threadIdx.x; row < rows.end; row += kThreads) {
    const bool is_fine = in.places[row] >= 0;  // the weight of the others stays 0, even times NaN
    if (is_fine == options.of_fine_rows) weight[row] *= scale;
  }
}

}  // namespace

void ReplaceScoresCuda(const LatticeBatch& batch, const RowTile& tile, const FineScores& fine,
                       int64_t first_place, void* stream, const RefinedOut& out) {
  TRANSDUCER_LAUNCH(ReplaceScoresKernel, CeilDivide(tile.size, kThreads), kThreads, stream, batch,
                    tile, fine, first_place, out);
}

int64_t RowWeightsScratchCuda(const LatticeBatch& batch) {
  const int64_t runs = NumRuns(batch, kRowsPerRun);
  return batch.num_utterances * runs * static_cast<int64_t>(sizeof(Score));
}

void RowWeightsCuda(const LatticeBatch& batch, const RowWeightsIn& in, const LogitsOptions& logits,
                    const RowWeightsOptions& options, void* stream, void* scratch, Score* weight) {
  const int64_t num_runs = NumRuns(batch, kRowsPerRun), blocks = batch.num_utterances * num_runs;
  Score* sums = static_cast<Score*>(scratch);
  TRANSDUCER_LAUNCH(OwnWeightsKernel, blocks, kThreads, stream, batch, in, logits,
                    options.of_fine_rows, num_runs, sums, weight);
  TRANSDUCER_LAUNCH(ScaleWeightsKernel, blocks, kThreads, stream, batch, in, options, num_runs,
                    sums, weight);
}

}  // namespace transducer
