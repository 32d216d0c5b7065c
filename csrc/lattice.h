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

// loss[b] = -log of the total probability of all paths of utterance b, and for each cell the
// expected number of uses of its blank score and of its label score (posteriors; for
// `constrained` the forced blank counts as a use).
//
// +inf loss and zero uses if no path survives; NaN loss and NaN uses if any score of the utterance
// is NaN; NaN loss and untouched uses if its lengths are invalid. use_blank and use_label may both be null: the loss alone then,
// in `scratch` of num_rows.
//
// On the CPU uses no other memory: the backward variables live in use_blank and the forward
// variables in use_label until the posteriors replace them.
void LatticeCpu(const LatticeBatch& batch, const LatticeOptions& options, const Score* blank_score,
                const Score* label_score, int num_threads, Score* scratch, Score* loss,
                Score* use_blank, Score* use_label);

// The same on the device, on `stream`, with a scratch of LatticeScratchCuda numbers always.
void LatticeCuda(const LatticeBatch& batch, const LatticeOptions& options, const Score* blank_score,
                 const Score* label_score, void* stream, Score* scratch, Score* loss,
                 Score* use_blank, Score* use_label);
int64_t LatticeScratchCuda(const LatticeBatch& batch, Topology topology, bool with_uses);

}  // namespace transducer
