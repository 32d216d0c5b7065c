// SPDX-License-Identifier: Apache-2.0
// Stage 2 for topologies whose arcs may advance several frames (TDT, multi-blank).
#pragma once

#include "lattice.h"
#include "logits.h"

namespace transducer {

// The arcs that leave a cell (t, u): arc k of blank leads to (t + blank_frames[k], u), arc k of the
// label to (t + label_frames[k], u + 1). A blank arc may also lead to (T, U), the end; no arc leads
// to another place behind the last frame.
struct DurationArcs {
  int num_blank, num_label;         // at most kMaxDurations each
  int blank_frames[kMaxDurations];  // each at least 1
  int label_frames[kMaxDurations];  // ascending, each at least 0
};

// Log-probabilities of the arcs, (num_rows, num_blank) and (num_rows, num_label).
struct ArcScores {
  const Score* blank;
  const Score* label;
};

struct ArcOut {
  Score* loss;       // (B,)
  Score* use_blank;  // like ArcScores::blank, or null: the loss alone
  Score* use_label;  // like ArcScores::label, null if use_blank is
};

// loss[b] = -log of the total probability of all paths of utterance b, and the posterior of each
// arc. Of the options, the delay penalty, FastEmit and `exact` apply, as in Lattice; so do the rules
// for impossible, NaN and invalid utterances. Rows of padding get no uses.
//
// `scratch` has DurationLatticeScratch bytes, which may contain anything.
void DurationLatticeCpu(const LatticeBatch& batch, const LatticeOptions& options,
                        const DurationArcs& arcs, const ArcScores& scores, int num_threads,
                        void* scratch, const ArcOut& out);

// The same on the device, on `stream`.
void DurationLatticeCuda(const LatticeBatch& batch, const LatticeOptions& options,
                         const DurationArcs& arcs, const ArcScores& scores, void* stream,
                         void* scratch, const ArcOut& out);

// beta, and alpha if there are uses.
inline int64_t DurationLatticeScratch(const LatticeBatch& batch, bool with_uses) {
  return (with_uses ? 2 : 1) * batch.num_rows * static_cast<int64_t>(sizeof(Score));
}

}  // namespace transducer
