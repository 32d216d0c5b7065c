// SPDX-License-Identifier: Apache-2.0
// The parts of CUDA's execution model that the *_cuda.cu files use, on the host. The same sources,
// compiled as C++, run block by block, and each thread is a fiber (emulation.cpp). For tests only.
//
// Threads run until they wait for their block (__syncthreads) or their warp (shuffles, votes,
// __syncwarp). SetOrder chooses their order, and no result may depend on it: a kernel whose result
// does lacks a barrier. Emulation is stricter than a device: all threads of a block must reach the
// same barrier, and all lanes of a warp the same shuffle or vote; anything else is an error.
#pragma once

#include <math.h>

#include <cstdint>
#include <cstring>
#include <functional>

namespace transducer {
namespace emulation {

struct Index {
  unsigned x;
};
extern Index thread_index, block_index, block_size;

enum class Order { kForward, kReverse, kRandom };

// Sets the order of blocks, warps and lanes of later grids. Must not be called while a grid runs.
void SetOrder(Order order, unsigned seed);

// Runs body once for each thread of each block. Throws Error if threads of a block or lanes of a
// warp diverge at a barrier or shuffle. Calls from several threads run one after the other.
void RunGrid(unsigned num_blocks, unsigned num_threads, const std::function<void()>& body);

// The number of calls of RunGrid, which are the launches.
int64_t NumGrids();

// Called by running threads.
struct Site {
  const char* file;
  int line;
};
bool WaitForBlock(Site site, bool vote);  // whether any thread voted true
void WaitForWarp(Site site, unsigned mask);
// Shares `bits` with the warp, waits for all lanes, and returns the bits of all of them.
const uint64_t* ExchangeInWarp(Site site, unsigned mask, uint64_t bits);

template <typename T>
T Shuffle(Site site, unsigned mask, T value, unsigned lane) {
  static_assert(sizeof(T) <= sizeof(uint64_t), "");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  std::memcpy(&value, &ExchangeInWarp(site, mask, bits)[lane % 32], sizeof(T));
  return value;
}

inline unsigned Ballot(Site site, unsigned mask, bool vote) {
  const uint64_t* votes = ExchangeInWarp(site, mask, vote);
  unsigned result = 0;
  for (unsigned lane = 0; lane < 32; ++lane) result |= static_cast<unsigned>(votes[lane]) << lane;
  return result;
}

}  // namespace emulation
}  // namespace transducer

#define __global__
#define __device__
#define __shared__ static  // one block at a time
#define __launch_bounds__(...)

#define threadIdx (::transducer::emulation::thread_index)
#define blockIdx (::transducer::emulation::block_index)
#define blockDim (::transducer::emulation::block_size)

#define TRANSDUCER_SITE (::transducer::emulation::Site{__FILE__, __LINE__})
#define __syncthreads() ((void)::transducer::emulation::WaitForBlock(TRANSDUCER_SITE, false))
#define __syncthreads_or(vote) \
  static_cast<int>(::transducer::emulation::WaitForBlock(TRANSDUCER_SITE, (vote) != 0))
#define __syncwarp() ::transducer::emulation::WaitForWarp(TRANSDUCER_SITE, 0xffffffffu)
#define __shfl_sync(mask, value, lane) \
  ::transducer::emulation::Shuffle(TRANSDUCER_SITE, mask, value, lane)
#define __shfl_xor_sync(mask, value, offset)                     \
  ::transducer::emulation::Shuffle(TRANSDUCER_SITE, mask, value, \
                                   ::transducer::emulation::thread_index.x ^ (offset))
#define __ballot_sync(mask, vote) \
  ::transducer::emulation::Ballot(TRANSDUCER_SITE, mask, (vote) != 0)

inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __ffs(int bits) { return __builtin_ffs(bits); }

inline unsigned long long atomicMax(unsigned long long* address, unsigned long long value) {
  const unsigned long long old = *address;
  if (value > old) *address = value;
  return old;
}
inline unsigned long long atomicAdd(unsigned long long* address, unsigned long long value) {
  const unsigned long long old = *address;
  *address = old + value;
  return old;
}
