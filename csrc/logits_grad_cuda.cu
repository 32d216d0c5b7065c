// SPDX-License-Identifier: Apache-2.0
// Stage 3: one warp per row reads the logits once, 16 bytes per lane. The two symbols with a
// subtraction are written last, so that 16-byte stores need no branch on the symbol.
#include "device_rows.cuh"
#include "logits_grad.h"

namespace transducer {
namespace {

// Options that are the same for every row of a call.
struct GradOptions {
  int size;
  int64_t pitch;
  int blank;
  int num_big_blanks, num_durations;
  bool from_log_softmax, is_hat;
  Score limit;  // of the magnitude of d loss / d logit
};

// The expected uses of the scores of one cell.
struct CellUses {
  Score blank, label;
  const Score* extra;  // of big blanks or durations
  Score occupancy;     // the sum of all
};

// One cell's gradient, entry by entry; target < 0 where there is no label arc.
template <typename T>
class CellGradient {
 public:
  using C = Compute<T>;

  __device__ CellGradient(const GradOptions& options, Score normalizer, const CellUses& uses,
                          int target, Score loss_grad)
      : options_(options),
        normalizer_(normalizer),
        uses_(uses),
        loss_grad_(loss_grad),
        target_(target),
        softmax_weight_(options.is_hat ? uses.label : uses.occupancy),
        // normalizer = high + low: x - high is exact where the softmax matters (x close to it).
        high_(static_cast<C>(normalizer)),
        low_(static_cast<C>(normalizer - static_cast<Score>(high_))),
        weight_(static_cast<C>(softmax_weight_)),
        limit_(static_cast<C>(options.limit)),
        scale_(static_cast<C>(loss_grad)) {}

  // The entry of a symbol without a subtraction.
  __device__ C At(C x) const {
    C g = weight_ * ExpOf<T>((x - high_) - low_);
    g = scale_ * (g > limit_ ? limit_ : g);
    return g < kFlushBelow<T> && g > -kFlushBelow<T> ? C(0) : g;
  }

  // The entries where posteriors are subtracted, in float64. The exponential is float32 unless
  // the logits are float64: on a GPU with few float64 units, one float64 exponential per row would
  // take longer than the rest of the row.
  __device__ T WithSubtraction(int v, T x) const {
    Score g = 0;
    if (options_.is_hat && v == options_.blank) {
      g = uses_.occupancy / (1 + exp(-static_cast<Score>(ToCompute(x))));
    } else if (!options_.from_log_softmax && softmax_weight_ > 0) {
      const C log_prob = static_cast<C>(static_cast<Score>(ToCompute(x)) - normalizer_);
      g = softmax_weight_ * static_cast<Score>(Exp(log_prob));
    }
    if (v == options_.blank) g -= uses_.blank;
    if (v == target_) g -= uses_.label;
    // The big blank of a symbol, and the symbol of a big blank: the function is its own inverse.
    const int64_t i = LogitsOptions::BigBlank(options_.blank, v, options_.size);
    if (i < options_.num_big_blanks) g -= uses_.extra[i];
    return Scaled(g);
  }

  // The entry of this lane's duration, whose logit is x. All lanes of the warp call it.
  __device__ T OfDuration(bool has_duration, T x) const {
    const Score value = has_duration ? static_cast<Score>(ToCompute(x)) : kLogZero;
    const Score max = WarpMax(value);
    const Score part = has_duration ? exp(value - max) : 0;
    const Score probability = part / WarpSum(part);
    // The softmax of a cell without occupancy may be NaN.
    if (!has_duration || !(uses_.occupancy > 0)) return T{};
    return Scaled(uses_.occupancy * probability - uses_.extra[Lane()]);
  }

 private:
  __device__ T Scaled(Score g) const {
    g = g < -options_.limit ? -options_.limit : g;
    g = loss_grad_ * (g > options_.limit ? options_.limit : g);
    return g < kFlushBelow<T> && g > -kFlushBelow<T> ? T{} : FromCompute<T>(static_cast<C>(g));
  }

  const GradOptions& options_;
  const Score normalizer_;
  const CellUses uses_;
  const Score loss_grad_;
  const int target_;
  const Score softmax_weight_;
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

// grad[v] = f(x[v]) in Compute<T>. grad may be x: the same lane reads and writes an entry.
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

// One block less per multiprocessor than the other row kernels: a lane needs 100 registers.
template <typename T>
__global__ void __launch_bounds__(kRowThreads, kRowBlocksAtOnce - 1)
    LogitsGradKernel(LatticeBatch batch, RowTile tile, const T* logits, GradOptions options,
                     Posteriors posteriors, T* grad) {
  CellCursor cursor(batch);
  Cell cell;
  const int size = options.size, columns = size + options.num_durations;
  const int64_t begin = GlobalWarp() * kRowsPerWarp;
  for (int64_t i = begin; i < begin + kRowsPerWarp && i < tile.size; ++i) {
    const int64_t row = tile.Row(i);
    T* out = grad + i * options.pitch;
    const bool is_cell = cursor.Find(row, &cell);
    const Score scale = posteriors.loss_grad[cell.b];
    CellUses uses{is_cell ? posteriors.use_blank[row] : 0, is_cell ? posteriors.use_label[row] : 0,
                  posteriors.use_extra + row * (options.num_big_blanks + options.num_durations), 0};
    uses.occupancy = uses.blank + uses.label;
    for (int k = 0; is_cell && k < options.num_big_blanks; ++k) uses.occupancy += uses.extra[k];
    const Score occupancy = uses.occupancy;
    if (scale == 0 || (!is_cell && batch.IsValid(cell.b))) {
      FillRow(out, columns, T{});
      continue;
    }
    const bool has_label = is_cell && cell.u < batch.num_targets[cell.b];
    const int64_t target = has_label ? batch.Target(cell.b, cell.u) : int64_t{-1};
    // Stage 1 makes the scores of such a target NaN, unless the caller changed the targets since.
    if (!is_cell || occupancy != occupancy || target >= size) {
      FillRow(out, columns, FromCompute<T>(kNaNOf<Compute<T>>));
      continue;
    }
    const CellGradient<T> gradient(options, posteriors.normalizer[row], uses,
                                   target < 0 ? -1 : static_cast<int>(target), scale);
    const T* x = logits + tile.LogitsRow(i) * options.pitch;
    // Some lanes compute the entries with a subtraction before the packs overwrite them: blank,
    // label, big blanks.
    const int mine =
        Lane() == 0   ? options.blank
        : Lane() == 1 ? static_cast<int>(target)
        : Lane() - 2 < options.num_big_blanks
            ? static_cast<int>(LogitsOptions::BigBlank(options.blank, Lane() - 2, options.size))
            : -1;
    const T subtracted = mine >= 0 ? gradient.WithSubtraction(mine, x[mine]) : T{};
    const bool has_duration = Lane() < options.num_durations;
    T of_duration{};
    if (options.num_durations > 0) {
      of_duration = gradient.OfDuration(has_duration, has_duration ? x[size + Lane()] : T{});
    }
    __syncwarp();  // out may be x: these lanes have read their logits
    // No entry can exceed the weight times the upstream gradient: rows that round to zero are
    // not read.
    const Score weight = options.is_hat ? uses.label : occupancy;
    const Score bound = weight * (scale < 0 ? -scale : scale);
    if (options.from_log_softmax || bound < kFlushBelow<T>) {
      FillRow(out, size, T{});
    } else {
      TransformRow(x, size, out, [&](Compute<T> value) { return gradient.At(value); });
    }
    __syncwarp();  // the row has been written
    if (mine >= 0) out[mine] = subtracted;
    if (has_duration) out[size + Lane()] = of_duration;
  }
}

}  // namespace

template <typename T>
void LogitsGradCuda(const LatticeBatch& batch, const RowTile& tile, const LogitRows<T>& logits,
                    const LogitsOptions& options, const Posteriors& posteriors, void* stream,
                    T* grad) {
  TRANSDUCER_CHECK(logits.vocab_size <= 0x7fffffff, "a vocabulary of more than 2^31 - 1 symbols");
  TRANSDUCER_CHECK(options.num_big_blanks <= kMaxBigBlanks, "too many big blanks");
  TRANSDUCER_CHECK(options.num_durations <= kMaxDurations, "too many durations");
  const GradOptions of_rows{static_cast<int>(logits.vocab_size),
                            logits.pitch,
                            static_cast<int>(options.blank),
                            static_cast<int>(options.num_big_blanks),
                            static_cast<int>(options.num_durations),
                            options.from_log_softmax,
                            options.is_hat,
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
