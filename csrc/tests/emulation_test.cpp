// SPDX-License-Identifier: Apache-2.0
// The emulation itself: barriers and shuffles work, a missing barrier shows, divergence is an
// error.
#include <string>
#include <vector>

#include "../cuda_launch.h"
#include "expect.h"

namespace transducer {
namespace {

using emulation::Order;

constexpr int kThreads = 96;

// out[i] = in[i] + in of the thread after, through shared memory.
template <bool kWithBarrier>
__global__ void NeighborKernel(const int* in, int* out) {
  __shared__ int values[kThreads];
  const unsigned i = threadIdx.x, at = blockIdx.x * blockDim.x + i;
  values[i] = in[at];
  if (kWithBarrier) __syncthreads();
  out[at] = values[i] + values[(i + 1) % kThreads];
}

std::vector<int> Neighbors(void (*kernel)(const int*, int*), Order order, unsigned seed) {
  std::vector<int> in(3 * kThreads), out(in.size());
  for (size_t i = 0; i < in.size(); ++i) in[i] = static_cast<int>(i * i);
  emulation::SetOrder(order, seed);
  TRANSDUCER_LAUNCH(kernel, 3, kThreads, nullptr, in.data(), out.data());
  return out;
}

void TestMissingBarrierShows() {
  const auto expected = Neighbors(NeighborKernel<true>, Order::kForward, 0);
  EXPECT_TRUE(expected[0] == 1 && expected[1] == 5);
  EXPECT_TRUE(expected[2 * kThreads - 1] == 191 * 191 + 96 * 96);
  EXPECT_TRUE(Neighbors(NeighborKernel<true>, Order::kReverse, 0) == expected);
  EXPECT_TRUE(Neighbors(NeighborKernel<true>, Order::kRandom, 1) == expected);
  EXPECT_TRUE(Neighbors(NeighborKernel<false>, Order::kForward, 0) !=
              Neighbors(NeighborKernel<false>, Order::kReverse, 0));
  EXPECT_TRUE(Neighbors(NeighborKernel<false>, Order::kRandom, 1) !=
              Neighbors(NeighborKernel<false>, Order::kRandom, 2));
}

// Warp sums by both kinds of shuffle, votes, and a block's vote.
__global__ void WarpKernel(const double* in, double* sums, unsigned* votes, int* any) {
  double sum = in[threadIdx.x], running = 0;
  for (int offset = 16; offset > 0; offset /= 2) {
    sum += __shfl_xor_sync(0xffffffffu, sum, offset);
  }
  for (int lane = 0; lane < 32; ++lane) {
    running += __shfl_sync(0xffffffffu, in[threadIdx.x], lane);
  }
  votes[threadIdx.x] = __ballot_sync(0xffffffffu, in[threadIdx.x] > 10);
  __syncwarp();
  sums[threadIdx.x] = sum == running ? sum : -1;
  any[threadIdx.x] = __syncthreads_or(threadIdx.x == 70) + 2 * __syncthreads_or(0);
}

void TestWarp(Order order) {
  std::vector<double> in(kThreads), sums(kThreads);
  std::vector<unsigned> votes(kThreads);
  std::vector<int> any(kThreads);
  for (int i = 0; i < kThreads; ++i) in[i] = i;
  emulation::SetOrder(order, 7);
  TRANSDUCER_LAUNCH(WarpKernel, 1, kThreads, nullptr, in.data(), sums.data(), votes.data(),
                    any.data());
  for (int i = 0; i < kThreads; ++i) {
    const int first = i / 32 * 32;
    EXPECT_TRUE(sums[i] == 32 * first + 31 * 16 && any[i] == 1);
    EXPECT_TRUE(votes[i] == (first > 0 ? 0xffffffffu : 0xfffff800u));
  }
}

__global__ void SumKernel(unsigned long long* sum) { atomicAdd(sum, threadIdx.x + 1); }

__global__ void SomeSkipBarrierKernel() {
  if (threadIdx.x != 5) __syncthreads();
}
__global__ void OtherBarrierKernel() {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();  // another one
  }
}
__global__ void LaneMissingKernel(int* out) {
  if (threadIdx.x % 32 < 31) *out = __shfl_xor_sync(0xffffffffu, 1, 1);
}
__global__ void LaneAtBarrierKernel(int* out) {
  if (threadIdx.x == 40) __syncthreads();
  *out = __shfl_xor_sync(0xffffffffu, 1, 1);
}
__global__ void PartialMaskKernel(int* out) { *out = __shfl_xor_sync(0xffffu, 1, 1); }

template <typename... P, typename... A>
std::string ErrorOf(void (*kernel)(P...), A... arguments) {
  try {
    TRANSDUCER_LAUNCH(kernel, 2, kThreads, nullptr, arguments...);
  } catch (const Error& error) {
    return error.what();
  }
  return "";
}

bool Has(const std::string& text, const char* part) { return text.find(part) != std::string::npos; }

void TestDivergence(Order order) {
  emulation::SetOrder(order, 3);
  int out;
  EXPECT_TRUE(Has(ErrorOf(SomeSkipBarrierKernel), "a block of block"));
  EXPECT_TRUE(Has(ErrorOf(SomeSkipBarrierKernel), "thread 5 has ended"));
  EXPECT_TRUE(Has(ErrorOf(OtherBarrierKernel), "waits for its block at"));
  EXPECT_TRUE(Has(ErrorOf(LaneMissingKernel, &out), "has ended"));
  EXPECT_TRUE(Has(ErrorOf(LaneAtBarrierKernel, &out), "thread 40 waits for its block"));
  EXPECT_TRUE(Has(ErrorOf(PartialMaskKernel, &out), "other than the full warp"));
  // None of which harms the next grid.
  unsigned long long sum = 0;
  TRANSDUCER_LAUNCH(SumKernel, 4, 64, nullptr, &sum);
  EXPECT_TRUE(sum == 4 * 64 * 65 / 2);
}

}  // namespace
}  // namespace transducer

int main() {
  using transducer::emulation::Order;
  transducer::TestMissingBarrierShows();
  for (const Order order : {Order::kForward, Order::kReverse, Order::kRandom}) {
    transducer::TestWarp(order);
    transducer::TestDivergence(order);
  }
  return expect::Finish();
}
