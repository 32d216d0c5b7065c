// SPDX-License-Identifier: Apache-2.0
#include "prune_windows.h"

#include <algorithm>
#include <vector>

#include "parallel.h"

namespace transducer {

template <typename T>
void PruneWindowsCpu(const PrunePosteriors<T>& posteriors, const PruneOptions& options,
                     int num_threads, int64_t* ranges) {
  const int64_t num_frames = posteriors.num_frames, width = options.width, step = options.step;
  const int64_t num_starts = posteriors.num_symbols + 2 - width;
  ParallelFor(posteriors.num_utterances, num_threads, [&](int64_t b) {
    const auto size = static_cast<size_t>(num_frames);
    std::vector<Score> best(size, kLogZero);
    std::vector<int64_t> start(size, 0);
    for (int64_t s = 0; s < num_starts; ++s) {
      for (int64_t t = 0; t < num_frames; ++t) {
        const auto i = static_cast<size_t>(t);
        const Score mass = RoundedMass(posteriors, width, b, t, s);
        const bool is_better = mass > best[i];
        best[i] = is_better ? mass : best[i];
        start[i] = is_better ? s : start[i];
      }
    }
    const WindowLimits limits(posteriors.boundary + 4 * b, options);
    int64_t lowest = std::numeric_limits<int64_t>::max(), slack = lowest;
    for (int64_t t = num_frames - 1; t >= 0; --t) {
      const int64_t wanted = t < limits.t_end - 1 ? start[static_cast<size_t>(t)] : limits.last;
      lowest = std::min(lowest, wanted);
      slack = std::min(slack, step * t - std::max(lowest, limits.first));
      int64_t* range = ranges + (b * num_frames + t) * width;
      const int64_t found = limits.Start(t, slack, step);
      for (int64_t r = 0; r < width; ++r) range[r] = found + r;
    }
  });
}

#define TRANSDUCER_INSTANTIATE(T) \
  template void PruneWindowsCpu<T>(const PrunePosteriors<T>&, const PruneOptions&, int, int64_t*);
TRANSDUCER_FOR_EACH_DTYPE(TRANSDUCER_INSTANTIATE)
#undef TRANSDUCER_INSTANTIATE

}  // namespace transducer
