// SPDX-License-Identifier: Apache-2.0
// Shared by the row kernels: warps, 16-byte accesses, and the rows that a warp works on.
#pragma once

#include <type_traits>

#include "cuda_launch.h"
#include "half.h"
#include "lattice_batch.h"

namespace transducer {

constexpr int kWarp = 32;
constexpr unsigned kFullWarp = 0xffffffffu;

// Constants for device code, which must not call functions of numeric_limits.
template <typename C>
constexpr C kInfinityOf = std::numeric_limits<C>::infinity();
template <typename C>
constexpr C kNaNOf = std::numeric_limits<C>::quiet_NaN();

__device__ inline int Lane() { return static_cast<int>(threadIdx.x % kWarp); }
__device__ inline int64_t GlobalWarp() {
  return (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / kWarp;
}

inline int64_t CeilDivide(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Runs into which the rows of an utterance are divided, one a block: each of `rows_per_run` rows or
// more, which limits what the blocks leave for the next kernel.
inline int64_t NumRuns(const LatticeBatch& batch, int64_t rows_per_run) {
  constexpr int64_t kMost = 64;
  const int64_t stride = batch.row_stride != 0 ? batch.row_stride : batch.max_targets + 1;
  const int64_t runs = CeilDivide(batch.max_frames * stride, rows_per_run);
  return runs < 1 ? 1 : runs > kMost ? kMost : runs;
}

// Returns the sum, or the maximum, over the lanes of the warp to every lane.
template <typename C>
__device__ inline C WarpSum(C value) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    value += __shfl_xor_sync(kFullWarp, value, offset);
  }
  return value;
}
template <typename C>
__device__ inline C WarpMax(C value) {  // ignores NaN
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    const C other = __shfl_xor_sync(kFullWarp, value, offset);
    value = other > value ? other : value;
  }
  return value;
}

__device__ inline float Exp(float x) { return expf(x); }
__device__ inline double Exp(double x) { return exp(x); }

// Starts to read the cache line of an address, which must be valid.
__device__ inline void PrefetchLine(const void* p) {
#ifdef __CUDA_ARCH__
  asm volatile("prefetch.global.L1 [%0];" ::"l"(p));
#else
  static_cast<void>(p);
#endif
}

// exp(x) for x <= 0 in two instructions, to a relative 2^-22 + |x| 2^-24; 0 below 2^-126.
__device__ inline float QuickExp(float x) {
  const float in_octaves = x * 1.44269504088896340736f;
#ifdef __CUDA_ARCH__
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(in_octaves));
  return y;
#else
  return exp2f(in_octaves);
#endif
}

// exp of a number computed from elements of type T. The quick version is more exact than bfloat16,
// whose rounding error is 4e-3.
template <typename T>
__device__ inline Compute<T> ExpOf(Compute<T> x) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    return QuickExp(x);
  } else {
    return Exp(x);
  }
}

// 16 bytes of elements, read or written in one access.
template <typename T>
struct alignas(16) Pack {
  static constexpr int kSize = static_cast<int>(16 / sizeof(T));
  T values[kSize];
};

template <typename T>
__device__ inline Pack<T> LoadPack(const T* p) {
  return *reinterpret_cast<const Pack<T>*>(p);
}
template <typename T>
__device__ inline void StorePack(T* p, const Pack<T>& pack) {
#ifdef TRANSDUCER_EMULATION
  *reinterpret_cast<Pack<T>*>(p) = pack;
#else
  uint4 bits;  // the compiler would store a struct element by element
  memcpy(&bits, &pack, sizeof(bits));
  __stwb(reinterpret_cast<uint4*>(p), bits);
#endif
}

// Converts the elements of a pack to the type of the arithmetic, and back. bfloat16 is converted
// two elements at a time: in two instructions and, from compute capability 8.0 on, back in one.
template <typename T>
__device__ inline void UnpackValues(const Pack<T>& pack, Compute<T> (&values)[Pack<T>::kSize]) {
#pragma unroll
  for (int i = 0; i < Pack<T>::kSize; ++i) values[i] = ToCompute(pack.values[i]);
}
template <>
__device__ inline void UnpackValues(const Pack<BFloat16>& pack, float (&values)[8]) {
  uint32_t words[4];
  memcpy(words, &pack, sizeof(words));
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    values[2 * i] = FloatFromBits(words[i] << 16);
    values[2 * i + 1] = FloatFromBits(words[i] & 0xffff0000u);
  }
}

template <typename T>
__device__ inline Pack<T> PackValues(const Compute<T> (&values)[Pack<T>::kSize]) {
  Pack<T> pack;
#pragma unroll
  for (int i = 0; i < Pack<T>::kSize; ++i) pack.values[i] = FromCompute<T>(values[i]);
  return pack;
}
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
template <>
__device__ inline Pack<BFloat16> PackValues<BFloat16>(const float (&values)[8]) {
  uint32_t words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;"  // upper half, lower half
        : "=r"(words[i])
        : "f"(values[2 * i + 1]), "f"(values[2 * i]));
  }
  Pack<BFloat16> pack;
  memcpy(&pack, words, sizeof(pack));
  return pack;
}
#endif

// LoadPack in accesses of kBytes, for addresses that are multiples of kBytes only.
template <int kBytes, typename T>
__device__ inline Pack<T> LoadPackInParts(const T* p) {
  constexpr int kCount = kBytes / static_cast<int>(sizeof(T));
  struct alignas(kBytes) Part {
    T values[kCount];
  };
  Pack<T> pack;
#pragma unroll
  for (int i = 0; i < Pack<T>::kSize; i += kCount) {
    const Part part = *reinterpret_cast<const Part*>(p + i);
#pragma unroll
    for (int k = 0; k < kCount; ++k) pack.values[i + k] = part.values[k];
  }
  return pack;
}

// A lane loads this many packs before it uses the first, so a row of 512 elements waits for memory
// once instead of two or four times. The compiler does not do so in the last, incomplete round or
// across a store. More than 16 elements do not fit in the registers.
template <typename T>
constexpr int kPacksInFlight = sizeof(T) == 2 ? 2 : 4;

// Calls on_pack(Pack) for this lane's packs of the row, counted from the row's first element, then
// on_element(T) for the elements of the last, incomplete pack. Which elements a lane gets, and in
// which order, does not depend on the address, so sums do not either. Only the width of the
// accesses depends on it.
template <typename T, typename OnPack, typename OnElement>
__device__ inline void ReadRow(const T* row, int size, int lane, int num_lanes, OnPack on_pack,
                               OnElement on_element) {
  constexpr int kPack = Pack<T>::kSize;
  const int num_packs = size / kPack;
  const auto address = reinterpret_cast<uintptr_t>(row);
  if (address % 16 == 0) {
#pragma unroll 1
    for (int first = lane; first < num_packs; first += kPacksInFlight<T> * num_lanes) {
      Pack<T> packs[kPacksInFlight<T>];
#pragma unroll
      for (int k = 0; k < kPacksInFlight<T>; ++k) {
        const int i = first + k * num_lanes;
        if (i < num_packs) packs[k] = LoadPack(row + i * kPack);
      }
#pragma unroll
      for (int k = 0; k < kPacksInFlight<T>; ++k) {
        if (first + k * num_lanes < num_packs) on_pack(packs[k]);
      }
    }
  } else if (address % 8 == 0) {
    for (int i = lane; i < num_packs; i += num_lanes) on_pack(LoadPackInParts<8>(row + i * kPack));
  } else {
    for (int i = lane; i < num_packs; i += num_lanes) {
      on_pack(LoadPackInParts<static_cast<int>(sizeof(T))>(row + i * kPack));
    }
  }
  if (lane < size - num_packs * kPack) on_element(row[num_packs * kPack + lane]);
}

// A row of any length at any address in three parts: single elements up to the first 16-byte
// boundary, packs, single elements. Adjacent lanes get adjacent addresses. Which lane gets which
// element depends on the address, so this is unsuitable for sums.
template <typename T>
struct RowParts {
  int head, num_packs, size;

  __device__ RowParts(const T* row, int length) : size(length) {
    constexpr int kPack = Pack<T>::kSize;
    const int past = static_cast<int>(reinterpret_cast<uintptr_t>(row) / sizeof(T) % kPack);
    head = past == 0 ? 0 : kPack - past;
    if (head > size) head = size;
    num_packs = (size - head) / kPack;
  }

  // Calls before(k, first element) for up to kPacksInFlight packs of this lane, then on_pack for
  // the same packs, and on_element(element) for the lane's single elements.
  template <typename Before, typename OnPack, typename OnElement>
  __device__ void ForEach(int lane, int num_lanes, Before before, OnPack on_pack,
                          OnElement on_element) const {
    constexpr int kPack = Pack<T>::kSize;
    if (lane < head) on_element(lane);
#pragma unroll 1
    for (int first = lane; first < num_packs; first += kPacksInFlight<T> * num_lanes) {
#pragma unroll
      for (int k = 0; k < kPacksInFlight<T>; ++k) {
        const int i = first + k * num_lanes;
        if (i < num_packs) before(k, head + i * kPack);
      }
#pragma unroll
      for (int k = 0; k < kPacksInFlight<T>; ++k) {
        const int i = first + k * num_lanes;
        if (i < num_packs) on_pack(k, head + i * kPack);
      }
    }
    const int tail = head + num_packs * kPack;
    if (lane < size - tail) on_element(tail + lane);
  }
};

// A warp works on a few rows in turn: finding the cell of all but the first costs almost nothing.
constexpr int kRowsPerWarp = 4, kRowThreads = 128;

// Blocks per multiprocessor: leaves 96 registers per thread. Without this bound the compiler fits
// one block more and spills.
constexpr int kRowBlocksAtOnce = 5;

inline int64_t RowBlocks(const RowTile& tile) {
  return CeilDivide(CeilDivide(tile.size, kRowsPerWarp), kRowThreads / kWarp);
}

}  // namespace transducer
