// SPDX-License-Identifier: Apache-2.0
#include <algorithm>

#include "fast_log_add.h"
#include "lattice.h"
#include "parallel.h"
#include "row_kernels.h"

namespace transducer {
namespace {

// The cells of one frame: u = begin ... end - 1; cell u is row offset + u. Those below label_end have
// a label arc.
struct Frame {
  int64_t begin, end, offset, label_end;
  bool Has(int64_t u) const { return u >= begin && u < end; }
};

const SoftplusTable& Softplus() {
  static const SoftplusTable table;
  return table;
}

// Frames processed at once. A cell depends on its neighbor in the frame, with a latency of about 50
// cycles. Cells of the other frames, each one cell behind the frame before, are computed meanwhile.
constexpr int64_t kFront = 4;

// One utterance. Every topology has the blank arc (t, u) -> (t + 1, u). They differ in the label
// arc and in the arcs that may reach the final node (T, U), which is behind the last frame. Arcs
// that leave a band do not exist.
template <Topology kTopology>
class Utterance {
  using Traits = StaticTraits<kTopology>;

 public:
  Utterance(const LatticeBatch& batch, const LatticeOptions& options, int64_t b,
            const LatticeScores& scores)
      : batch_(batch),
        softplus_(Softplus()),
        kernels_(GetRowKernelSet()),
        b_(b),
        frames_(batch.num_frames[b]),
        labels_(batch.num_targets[b]),
        first_frame_(batch.first_frame != nullptr ? batch.first_frame[b] : 0),
        options_(options),
        blank_(scores.blank),
        label_(scores.label) {}

  // Backward variables: beta(t, u) = log-probability of all paths from (t, u) to the end. Returns
  // beta(0, 0), or NaN if any score is NaN, even one that is on no path.
  Score Backward(Score* beta) const {
    bool has_nan = false;
    for (int64_t last = frames_ - 1; last >= 0; last -= kFront) {
      // frame[k] is t = last + 1 - k. frame[0] is done; the others are the front.
      const int64_t count = std::min(kFront, last + 1);
      Frame frame[kFront + 1];
      int64_t high = -1, low = labels_;
      for (int64_t k = 0; k <= count; ++k) {
        frame[k] = last + 1 - k < frames_ ? FrameAt(last + 1 - k) : NoFrame();
        if (k == 0) continue;
        high = std::max(high, frame[k].end - 1 - k);
        low = std::min(low, frame[k].begin - k);
      }
      for (int64_t place = high; place >= low; --place) {
        for (int64_t k = 1; k <= count; ++k) {
          const Frame &here = frame[k], &next = frame[k - 1];
          const int64_t t = last + 1 - k, u = place + k, cell = here.offset + u;
          if (!here.Has(u)) continue;
          has_nan |= std::isnan(blank_[cell]);
          has_nan |= u < here.label_end && std::isnan(label_[cell]);
          const Score by_blank = blank_[cell] + AfterBlank(beta, next, t, u);
          const Score by_label = u < here.label_end ? LabelScore(here, u, Penalty(t)) +
                                                          AfterLabel(beta, here, next, t, u)
                                                    : kLogZero;
          beta[cell] = FastLogAdd(softplus_, by_blank, by_label);
        }
      }
    }
    if (has_nan) return kNaN;
    const Frame first = FrameAt(0);
    return first.Has(0) ? beta[first.offset] : kLogZero;
  }

  // Computes forward variables and posteriors. On entry `beta` contains the result of Backward, on
  // exit posteriors. Forward variables are pushed: cell (t, u) is complete when the loop reaches
  // it. It adds itself to its successors and is then replaced by its posterior.
  void Posteriors(Score total, Score* beta_to_use_blank, Score* alpha_to_use_label) const {
    Score* beta = beta_to_use_blank;
    Score* alpha = alpha_to_use_label;
    Frame frame[kFront + 1];  // frame[k] is t = first + k
    frame[0] = FrameAt(0);
    std::fill(alpha + frame[0].offset + frame[0].begin, alpha + frame[0].offset + frame[0].end,
              kLogZero);
    alpha[frame[0].offset] = 0;  // total is not log(0), so the frame has cell (0, 0)
    for (int64_t first = 0; first < frames_; first += kFront) {
      const int64_t count = std::min(kFront, frames_ - first);
      int64_t low = labels_ + kFront, high = -1;
      for (int64_t k = 0; k <= count; ++k) {
        if (k > 0) {
          const Frame& next = frame[k] = first + k < frames_ ? FrameAt(first + k) : NoFrame();
          std::fill(alpha + next.offset + next.begin, alpha + next.offset + next.end, kLogZero);
        }
        if (k == count) break;
        low = std::min(low, frame[k].begin + k);
        high = std::max(high, frame[k].end - 1 + k);
      }
      for (int64_t place = low; place <= high; ++place) {
        for (int64_t k = 0; k < count; ++k) {
          const Frame &here = frame[k], &next = frame[k + 1];
          const int64_t t = first + k, u = place - k, cell = here.offset + u;
          if (!here.Has(u)) continue;
          const Score from = alpha[cell];
          const Score by_blank = from + blank_[cell];
          const bool has_label = u < here.label_end;
          const Score by_label = has_label ? from + LabelScore(here, u, Penalty(t)) : kLogZero;

          // Logarithms of the posteriors. They replace alpha and beta, which are not read again.
          const Score log_blank = by_blank + AfterBlank(beta, next, t, u) - total;
          const Score log_label =
              has_label ? by_label + AfterLabel(beta, here, next, t, u) - total : kLogZero;

          if (next.Has(u)) Push(alpha + next.offset + u, by_blank);
          if constexpr (Traits::kLabelFrames == 0) {
            if (here.Has(u + 1)) Push(alpha + cell + 1, by_label);
          } else {
            if (next.Has(u + 1)) Push(alpha + next.offset + u + 1, by_label);
          }

          alpha[cell] = log_label;
          beta[cell] = log_blank;
        }
      }
      for (int64_t k = 0; k < count; ++k) FinishFrame(frame[k], beta, alpha);
      frame[0] = frame[count];
    }
  }

  // Sets the uses of every cell of the utterance.
  void Fill(Score value, Score* use_blank, Score* use_label) const {
    for (int64_t t = 0; t < frames_; ++t) {
      const Frame frame = FrameAt(t);
      for (int64_t u = frame.begin; u < frame.end; ++u) {
        use_blank[frame.offset + u] = use_label[frame.offset + u] = value;
      }
    }
  }

 private:
  // Converts logarithms of posteriors to uses.
  void FinishFrame(const Frame& frame, Score* use_blank, Score* use_label) const {
    const int64_t first = frame.offset + frame.begin, size = frame.end - frame.begin;
    kernels_.posteriors(use_blank + first, size);
    kernels_.posteriors(use_label + first, size);
    if (options_.fastemit_lambda != 0) {
      const Score label_gain = 1 + options_.fastemit_lambda;
      for (int64_t i = first; i < first + size; ++i) use_label[i] *= label_gain;
    }
    if constexpr (Traits::kLabelTakesBlank) {  // the forced blank of a label is a use
      for (int64_t i = first + 1; i < first + size; ++i) use_blank[i] += use_label[i - 1];
    }
  }

  static Frame NoFrame() { return {0, 0, 0, 0}; }

  Frame FrameAt(int64_t t) const {
    const int64_t begin = batch_.ColumnBegin(b_, t);
    return {begin, std::max(begin, batch_.ColumnEnd(b_, t)), batch_.Row(b_, t, 0),
            batch_.LabelEnd(b_, t)};
  }

  void Push(Score* alpha, Score score) const { *alpha = FastLogAdd(softplus_, *alpha, score); }

  Score Penalty(int64_t t) const {
    const Score middle = 0.5 * static_cast<Score>(frames_ - 1 - first_frame_);
    return options_.delay_penalty * (middle - static_cast<Score>(t));
  }

  Score LabelScore(const Frame& here, int64_t u, Score penalty) const {
    Score score = label_[here.offset + u];
    if constexpr (Traits::kLabelTakesBlank) {
      score += here.Has(u + 1) ? blank_[here.offset + u + 1] : kLogZero;
    }
    return score + penalty;
  }

  // beta at the end of the blank arc from (t, u).
  Score AfterBlank(const Score* beta, const Frame& next, int64_t t, int64_t u) const {
    if (t + 1 < frames_) return next.Has(u) ? beta[next.offset + u] : kLogZero;
    return u == labels_ ? 0 : kLogZero;
  }

  // beta at the end of the label arc from (t, u).
  Score AfterLabel(const Score* beta, const Frame& here, const Frame& next, int64_t t,
                   int64_t u) const {
    if constexpr (Traits::kLabelFrames == 0)
      return here.Has(u + 1) ? beta[here.offset + u + 1] : kLogZero;
    if (t + 1 < frames_) return next.Has(u + 1) ? beta[next.offset + u + 1] : kLogZero;
    if constexpr (!Traits::kEndsWithLabel) return kLogZero;
    return u + 1 == labels_ ? 0 : kLogZero;
  }

  const LatticeBatch& batch_;
  const SoftplusTable& softplus_;
  const RowKernelSet& kernels_;
  const int64_t b_, frames_, labels_, first_frame_;
  const LatticeOptions& options_;
  const Score* blank_;
  const Score* label_;
};

template <Topology kTopology>
void Run(const LatticeBatch& batch, const LatticeOptions& options, const LatticeScores& scores,
         int num_threads, void* scratch, const LatticeOut& out) {
  const bool wants_uses = out.use_blank != nullptr;
  Score* beta = wants_uses ? out.use_blank : static_cast<Score*>(scratch);
  ParallelFor(batch.num_utterances, num_threads, [&](int64_t b) {
    if (!batch.IsValid(b)) {
      out.loss[b] = kNaN;  // stage 3 tests IsValid too and needs no uses
      return;
    }
    const Utterance<kTopology> utterance(batch, options, b, scores);
    const Score total = utterance.Backward(beta);
    out.loss[b] = -total;
    if (!wants_uses) return;
    if (std::isnan(total)) {
      utterance.Fill(kNaN, out.use_blank, out.use_label);
    } else if (total == kLogZero) {
      utterance.Fill(0, out.use_blank, out.use_label);
    } else {
      utterance.Posteriors(total, out.use_blank, out.use_label);
    }
  });
}

}  // namespace

int64_t LatticeScratchCpu(const LatticeBatch& batch, Topology, bool with_uses) {
  return with_uses ? 0 : batch.num_rows * static_cast<int64_t>(sizeof(Score));
}

void LatticeCpu(const LatticeBatch& batch, const LatticeOptions& options,
                const LatticeScores& scores, int num_threads, void* scratch,
                const LatticeOut& out) {
  CallWithTopology(options.topology, [&](auto topology) {
    Run<decltype(topology)::value>(batch, options, scores, num_threads, scratch, out);
  });
}

}  // namespace transducer
