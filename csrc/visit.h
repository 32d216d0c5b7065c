// SPDX-License-Identifier: Apache-2.0
// Before stage 2: finds the blocks of cells that paths of noticeable probability reach, so that the
// scores of the others need not be computed. CPU only.
#pragma once

#include "lattice.h"

namespace transducer {

// Block (i, j) of an utterance has its cells of the frames i * kBlockFrames, ... and of the symbols
// j * kBlockSymbols, ... Wave w has the blocks i + j = w. Every arc stays in its block or leads to a
// block of a later wave.
constexpr int64_t kBlockFrames = 16;
constexpr int64_t kBlockSymbols = 4;

constexpr int64_t NumFrameBlocks(int64_t frames) {
  return (frames + kBlockFrames - 1) / kBlockFrames;
}
constexpr int64_t NumSymbolBlocks(int64_t targets) { return targets / kBlockSymbols + 1; }

// A sweep goes through all waves. Its entering mass is what decides about a block: the logarithm of
// the probability of all paths up to the first cell in the block.
struct VisitState {
  uint8_t* has_scores;   // (B, NumFrameBlocks(T), NumSymbolBlocks(U)): blocks that were visited
  int64_t* num_visited;  // (B,) rows of these blocks
  Score* alpha;          // (num_rows,) forward variables
  Score* total;         // (B,) log-probability of the paths through visited blocks; NaN after a NaN
  Score* left_out;      // (B,) log of the sum of the masses that enter other blocks
  int64_t* num_listed;  // (B,) rows of the list of the last wave
  Score* largest;  // (B,) the largest mass of the wave; -inf if the utterance has no block in it
};

// A sweep visits every block that has scores, and every other block whose entering mass is above
// -inf, at least threshold[b], and at least the largest of the wave less `below_largest`; but no
// other ones as soon as the utterance has more than max_visited[b] visited rows.
struct VisitLimits {
  const Score* threshold;      // (B,)
  double below_largest;        // +inf: the others of the wave do not matter
  const int64_t* max_visited;  // (B,)
};

// Goes on to the next wave of a sweep: computes the forward variables in the visited blocks of wave
// `wave` - 1, and decides about the blocks of `wave`. Lists the rows of the blocks that it newly
// visits, in ascending order, and returns their number. Their scores must be there for the next
// call. Wave 0 starts a sweep; the one behind the last wave ends it.
//
// For full lattices: no band, no windows, no first frames. Only `topology` of the options is used;
// no label may take a blank. Utterances of invalid lengths have no rows.
int64_t VisitWaveCpu(const LatticeBatch& batch, const LatticeOptions& options,
                     const LatticeScores& scores, const VisitLimits& limits, int64_t wave,
                     int num_threads, const VisitState& state, int64_t* rows);

// A whole sweep that visits the blocks that have scores and no others: `total` and `left_out` with
// these scores.
void LeftOutCpu(const LatticeBatch& batch, const LatticeOptions& options,
                const LatticeScores& scores, int num_threads, const VisitState& state);

}  // namespace transducer
