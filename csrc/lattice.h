// SPDX-License-Identifier: Apache-2.0
// Stage 2: the forward-backward recursion. Knows the topology, not the vocabulary.
#pragma once

#include "lattice_batch.h"
#include "topology.h"

namespace transducer {

struct LatticeOptions {
  Topology topology = Topology::kRegular;
  // Adds delay_penalty * ((T_b - 1) / 2 - t) to every label score: later symbols cost more.
  double delay_penalty = 0;
  // Label posteriors are multiplied by (1 + fastemit_lambda) on their way out; the loss is not.
  double fastemit_lambda = 0;
  // CUDA: float64's exponentials and logarithms, for float64 logits. The CPU has no others.
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
// +inf loss and zero uses if no path survives; NaN loss and NaN uses if any score of the utterance
// is NaN; NaN loss and untouched uses if its lengths are invalid.
//
// `scratch` has LatticeScratchCpu bytes, which may hold anything. With uses, the CPU needs none:
// the backward variables live in use_blank and the forward variables in use_label until the
// posteriors replace them.
int64_t LatticeScratchCpu(const LatticeBatch& batch, Topology topology, bool with_uses);
void LatticeCpu(const LatticeBatch& batch, const LatticeOptions& options,
                const LatticeScores& scores, int num_threads, void* scratch, const LatticeOut& out);

// The same on the device, on `stream`.
int64_t LatticeScratchCuda(const LatticeBatch& batch, Topology topology, bool with_uses);
void LatticeCuda(const LatticeBatch& batch, const LatticeOptions& options,
                 const LatticeScores& scores, void* stream, void* scratch, const LatticeOut& out);

}  // namespace transducer
