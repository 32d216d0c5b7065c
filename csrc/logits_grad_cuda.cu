// SPDX-License-Identifier: Apache-2.0
// Stage 3: one warp a row; the logits are read once, 16 bytes a lane. No branch on the symbol stands
// in the way of 16-byte stores: the two symbols that differ come last.
#include "device_rows.cuh"
#include "logits_grad.h"

namespace transducer {
namespace {

// What is the same for every row of a call.
struct GradOptions {
  int size;
  int blank;
  bool from_log_softmax;
  Score limit;  // of the magnitude of d loss / d logit
};

// One cell's gradient, entry by entry; target < 0 where there is no label arc.
template <typename T>
class CellGradient {
 public:
  using C = Compute<T>;

  __device__ CellGradient(const GradOptions& options, Score normalizer, Score use_blank,
                          Score use_label, int target, Score loss_grad)
      : options_(options),
        normalizer_(normalizer),
        use_blank_(use_blank),
        use_label_(use_label),
        loss_grad_(loss_grad),
        target_(target),
        // normalizer = high + low: x - high is exact where the softmax matters (x close to it).
        high_(static_cast<C>(normalizer)),
        low_(static_cast<C>(normalizer - static_cast<Score>(high_))),
        weight_(static_cast<C>(use_blank + use_label)),
        limit_(static_cast<C>(options.limit)),
        scale_(static_cast<C>(loss_grad)) {}

  // Where nothing is subtracted.
  __device__ C At(C x) const {
    C g = weight_ * ExpOf<T>((x - high_) - low_);
    g = scale_ * (g > limit_ ? limit_ : g);
    return g < kFlushBelow<T> && g > -kFlushBelow<T> ? C(0) : g;
  }

  // The two entries where posteriors are subtracted: in float64, but for the exponential itself, which
  // is float32's unless the logits are float64. (float64 exponentials, one a row, would outweigh
  // the rest of the row on a GPU with few float64 units.)
  __device__ T WithSubtraction(int v, T x) const {
    const Score occupancy = use_blank_ + use_label_;
    Score g = 0;
    if (!options_.from_log_softmax && occupancy > 0) {
      const C log_prob = static_cast<C>(static_cast<Score>(ToCompute(x)) - normalizer_);
      g = occupancy * static_cast<Score>(Exp(log_prob));
    }
    if (v == options_.blank) g -= use_blank_;
    if (v == target_) g -= use_label_;
    g = g < -options_.limit ? -options_.limit : g;
    g = loss_grad_ * (g > options_.limit ? options_.limit : g);
    return g < kFlushBelow<T> && g > -kFlushBelow<T> ? T{} : FromCompute<T>(static_cast<C>(g));
  }

 private:
  const GradOptions& options_;
  const Score normalizer_, use_blank_, use_label_, loss_grad_;
  const int target_;
  const C high_, low_, weight_, limit_, scale_;
};

// row[v] = value for this lane's share of the row.
template <typename T>
__device__ void FillRow(T* row, int size, T value) {
  RowParts<T>(row, size).ForEach(
      Lane(), kWarp, [](int, int) {},
      [&](int, int first) {
        Pack<T> pack;
#pragma unroll
        for (int i = 0; i < Pack<T>::kSize; ++i) pack.values[i] = value;
        StorePack(row + first, pack);
      },
      [&](int v) { row[v] = value; });
}

// grad[v] = f(x[v]), f of Compute<T>; grad may be x: an entry is read and written by the same lane.
template <typename T, typename F>
__device__ void TransformRow(const T* x, int size, T* grad, F f) {
  const auto from = reinterpret_cast<uintptr_t>(x), to = reinterpret_cast<uintptr_t>(grad);
  if (from % sizeof(Pack<T>) != to % sizeof(Pack<T>)) {
    for (int v = Lane(); v < size; v += kWarp) grad[v] = FromCompute<T>(f(ToCompute(x[v])));
    return;
  }
  Pack<T> packs[kPacksInFlight<T>];
  RowParts<T>(x, size).ForEach(
      Lane(), kWarp, [&](int k, int first) { packs[k] = LoadPack(x + first); },
      [&](int k, int first) {
        Compute<T> values[Pack<T>::kSize];
        UnpackValues(packs[k], values);
#pragma unroll
        for (int i = 0; i < Pack<T>::kSize; ++i) values[i] = f(values[i]);
        StorePack(grad + first, PackValues<T>(values));
      },
      [&](int v) { grad[v] = FromCompute<T>(f(ToCompute(x[v]))); });
}

// One block less at once than the other row kernels: with its packs a lane needs 100 registers.
template <typename T>
__global__ void __launch_bounds__(kRowThreads, kRowBlocksAtOnce - 1)
    LogitsGradKernel(LatticeBatch batch, RowTile tile, const T* logits, GradOptions options,
                     Posteriors posteriors, T* grad) {
  CellCursor cursor(batch);
  Cell cell;
  const int size = options.size;
  const int64_t begin = GlobalWarp() * kRowsPerWarp;
  for (int64_t i = begin; i < begin + kRowsPerWarp && i < tile.size; ++i) {
    const int64_t row = tile.Row(i);
    T* out = grad + i * size;
    const bool is_cell = cursor.Find(row, &cell);
    const Score scale = posteriors.loss_grad[cell.b];
    const Score blank_uses = is_cell ? posteriors.use_blank[row] : 0;
    const Score label_uses = is_cell ? posteriors.use_label[row] : 0;
    const Score occupancy = blank_uses + label_uses;
    if (scale == 0 || (!is_cell && batch.IsValid(cell.b))) {
      FillRow(out, size, T{});
      continue;
    }
    const bool has_label = is_cell && cell.u < batch.num_targets[cell.b];
    const int64_t target = has_label ? batch.Target(cell.b, cell.u) : int64_t{-1};
    // A target beyond the vocabulary was NaN in stage 1; here it is one that has changed since.
    if (!is_cell || occupancy != occupancy || target >= size) {
      FillRow(out, size, FromCompute<T>(kNaNOf<Compute<T>>));
      continue;
    }
    const CellGradient<T> gradient(options, posteriors.normalizer[row], blank_uses, label_uses,
                                   target < 0 ? -1 : static_cast<int>(target), scale);
    const T* x = logits + tile.LogitsRow(i) * size;
    // Two lanes see to the two entries with a subtraction, and keep them from the others' packs.
    const int mine = Lane() == 0 ? options.blank : Lane() == 1 ? static_cast<int>(target) : -1;
    const T subtracted = mine >= 0 ? gradient.WithSubtraction(mine, x[mine]) : T{};
    __syncwarp();  // out may be x: what they need of it has been read
    // No entry can exceed the occupancy times the upstream gradient: do not even read rows that
    // round to zero.
    const Score bound = occupancy * (scale < 0 ? -scale : scale);
    if (options.from_log_softmax || bound < kFlushBelow<T>) {
      FillRow(out, size, T{});
    } else {
      TransformRow(x, size, out, [&](Compute<T> value) { return gradient.At(value); });
    }
    __syncwarp();  // the row has been written
    if (mine >= 0) out[mine] = subtracted;
  }
}

}  // namespace

template <typename T>
void LogitsGradCuda(const LatticeBatch& batch, const RowTile& tile, const LogitRows<T>& logits,
                    const LogitsOptions& options, const Posteriors& posteriors, void* stream,
                    T* grad) {
  TRANSDUCER_CHECK(logits.vocab_size <= 0x7fffffff, "a vocabulary of more than 2^31 - 1 symbols");
  const GradOptions of_rows{static_cast<int>(logits.vocab_size), static_cast<int>(options.blank),
                            options.from_log_softmax,
                            options.clamp > 0 ? options.clamp
                                              : std::numeric_limits<Score>::infinity()};
  TRANSDUCER_LAUNCH(LogitsGradKernel<T>, RowBlocks(tile), kRowThreads, stream, batch, tile,
                    logits.data, of_rows, posteriors, grad);
}

#define TRANSDUCER_INSTANTIATE(T)                                                           \
  template void LogitsGradCuda<T>(const LatticeBatch&, const RowTile&, const LogitRows<T>&, \
                                  const LogitsOptions&, const Posteriors&, void*, T*);
TRANSDUCER_FOR_EACH_DTYPE(TRANSDUCER_INSTANTIATE)
#undef TRANSDUCER_INSTANTIATE

}  // namespace transducer
