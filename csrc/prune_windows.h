// SPDX-License-Identifier: Apache-2.0
// Between the simple loss and the pruned one: the window of symbols of each frame.
#pragma once

#include "half.h"

namespace transducer {

// Posteriors of a simple loss, and the boundaries of its utterances.
template <typename T>
struct PrunePosteriors {
  int64_t num_utterances;   // B
  int64_t num_symbols;      // S
  int64_t num_frames;       // T
  int64_t px_frames;        // T or T + 1
  const T* px;              // (B, S, px_frames) of the symbols
  const T* py;              // (B, S + 1, T) of the termination symbols
  const int64_t* boundary;  // (B, 4) rows of s_begin, t_begin, s_end, t_end
};

struct PruneOptions {
  int64_t width;  // R, 1 to S + 1
  int64_t step;   // the largest increase of the start from frame to frame
};

// ranges (B, T, R) = start, start + 1, ..., start + R - 1 of each frame. The start of largest mass,
//
//     mass(t, s) = sum_{s <= u < s + R} py(u, t) - px(s - 1, t)
//
// (the lowest of those that are about equal) is made feasible: it is lowered to the minimum
// of all later starts, the last of which is fixed, and raised where a later start would be out of
// reach. NaN counts as 0.
template <typename T>
void PruneWindowsCpu(const PrunePosteriors<T>& posteriors, const PruneOptions& options,
                     int num_threads, int64_t* ranges);

// The same on the device, on `stream`.
template <typename T>
void PruneWindowsCuda(const PrunePosteriors<T>& posteriors, const PruneOptions& options,
                      void* stream, int64_t* ranges);

// --- formulas of both devices -------------------------------------------------------------------

// Several windows of a frame may contain all of the mass. Rounding of float32 posteriors makes their
// masses differ in the seventh digit, so differences below 2^-20 are ignored.
constexpr Score kMassesPerOne = 1048576;

// The mass of a window in units of 2^-20, an integer.
template <typename T>
TRANSDUCER_HD Score RoundedMass(const PrunePosteriors<T>& posteriors, int64_t width, int64_t b,
                                int64_t t, int64_t s) {
  const int64_t frames = posteriors.num_frames;
  const T* py = posteriors.py + (b * (posteriors.num_symbols + 1) + s) * frames + t;
  Score mass = 0;
  for (int64_t u = 0; u < width; ++u) mass += static_cast<Score>(ToCompute(py[u * frames]));
  if (s > 0) {  // the posterior of the symbol that enters the window
    const int64_t row = b * posteriors.num_symbols + s - 1;
    mass -= static_cast<Score>(ToCompute(posteriors.px[row * posteriors.px_frames + t]));
  }
  mass = mass == mass ? mass : 0;
  constexpr Score kMost = 1e30;  // sums over frames stay finite
  mass = (mass < -kMost ? -kMost : mass > kMost ? kMost : mass) * kMassesPerOne;
  constexpr Score kRound = 6755399441055744.0;  // 1.5 * 2^52: adding it rounds to an integer
  const Score rounded = (mass + kRound) - kRound;
  return mass < 1e15 && mass > -1e15 ? rounded : mass;
}

// The starts of an utterance that do not depend on the posteriors.
struct WindowLimits {
  int64_t t_begin, t_end;
  int64_t padding;      // of frames outside of the boundary
  int64_t first, last;  // of the first and of the last real frame

  TRANSDUCER_HD WindowLimits(const int64_t* boundary, const PruneOptions& options)
      : t_begin(boundary[1]), t_end(boundary[3]) {
    padding = boundary[2] - options.width + 1;
    if (padding < 0) padding = 0;
    // A window wider than all columns from s_begin to s_end starts before s_begin.
    first = boundary[0] < padding ? boundary[0] : padding;
    last = first + options.step * (t_end - t_begin - 1);
    if (last > padding) last = padding;
  }

  // The start of a frame. `slack` is the minimum of step * t' - start over all t' >= t: if no
  // increase is above `step`, then step * t - start never decreases.
  TRANSDUCER_HD int64_t Start(int64_t t, int64_t slack, int64_t step) const {
    if (t < t_begin || t >= t_end) return padding;
    const int64_t reachable = first + step * (t - t_begin), wanted = step * t - slack;
    return wanted < reachable ? wanted : reachable;
  }
};

}  // namespace transducer
