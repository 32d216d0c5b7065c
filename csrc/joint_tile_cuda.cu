// SPDX-License-Identifier: Apache-2.0
// Forward: one warp per row gathers, adds and activates. Backward: one warp computes one sum (of a
// frame or of a symbol) over a slice of the channels, in the order of the tile's rows, so no sum
// depends on the order in which warps run.
#include "device_rows.cuh"
#include "joint_tile.h"

namespace transducer {
namespace {

__device__ inline float Tanh(float x) { return tanhf(x); }
__device__ inline double Tanh(double x) { return tanh(x); }
// For results that are rounded to bfloat16: the error is at most 2^-11, a quarter of that rounding.
__device__ inline float QuickTanh(float x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return tanhf(x);
#endif
}
// Written out, because the compiler fuses a product and a sum in some instantiations and not in
// others, and then aligned and misaligned inputs would get different bits.
__device__ inline float Fma(float a, float b, float c) { return fmaf(a, b, c); }
__device__ inline double Fma(double a, double b, double c) { return fma(a, b, c); }
__device__ inline float Erf(float x) { return erff(x); }
__device__ inline double Erf(double x) { return erf(x); }

template <typename C>
__device__ inline C Sigmoid(C x) {
  const C e = Exp(x > C(0) ? -x : x);  // never overflows
  return (x > C(0) ? C(1) : e) / (C(1) + e);
}

constexpr double kInvSqrt2 = 0.70710678118654752440;
constexpr double kInvSqrt2Pi = 0.39894228040143267794;

template <typename T, typename C = Compute<T>>
__device__ inline C Activate(Activation activation, C x) {
  switch (activation) {
    case Activation::kTanh:
      if constexpr (std::is_same_v<T, BFloat16>) return QuickTanh(x);
      return Tanh(x);
    case Activation::kRelu: return x < C(0) ? C(0) : x;  // NaN stays
    case Activation::kGelu: return x * C(0.5) * (C(1) + Erf(x * static_cast<C>(kInvSqrt2)));
    case Activation::kSilu: return x * Sigmoid(x);
    default: return x;
  }
}

// d activation / d x from y = activation(x), or from x where y does not determine it.
template <typename C>
__device__ inline C Slope(Activation activation, C x, C y) {
  switch (activation) {
    case Activation::kTanh: return Fma(-y, y, C(1));
    case Activation::kRelu: return y > C(0) ? C(1) : C(0);
    case Activation::kGelu: {
      const C cdf = C(0.5) * (C(1) + Erf(x * static_cast<C>(kInvSqrt2)));
      return Fma(x * Exp(C(-0.5) * x * x), static_cast<C>(kInvSqrt2Pi), cdf);
    }
    case Activation::kSilu: {
      const C s = Sigmoid(x);
      return s * Fma(x, C(1) - s, C(1));
    }
    default: return C(1);
  }
}

// The channels of one lane: a 16-byte pack if every row starts on a 16-byte boundary, else one
// element.
template <typename T, bool kPacked>
struct Channels {
  static constexpr int kCount = kPacked ? Pack<T>::kSize : 1;
  using Raw = std::conditional_t<kPacked, Pack<T>, T>;  // as in memory: half the registers
  Compute<T> values[kCount];

  __device__ static Raw LoadRaw(const T* p) {
    if constexpr (kPacked) {
      return LoadPack(p);
    } else {
      return *p;
    }
  }
  __device__ static Channels Of(const Raw& raw) {
    Channels result;
    if constexpr (kPacked) {
      UnpackValues(raw, result.values);
    } else {
      result.values[0] = ToCompute(raw);
    }
    return result;
  }
  __device__ static Channels Load(const T* p) { return Of(LoadRaw(p)); }
  __device__ void Store(T* p) const {
    if constexpr (kPacked) {
      StorePack(p, PackValues<T>(values));
    } else {
      *p = FromCompute<T>(values[0]);
    }
  }
};

template <typename T>
bool AllPacked(int64_t width, std::initializer_list<const void*> pointers) {
  bool aligned = width % Pack<T>::kSize == 0;
  for (const void* p : pointers) aligned &= reinterpret_cast<uintptr_t>(p) % sizeof(Pack<T>) == 0;
  return aligned;
}

template <typename T, bool kPacked>
__global__ void __launch_bounds__(kRowThreads, kRowBlocksAtOnce)
    JoinForwardKernel(LatticeBatch batch, RowTile tile, const T* enc, const T* pred, int64_t width,
                      Activation activation, T* hidden) {
  using Lanes = Channels<T, kPacked>;
  CellCursor cursor(batch);
  Cell cell;
  const int64_t begin = GlobalWarp() * kRowsPerWarp;
  for (int64_t i = begin; i < begin + kRowsPerWarp && i < tile.size; ++i) {
    const bool is_cell = cursor.Find(tile.Row(i), &cell);
    const T* a = enc + (cell.b * batch.max_frames + cell.t) * width;
    const T* b = pred + (cell.b * (batch.max_targets + 1) + cell.u) * width;
    T* out = hidden + i * width;
    for (int64_t d = Lane() * Lanes::kCount; d < width; d += kWarp * Lanes::kCount) {
      Lanes x{};
      if (is_cell) {
        x = Lanes::Load(a + d);
        const Lanes y = Lanes::Load(b + d);
#pragma unroll
        for (int k = 0; k < Lanes::kCount; ++k) {
          x.values[k] = Activate<T>(activation, x.values[k] + y.values[k]);
        }
      }
      x.Store(out + d);
    }
  }
}

// A sum loads this many rows before it adds the first, and so waits for memory a quarter as often.
constexpr int kRowsInFlight = 4;
// Blocks per multiprocessor, as the registers allow.
template <typename T>
constexpr int kSumBlocksAtOnce = sizeof(T) == 4   ? 5
                                 : sizeof(T) == 2 ? 4
                                                  : 3;

// Inputs of the backward kernels.
template <typename T, bool kPacked>
struct BackwardInputs {
  const T *grad_hidden, *hidden, *enc, *pred;
  int64_t width;
  Activation activation;

  struct Row {
    typename Channels<T, kPacked>::Raw grad, y;
  };
  __device__ Row LoadRow(int64_t i, int64_t channel) const {  // of the tile
    return {Channels<T, kPacked>::LoadRaw(grad_hidden + i * width + channel),
            Channels<T, kPacked>::LoadRaw(hidden + i * width + channel)};
  }

  // sum += d loss / d (enc + pred) of a row, which belongs to cell (b, t, u).
  __device__ void AddRow(const Row& row, const LatticeBatch& batch, int64_t b, int64_t t, int64_t u,
                         int64_t channel, Channels<T, kPacked>* sum) const {
    using Lanes = Channels<T, kPacked>;
    const Lanes grad = Lanes::Of(row.grad), y = Lanes::Of(row.y);
    Lanes x{};
    if (activation == Activation::kGelu || activation == Activation::kSilu) {
      x = Lanes::Load(enc + (b * batch.max_frames + t) * width + channel);
      const Lanes more = Lanes::Load(pred + (b * (batch.max_targets + 1) + u) * width + channel);
#pragma unroll
      for (int k = 0; k < Lanes::kCount; ++k) x.values[k] += more.values[k];
    }
#pragma unroll
    for (int k = 0; k < Lanes::kCount; ++k) {
      const auto slope = Slope(activation, x.values[k], y.values[k]);
      sum->values[k] = Fma(grad.values[k], slope, sum->values[k]);
    }
  }

  __device__ static void Read(const Compute<T>* p, Channels<T, kPacked>* sum) {
#pragma unroll
    for (int k = 0; k < Channels<T, kPacked>::kCount; ++k) sum->values[k] = p[k];
  }
  __device__ static void Write(const Channels<T, kPacked>& sum, Compute<T>* p) {
#pragma unroll
    for (int k = 0; k < Channels<T, kPacked>::kCount; ++k) p[k] = sum.values[k];
  }
};

// The first index in the tile whose row is >= `row`.
__device__ inline int64_t LowerBound(const RowTile& tile, int64_t row) {
  int64_t low = 0, high = tile.size;
  if (tile.rows == nullptr) {
    const int64_t place = row - tile.begin;
    return place < low ? low : place > high ? high : place;
  }
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (tile.Row(middle) < row) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

// The sum that a warp computes: `index` is that of a frame or a symbol; it covers a slice of the
// channels.
struct WarpTask {
  int64_t index, channel;  // channel is this lane's first

  __device__ WarpTask(int64_t width, int channels_per_lane) {
    const int64_t slice = static_cast<int64_t>(kWarp) * channels_per_lane;
    const int64_t num_slices = (width + slice - 1) / slice, warp = GlobalWarp();
    index = warp / num_slices;
    channel = (warp - index * num_slices) * slice + Lane() * channels_per_lane;
  }
};

// grad_enc[b, t] += sum over the rows of the frame in the tile, which are consecutive.
template <typename T, bool kPacked>
__global__ void __launch_bounds__(kRowThreads, kSumBlocksAtOnce<T>)
    GradEncKernel(LatticeBatch batch, RowTile tile, BackwardInputs<T, kPacked> inputs,
                  Compute<T>* grad_enc) {
  using Lanes = Channels<T, kPacked>;
  const WarpTask task(inputs.width, Lanes::kCount);
  const int64_t b = task.index / batch.max_frames, t = task.index - b * batch.max_frames;
  if (b >= batch.num_utterances || !batch.IsValid(b) || t >= batch.num_frames[b]) return;
  const int64_t column = batch.ColumnBegin(b, t), columns = batch.ColumnEnd(b, t) - column;
  const int64_t begin = batch.Row(b, t, column), end = begin + columns;
  if (columns <= 0 || end <= tile.Row(0) || begin > tile.Row(tile.size - 1)) return;
  int64_t i = LowerBound(tile, begin);
  if (i >= tile.size || tile.Row(i) >= end || task.channel >= inputs.width) return;
  Compute<T>* out = grad_enc + (b * batch.max_frames + t) * inputs.width + task.channel;
  Lanes sum;
  inputs.Read(out, &sum);
  for (bool is_done = false; !is_done; i += kRowsInFlight) {
    int64_t row[kRowsInFlight];
    typename BackwardInputs<T, kPacked>::Row loaded[kRowsInFlight];
#pragma unroll
    for (int k = 0; k < kRowsInFlight; ++k) row[k] = i + k < tile.size ? tile.Row(i + k) : end;
#pragma unroll
    for (int k = 0; k < kRowsInFlight; ++k) {
      if (row[k] < end) loaded[k] = inputs.LoadRow(i + k, task.channel);
    }
#pragma unroll
    for (int k = 0; k < kRowsInFlight; ++k) {
      if (row[k] >= end) continue;
      inputs.AddRow(loaded[k], batch, b, t, column + row[k] - begin, task.channel, &sum);
    }
    is_done = row[kRowsInFlight - 1] >= end;
  }
  inputs.Write(sum, out);
}

// places[row] = -1 from the tile's first row to its last.
__global__ void __launch_bounds__(kRowThreads)
    ClearPlacesKernel(LatticeBatch batch, RowTile tile, int32_t* places) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kRowThreads + threadIdx.x;
  if (row >= batch.num_rows || row < tile.Row(0) || row > tile.Row(tile.size - 1)) return;
  places[row] = -1;
}

// places[row] = index of the row in the tile.
__global__ void __launch_bounds__(kRowThreads)
    PlacesKernel(LatticeBatch batch, RowTile tile, int32_t* places) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kRowThreads + threadIdx.x;
  if (i >= tile.size) return;
  const int64_t row = tile.Row(i);
  if (row >= 0 && row < batch.num_rows) places[row] = static_cast<int32_t>(i);
}

// The rows of one symbol in a tile, by frame.
class SymbolRows {
 public:
  // places: null for a tile that is a run of rows.
  __device__ SymbolRows(const LatticeBatch& batch, const RowTile& tile, const int32_t* places,
                        int64_t b, int64_t u)
      : batch_(batch), places_(places), b_(b), u_(u), first_(tile.Row(0)) {
    last_ = tile.Row(tile.size - 1);
    const int64_t begin = batch.first_row[b], stride = batch.Stride(b);
    begin_ = first_ <= begin ? 0 : (first_ - begin) / stride;
    end_ = last_ < begin ? 0 : (last_ - begin) / stride + 1;
    if (end_ > batch.num_frames[b]) end_ = batch.num_frames[b];
  }

  // The frames of the utterance that have rows in the tile.
  __device__ int64_t begin() const { return begin_; }
  __device__ int64_t end() const { return end_; }

  // The index in the tile of the symbol's row of this frame, or -1.
  __device__ int32_t PlaceAt(int64_t t) const {
    if (t >= end_ || u_ < batch_.ColumnBegin(b_, t) || u_ >= batch_.ColumnEnd(b_, t)) return -1;
    const int64_t row = batch_.Row(b_, t, u_);
    if (row < first_ || row > last_) return -1;
    return places_ != nullptr ? places_[row] : static_cast<int32_t>(row - first_);
  }

 private:
  const LatticeBatch& batch_;
  const int32_t* places_;
  const int64_t b_, u_, first_;
  int64_t last_, begin_, end_;
};

// grad_pred[b, u] += sum over the symbol's rows in the tile, at most one per frame. Each lane loads
// the place of a different frame, 32 frames ahead of its use.
template <typename T, bool kPacked>
__global__ void __launch_bounds__(kRowThreads, kSumBlocksAtOnce<T>)
    GradPredKernel(LatticeBatch batch, RowTile tile, BackwardInputs<T, kPacked> inputs,
                   const int32_t* places, Compute<T>* grad_pred) {
  using Lanes = Channels<T, kPacked>;
  const WarpTask task(inputs.width, Lanes::kCount);
  const int64_t num_columns = batch.max_targets + 1;
  const int64_t b = task.index / num_columns, u = task.index - b * num_columns;
  if (b >= batch.num_utterances || !batch.IsValid(b) || u > batch.num_targets[b]) return;
  const SymbolRows rows(batch, tile, places, b, u);
  if (rows.begin() >= rows.end()) return;

  const bool has_channel = task.channel < inputs.width;  // the other lanes still provide places
  Compute<T>* out = grad_pred + (b * num_columns + u) * inputs.width + task.channel;
  Lanes sum{};
  if (has_channel) inputs.Read(out, &sum);
  int32_t next_place = rows.PlaceAt(rows.begin() + Lane());
  for (int64_t begin = rows.begin(); begin < rows.end(); begin += kWarp) {
    const int32_t place = next_place;
    next_place = rows.PlaceAt(begin + kWarp + Lane());
    unsigned frames = __ballot_sync(kFullWarp, place >= 0);
    while (frames != 0) {
      int32_t at[kRowsInFlight];  // place in the tile, or -1
      int lane_of[kRowsInFlight];
      typename BackwardInputs<T, kPacked>::Row loaded[kRowsInFlight];
#pragma unroll
      for (int k = 0; k < kRowsInFlight; ++k) {
        lane_of[k] = frames != 0 ? __ffs(static_cast<int>(frames)) - 1 : 0;
        const int32_t of_lane = __shfl_sync(kFullWarp, place, lane_of[k]);
        at[k] = frames != 0 && has_channel ? of_lane : -1;
        frames &= frames - 1;  // 0 stays 0
      }
#pragma unroll
      for (int k = 0; k < kRowsInFlight; ++k) {
        if (at[k] >= 0) loaded[k] = inputs.LoadRow(at[k], task.channel);
      }
#pragma unroll
      for (int k = 0; k < kRowsInFlight; ++k) {
        if (at[k] < 0) continue;
        inputs.AddRow(loaded[k], batch, b, begin + lane_of[k], u, task.channel, &sum);
      }
    }
  }
  if (has_channel) inputs.Write(sum, out);
}

template <typename T, bool kPacked>
void LaunchBackward(const LatticeBatch& batch, const RowTile& tile,
                    const BackwardInputs<T, kPacked>& inputs, void* stream, int32_t* places,
                    const JoinGrads<T>& grads) {
  const int64_t slices = CeilDivide(inputs.width, kWarp * Channels<T, kPacked>::kCount);
  const auto blocks = [&](int64_t sums) {
    return CeilDivide(batch.num_utterances * sums * slices, kRowThreads / kWarp);
  };
  TRANSDUCER_LAUNCH((GradEncKernel<T, kPacked>), blocks(batch.max_frames), kRowThreads, stream,
                    batch, tile, inputs, grads.enc);
  TRANSDUCER_LAUNCH((GradPredKernel<T, kPacked>), blocks(batch.max_targets + 1), kRowThreads,
                    stream, batch, tile, inputs, places, grads.pred);
}

}  // namespace

template <typename T>
void JoinForwardCuda(const LatticeBatch& batch, const RowTile& tile, const JoinInputs<T>& inputs,
                     void* stream, T* hidden) {
  const auto [enc, pred, width, activation] = inputs;
  if (AllPacked<T>(width, {enc, pred, hidden})) {
    TRANSDUCER_LAUNCH((JoinForwardKernel<T, true>), RowBlocks(tile), kRowThreads, stream, batch,
                      tile, enc, pred, width, activation, hidden);
  } else {
    TRANSDUCER_LAUNCH((JoinForwardKernel<T, false>), RowBlocks(tile), kRowThreads, stream, batch,
                      tile, enc, pred, width, activation, hidden);
  }
}

int64_t JoinBackwardScratchCuda(const LatticeBatch& batch, const RowTile& tile) {
  return tile.rows != nullptr ? batch.num_rows * static_cast<int64_t>(sizeof(int32_t)) : 0;
}

template <typename T>
void JoinBackwardCuda(const LatticeBatch& batch, const RowTile& tile, const JoinInputs<T>& inputs,
                      const T* hidden, const T* grad_hidden, void* stream, void* scratch,
                      const JoinGrads<T>& grads) {
  if (tile.size == 0) return;
  TRANSDUCER_CHECK(tile.size <= 0x7fffffff, "a tile of more than 2^31 - 1 rows");
  int32_t* places = nullptr;
  if (tile.rows != nullptr) {
    places = static_cast<int32_t*>(scratch);
    TRANSDUCER_LAUNCH(ClearPlacesKernel, CeilDivide(batch.num_rows, kRowThreads), kRowThreads,
                      stream, batch, tile, places);
    TRANSDUCER_LAUNCH(PlacesKernel, CeilDivide(tile.size, kRowThreads), kRowThreads, stream, batch,
                      tile, places);
  }
  const auto [enc, pred, width, activation] = inputs;
  if (AllPacked<T>(width, {grad_hidden, hidden, enc, pred})) {
    const BackwardInputs<T, true> packed{grad_hidden, hidden, enc, pred, width, activation};
    LaunchBackward(batch, tile, packed, stream, places, grads);
  } else {
    const BackwardInputs<T, false> single{grad_hidden, hidden, enc, pred, width, activation};
    LaunchBackward(batch, tile, single, stream, places, grads);
  }
}

#define TRANSDUCER_INSTANTIATE(T)                                                              \
  template void JoinForwardCuda<T>(const LatticeBatch&, const RowTile&, const JoinInputs<T>&,  \
                                   void*, T*);                                                 \
  template void JoinBackwardCuda<T>(const LatticeBatch&, const RowTile&, const JoinInputs<T>&, \
                                    const T*, const T*, void*, void*, const JoinGrads<T>&);
TRANSDUCER_FOR_EACH_DTYPE(TRANSDUCER_INSTANTIATE)
#undef TRANSDUCER_INSTANTIATE

}  // namespace transducer
