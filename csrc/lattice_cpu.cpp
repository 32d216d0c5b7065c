// SPDX-License-Identifier: Apache-2.0
#include <algorithm>

#include "lattice.h"
#include "log_add.h"
#include "parallel.h"

namespace transducer {
namespace {

// One utterance. Every topology has the blank arc (t, u) -> (t + 1, u); they differ in the label
// arc, and in what may reach the final node (T, U), which lies behind the last frame.
template <Topology kTopology>
class Utterance {
 public:
  Utterance(const LatticeBatch& batch, const LatticeOptions& options, int64_t b,
            const Score* blank_score, const Score* label_score)
      : frames_(batch.num_frames[b]),
        labels_(batch.num_targets[b]),
        stride_(batch.Stride(b)),
        first_row_(batch.first_row[b]),
        options_(options),
        blank_(blank_score + first_row_),
        label_(label_score + first_row_) {}

  // Backward variables: beta(t, u) = log-probability of all ways from (t, u) to the end. Returns
  // beta(0, 0), NaN if any score is NaN (also one that no path could use).
  Score Backward(Score* beta) const {
    beta += first_row_;
    bool has_nan = false;
    for (int64_t t = frames_ - 1; t >= 0; --t) {
      const Score penalty = Penalty(t);
      for (int64_t u = labels_; u >= 0; --u) {
        const int64_t cell = t * stride_ + u;
        has_nan |= std::isnan(blank_[cell]) | (u < labels_ && std::isnan(label_[cell]));
        const Score by_blank = blank_[cell] + AfterBlank(beta, t, u);
        const Score by_label =
            u < labels_ ? LabelScore(t, u, penalty) + AfterLabel(beta, t, u) : kLogZero;
        beta[cell] = LogAdd(by_blank, by_label);
      }
    }
    return has_nan ? kNaN : beta[0];
  }

  // Forward variables, and the posteriors on the way. On entry `beta` holds Backward's result; on
  // exit posteriors. Forward variables are pushed: cell (t, u) is complete when the loop reaches
  // it, adds itself to its successors, and makes room for its posterior.
  void Posteriors(Score total, Score* beta_to_use_blank, Score* alpha_to_use_label) const {
    Score* beta = beta_to_use_blank + first_row_;
    Score* alpha = alpha_to_use_label + first_row_;
    const Score label_gain = 1 + options_.fastemit_lambda;
    std::fill(alpha, alpha + labels_ + 1, kLogZero);
    alpha[0] = 0;
    for (int64_t t = 0; t < frames_; ++t) {
      const Score penalty = Penalty(t);
      Score forced_blank = 0;  // constrained: posterior of the label arc that ends above this cell
      for (int64_t u = 0; u <= labels_; ++u) {
        const int64_t cell = t * stride_ + u;
        const Score here = alpha[cell];
        const Score by_blank = here + blank_[cell];
        const Score by_label =
            u < labels_ ? here + LabelScore(t, u, penalty) : kLogZero;

        const Score post_blank = std::exp(by_blank + AfterBlank(beta, t, u) - total);
        const Score post_label =
            u < labels_ ? label_gain * std::exp(by_label + AfterLabel(beta, t, u) - total) : 0;

        if (t + 1 < frames_) {
          // In (t + 1, u) there is so far, at most, the label arc from (t, u - 1).
          Score* next = alpha + cell + stride_;
          *next = kLabelFrames == 1 && u > 0 ? LogAdd(*next, by_blank) : by_blank;
        }
        if (u < labels_) {
          if constexpr (kLabelFrames == 0) {
            alpha[cell + 1] = t == 0 ? by_label : LogAdd(alpha[cell + 1], by_label);
          } else if (t + 1 < frames_) {
            alpha[cell + stride_ + 1] = by_label;
          }
        }

        alpha[cell] = post_label;
        beta[cell] = post_blank + forced_blank;
        if constexpr (kTopology == Topology::kConstrained) forced_blank = post_label;
      }
    }
  }

  // Same value for every cell of the utterance.
  void Fill(Score value, Score* use_blank, Score* use_label) const {
    for (int64_t t = 0; t < frames_; ++t) {
      const int64_t row = first_row_ + t * stride_;
      std::fill(use_blank + row, use_blank + row + labels_ + 1, value);
      std::fill(use_label + row, use_label + row + labels_ + 1, value);
    }
  }

 private:
  // Frames that a label arc advances.
  static constexpr int64_t kLabelFrames = kTopology == Topology::kRegular ? 0 : 1;

  Score Penalty(int64_t t) const {
    return options_.delay_penalty * (0.5 * static_cast<Score>(frames_ - 1) - static_cast<Score>(t));
  }

  Score LabelScore(int64_t t, int64_t u, Score penalty) const {
    const int64_t cell = t * stride_ + u;
    Score score = label_[cell];
    if constexpr (kTopology == Topology::kConstrained) score += blank_[cell + 1];
    return score + penalty;
  }

  // beta at the end of the blank arc from (t, u).
  Score AfterBlank(const Score* beta, int64_t t, int64_t u) const {
    if (t + 1 < frames_) return beta[(t + 1) * stride_ + u];
    return u == labels_ ? 0 : kLogZero;
  }

  // beta at the end of the label arc from (t, u).
  Score AfterLabel(const Score* beta, int64_t t, int64_t u) const {
    if constexpr (kLabelFrames == 0) return beta[t * stride_ + u + 1];
    if (t + 1 < frames_) return beta[(t + 1) * stride_ + u + 1];
    if constexpr (kTopology == Topology::kOneSymPerFrame) return kLogZero;  // must end in a blank
    return u + 1 == labels_ ? 0 : kLogZero;
  }

  const int64_t frames_, labels_, stride_, first_row_;
  const LatticeOptions& options_;
  const Score* blank_;
  const Score* label_;
};

template <Topology kTopology>
void Run(const LatticeBatch& batch, const LatticeOptions& options, const Score* blank_score,
         const Score* label_score, int num_threads, Score* scratch, Score* loss, Score* use_blank,
         Score* use_label) {
  const bool wants_uses = use_blank != nullptr;
  ParallelFor(batch.num_utterances, num_threads, [&](int64_t b) {
    if (!batch.IsValid(b)) {
      loss[b] = kNaN;  // stage 3 tests IsValid too and needs no uses
      return;
    }
    const Utterance<kTopology> utterance(batch, options, b, blank_score, label_score);
    const Score total = utterance.Backward(wants_uses ? use_blank : scratch);
    loss[b] = -total;
    if (!wants_uses) return;
    if (std::isnan(total)) {
      utterance.Fill(kNaN, use_blank, use_label);
    } else if (total == kLogZero) {
      utterance.Fill(0, use_blank, use_label);
    } else {
      utterance.Posteriors(total, use_blank, use_label);
    }
  });
}

}  // namespace

void LatticeCpu(const LatticeBatch& batch, const LatticeOptions& options, const Score* blank_score,
                const Score* label_score, int num_threads, Score* scratch, Score* loss,
                Score* use_blank, Score* use_label) {
  const auto run = [&](auto function) {
    function(batch, options, blank_score, label_score, num_threads, scratch, loss, use_blank,
             use_label);
  };
  switch (options.topology) {
    case Topology::kRegular: return run(Run<Topology::kRegular>);
    case Topology::kModified: return run(Run<Topology::kModified>);
    case Topology::kConstrained: return run(Run<Topology::kConstrained>);
    case Topology::kOneSymPerFrame: return run(Run<Topology::kOneSymPerFrame>);
  }
}

}  // namespace transducer
