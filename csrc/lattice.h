// SPDX-License-Identifier: Apache-2.0
// Stage 2: the forward-backward recursion. It depends on the topology, not on the vocabulary.
#pragma once

#include "lattice_batch.h"
#include "topology.h"

namespace transducer {

struct LatticeOptions {
  Topology topology = Topology::kRegular;
  // Adds delay_penalty * ((T_b - 1) / 2 - t) to every label score: later symbols cost more.
  double delay_penalty = 0;
  // Label posteriors are multiplied by (1 + fastemit_lambda); the loss is not.
  double fastemit_lambda = 0;
  // CUDA: float64 exponentials and logarithms, for float64 logits. The CPU always uses them.
  bool exact = true;
};

// The output of stage 1, (num_rows,) each.
struct LatticeScores {
  const Score* blank;
  const Score* label;
};

struct LatticeOut {
  Score* loss;       // (B,)
  Score* use_blank;  // (num_rows,), or null: the loss alone
  Score* use_label;  // (num_rows,), null if use_blank is
};

// loss[b] = -log of the total probability of all paths of utterance b, and for each cell the
// expected number of uses of its blank score and of its label score (posteriors; for
// `constrained` the forced blank counts as a use).
//
// The loss is +inf and the uses are zero if no path has a probability above zero. Both are NaN if
// any score of the utterance is NaN. If its lengths are invalid, the loss is NaN and the uses are
// not written.
//
// `scratch` has LatticeScratchCpu bytes, which may contain anything. With uses, the CPU needs none:
// it keeps the backward variables in use_blank and the forward variables in use_label until the
// posteriors replace them.
int64_t LatticeScratchCpu(const LatticeBatch& batch, Topology topology, bool with_uses);
void LatticeCpu(const LatticeBatch& batch, const LatticeOptions& options,
                const LatticeScores& scores, int num_threads, void* scratch, const LatticeOut& out);

// The same on the device, on `stream`.
int64_t LatticeScratchCuda(const LatticeBatch& batch, Topology topology, bool with_uses);
void LatticeCuda(const LatticeBatch& batch, const LatticeOptions& options,
                 const LatticeScores& scores, void* stream, void* scratch, const LatticeOut& out);

}  // namespace transducer
