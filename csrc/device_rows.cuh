// SPDX-License-Identifier: Apache-2.0
// What the row kernels share: warps, 16-byte accesses, the run of rows that a warp works on.
#pragma once

#include <type_traits>

#include "cuda_launch.h"
#include "half.h"
#include "lattice_batch.h"

namespace transducer {

constexpr int kWarp = 32;
constexpr unsigned kFullWarp = 0xffffffffu;

// Constants of device code: a function of numeric_limits may not be called there.
template <typename C>
constexpr C kInfinityOf = std::numeric_limits<C>::infinity();
template <typename C>
constexpr C kNaNOf = std::numeric_limits<C>::quiet_NaN();

__device__ inline int Lane() { return static_cast<int>(threadIdx.x % kWarp); }
__device__ inline int64_t GlobalWarp() {
  return (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / kWarp;
}

inline int64_t CeilDivide(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Every lane of the warp gets the sum, or the maximum, over its lanes.
template <typename C>
__device__ inline C WarpSum(C value) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    value += __shfl_xor_sync(kFullWarp, value, offset);
  }
  return value;
}
template <typename C>
__device__ inline C WarpMax(C value) {  // NaN loses
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    const C other = __shfl_xor_sync(kFullWarp, value, offset);
    value = other > value ? other : value;
  }
  return value;
}

__device__ inline float Exp(float x) { return expf(x); }
__device__ inline double Exp(double x) { return exp(x); }

// exp(x) for x <= 0 to 2^-22 + |x| 2^-24 of it, in two instructions; 0 below 2^-126.
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

// exp of what was made of elements of type T: bfloat16 logits err by 4e-3 of themselves anyway.
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
  uint4 bits;  // the compiler takes a struct apart, and stores element by element
  memcpy(&bits, &pack, sizeof(bits));
  __stwb(reinterpret_cast<uint4*>(p), bits);
#endif
}

// Elements of a pack as what arithmetic happens in, and back. For bfloat16 by whole registers: two
// elements cost two instructions one way and, from 8.0 on, one the other way.
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

// The same by accesses of kBytes, for an address that is a multiple of no more.
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

// A lane asks for so many packs before it uses the first: a row of 512 elements costs one trip to
// memory instead of four or two. The compiler would not do that by itself for the last, incomplete
// round, nor past a store. More than 16 elements do not fit in the registers.
template <typename T>
constexpr int kPacksInFlight = sizeof(T) == 2 ? 2 : 4;

// on_pack(Pack) for this lane's packs of the row, counted from the row's first element, then
// on_element(T) for the elements of the last, incomplete one. What a lane gets, and in what order,
// does not depend on the address: for sums. Only the width of the accesses does.
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
// boundary, packs, single elements. Neighboring lanes get neighboring addresses. Which lane gets
// which element depends on the address: not for sums.
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

  // before(k, first element) for up to kPacksInFlight packs of this lane, then on_pack of the same;
  // and on_element(element) for the rest of its share of the row.
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

// A warp takes a few rows in turn: the cell of the second to last costs next to nothing then.
constexpr int kRowsPerWarp = 4, kRowThreads = 128;

// Of a multiprocessor: leaves 96 registers a thread. Left alone, the compiler spills for one block
// more.
constexpr int kRowBlocksAtOnce = 5;

inline int64_t RowBlocks(const RowTile& tile) {
  return CeilDivide(CeilDivide(tile.size, kRowsPerWarp), kRowThreads / kWarp);
}

}  // namespace transducer
