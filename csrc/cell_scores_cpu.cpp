// SPDX-License-Identifier: Apache-2.0
#include "cell_scores.h"
#include "parallel.h"
#include "row_kernels.h"

namespace transducer {
namespace {

// A log-probability picked from a row: +inf is not one. Subtracting the maximum first keeps the
// result right where max + log_sum would round.
template <typename T>
Score Pick(const T* row, int64_t index, Score max, Score log_sum) {
  const Score score = (static_cast<Score>(ToCompute(row[index])) - max) - log_sum;
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
      Score max = 0, log_sum = 0;
      if (!from_log_softmax) {
        Compute<T> row_max, row_sum;
        kernels.max_and_sum_exp(x, vocab_size, &row_max, &row_sum);
        max = static_cast<Score>(row_max);
        log_sum = std::log(static_cast<Score>(row_sum));
      }
      normaliser[row] = max + log_sum;
      blank_score[row] = Pick(x, blank, max, log_sum);
      if (u == num_targets) {
        label_score[row] = kLogZero;
      } else {
        const int64_t target = batch.Target(b, u);
        const bool in_vocab = target >= 0 && target < vocab_size;
        label_score[row] = in_vocab ? Pick(x, target, max, log_sum) : kNaN;
      }
    }
  });
}

#define TRANSDUCER_INSTANTIATE(T)                                                                   \
  template void CellScoresCpu<T>(const LatticeBatch&, const T*, int64_t, int64_t, bool, int, Score*, \
                                 Score*, Score*);
TRANSDUCER_FOR_EACH_DTYPE(TRANSDUCER_INSTANTIATE)

}  // namespace transducer
