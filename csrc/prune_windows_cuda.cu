// SPDX-License-Identifier: Apache-2.0
// One block an utterance: its threads find the best window of each frame, and one warp makes the
// sequence feasible.
#include "device_rows.cuh"
#include "prune_windows.h"

namespace transducer {
namespace {

constexpr int kThreads = 512;
constexpr int64_t kHighest = std::numeric_limits<int64_t>::max();

// The minimum over this lane and the later ones, and `after`, which is that of all later rounds.
__device__ int64_t LowestFromHereOn(int64_t value, int64_t after) {
  for (int offset = 1; offset < kWarp; offset *= 2) {
    const int64_t other = __shfl_sync(kFullWarp, value, (Lane() + offset) % kWarp);
    if (Lane() + offset < kWarp && other < value) value = other;
  }
  return after < value ? after : value;
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    PruneWindowsKernel(PrunePosteriors<T> posteriors, PruneOptions options, int64_t* ranges) {
  const int64_t b = blockIdx.x, num_frames = posteriors.num_frames, width = options.width;
  const int64_t num_starts = posteriors.num_symbols + 2 - width;
  const WindowLimits limits(posteriors.boundary + 4 * b, options);
  int64_t* start_of = ranges + b * num_frames * width;  // of frame t: start_of[t * width]
  for (int64_t t = threadIdx.x; t < num_frames; t += kThreads) {
    int64_t start = limits.last;
    if (t < limits.t_end - 1) {
      Score best = -kInfinityOf<Score>;
      for (int64_t s = 0; s < num_starts; ++s) {
        const Score mass = RoundedMass(posteriors, width, b, t, s);
        start = mass > best ? s : start;
        best = mass > best ? mass : best;
      }
    }
    start_of[t * width] = start;
  }
  __syncthreads();
  if (threadIdx.x < kWarp) {
    int64_t lowest = kHighest, slack = kHighest;
    for (int64_t begin = (num_frames - 1) / kWarp * kWarp; begin >= 0; begin -= kWarp) {
      const int64_t t = begin + Lane();
      const bool is_frame = t < num_frames;
      lowest = LowestFromHereOn(is_frame ? start_of[t * width] : kHighest, lowest);
      const int64_t start = lowest > limits.first ? lowest : limits.first;
      slack = LowestFromHereOn(is_frame ? options.step * t - start : kHighest, slack);
      if (is_frame) start_of[t * width] = limits.Start(t, slack, options.step);
      lowest = __shfl_sync(kFullWarp, lowest, 0);
      slack = __shfl_sync(kFullWarp, slack, 0);
    }
  }
  __syncthreads();
  for (int64_t i = threadIdx.x; i < num_frames * width; i += kThreads) {
    const int64_t t = i / width, r = i - t * width;
    if (r > 0) start_of[i] = start_of[t * width] + r;
  }
}

}  // namespace

template <typename T>
void PruneWindowsCuda(const PrunePosteriors<T>& posteriors, const PruneOptions& options,
                      void* stream, int64_t* ranges) {
  TRANSDUCER_LAUNCH(PruneWindowsKernel<T>, posteriors.num_utterances, kThreads, stream, posteriors,
                    options, ranges);
}

#define TRANSDUCER_INSTANTIATE(T)                                                          \
  template void PruneWindowsCuda<T>(const PrunePosteriors<T>&, const PruneOptions&, void*, \
                                    int64_t*);
TRANSDUCER_FOR_EACH_DTYPE(TRANSDUCER_INSTANTIATE)
#undef TRANSDUCER_INSTANTIATE

}  // namespace transducer
