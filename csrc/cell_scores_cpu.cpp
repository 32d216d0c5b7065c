// SPDX-License-Identifier: Apache-2.0
#include "cell_scores.h"
#include "parallel.h"
#include "row_kernels.h"

namespace transducer {
namespace {

// A log-probability picked from a row: +inf is not one.
template <typename T>
Score Pick(const T* row, int64_t index, Score normaliser) {
  const Score score = static_cast<Score>(ToCompute(row[index])) - normaliser;
  return score == -kLogZero ? kNaN : score;
}

}  // namespace

template <typename T>
void CellScoresCpu(const LatticeBatch& batch, const T* logits, int64_t vocab_size, int64_t blank,
                   bool from_log_softmax, int num_threads, Score* normaliser, Score* blank_score,
                   Score* label_score) {
  const RowKernels<T>& kernels = GetRowKernels<T>();
  // One task a frame of an utterance; frames beyond its length are empty tasks.
  ParallelFor(batch.num_utterances * batch.max_frames, num_threads, [&](int64_t task) {
    const int64_t b = task / batch.max_frames, t = task % batch.max_frames;
    if (!batch.IsValid(b) || t >= batch.num_frames[b]) return;
    const int64_t num_targets = batch.num_targets[b];
    for (int64_t u = 0; u <= num_targets; ++u) {
      const int64_t row = batch.Row(b, t, u);
      const T* x = logits + row * vocab_size;
      Score log_sum = 0;
      if (!from_log_softmax) {
        Compute<T> max, sum;
        kernels.max_and_sum_exp(x, vocab_size, &max, &sum);
        log_sum = static_cast<Score>(max) + std::log(static_cast<Score>(sum));
      }
      normaliser[row] = log_sum;
      blank_score[row] = Pick(x, blank, log_sum);
      if (u == num_targets) {
        label_score[row] = kLogZero;
      } else {
        const int64_t target = batch.Target(b, u);
        const bool in_vocab = target >= 0 && target < vocab_size;
        label_score[row] = in_vocab ? Pick(x, target, log_sum) : kNaN;
      }
    }
  });
}

#define TRANSDUCER_INSTANTIATE(T)                                                                   \
  template void CellScoresCpu<T>(const LatticeBatch&, const T*, int64_t, int64_t, bool, int, Score*, \
                                 Score*, Score*);
TRANSDUCER_FOR_EACH_DTYPE(TRANSDUCER_INSTANTIATE)

}  // namespace transducer
