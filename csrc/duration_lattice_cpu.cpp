// SPDX-License-Identifier: Apache-2.0
#include "duration_lattice.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "fast_log_add.h"
#include "parallel.h"
#include "row_kernels.h"

namespace transducer {
namespace {

// The cells of one frame: u = begin ... end - 1; cell u is row offset + u. Those below label_end have
// label arcs.
struct Frame {
  int64_t begin, end, offset, label_end;
  bool Has(int64_t u) const { return u >= begin && u < end; }
};

// One utterance. A frame is computed at once: all arcs but the labels that stay in the frame lead to
// or from other frames, so that their exponentials are computed together for all of its cells.
class Utterance {
 public:
  Utterance(const LatticeBatch& batch, const LatticeOptions& options, const DurationArcs& arcs,
            int64_t b, const ArcScores& scores)
      : batch_(batch),
        options_(options),
        arcs_(arcs),
        softplus_(Softplus()),
        kernels_(GetRowKernelSet()),
        b_(b),
        frames_(batch.num_frames[b]),
        labels_(batch.num_targets[b]),
        first_frame_(batch.first_frame != nullptr ? batch.first_frame[b] : 0),
        stays_(arcs.num_label > 0 && arcs.label_frames[0] == 0),
        blank_(scores.blank),
        label_(scores.label) {
    const auto width = static_cast<size_t>(labels_ + 1);
    terms_.resize(width * static_cast<size_t>(arcs.num_blank + arcs.num_label));
    high_.resize(width);
  }

  // Backward variables: beta(t, u) = log-probability of all paths from (t, u) to the end. Returns
  // beta(0, 0), or NaN if any score is NaN, even one that is on no path.
  Score Backward(Score* beta) {
    bool has_nan = false;
    for (int64_t t = frames_ - 1; t >= 0; --t) {
      const Frame here = FrameAt(t);
      const int64_t size = here.end - here.begin;
      num_terms_ = 0;
      for (int k = 0; k < arcs_.num_blank; ++k) {
        const After after = AfterBlank(beta, t, k);
        Score* term = NewTerm(size);
        for (int64_t u = here.begin; u < here.end; ++u) {
          const Score score = Blank(here, u, k);
          has_nan |= std::isnan(score);
          term[u - here.begin] = score + after(u);
        }
      }
      for (int k = 0; k < arcs_.num_label; ++k) {
        const bool is_later = !(stays_ && k == 0);
        const After after = AfterLabel(beta, t, k);
        Score* term = is_later ? NewTerm(size) : nullptr;
        for (int64_t u = here.begin; u < here.end; ++u) {
          const Score score = u < here.label_end ? Label(here, u, k) : kLogZero;
          has_nan |= std::isnan(score);
          if (is_later) term[u - here.begin] = score + Penalty(t) + after(u + 1);
        }
      }
      LogSumExp(size, beta + here.offset + here.begin);
      if (!stays_) continue;
      for (int64_t u = std::min(here.end - 2, here.label_end - 1); u >= here.begin; --u) {
        Score* cell = beta + here.offset + u;
        *cell = FastLogAdd(softplus_, *cell, Label(here, u, 0) + Penalty(t) + cell[1]);
      }
    }
    if (has_nan) return kNaN;
    const Frame first = FrameAt(0);
    return first.Has(0) ? beta[first.offset] : kLogZero;
  }

  // Forward variables: alpha(t, u) = log-probability of all paths from the start to (t, u).
  void Forward(Score* alpha) {
    for (int64_t t = 0; t < frames_; ++t) {
      const Frame here = FrameAt(t);
      const int64_t size = here.end - here.begin;
      num_terms_ = 0;
      if (t == 0) {
        Score* start = NewTerm(size);
        for (int64_t u = here.begin; u < here.end; ++u) start[u - here.begin] = u ? kLogZero : 0;
      }
      for (int k = 0; k < arcs_.num_blank; ++k) {
        const int64_t from = t - arcs_.blank_frames[k];
        if (from < 0) continue;
        const Frame before = FrameAt(from);
        Score* term = NewTerm(size);
        for (int64_t u = here.begin; u < here.end; ++u) {
          term[u - here.begin] =
              before.Has(u) ? alpha[before.offset + u] + Blank(before, u, k) : kLogZero;
        }
      }
      for (int k = stays_ ? 1 : 0; k < arcs_.num_label; ++k) {
        const int64_t from = t - arcs_.label_frames[k];
        if (from < 0) continue;
        const Frame before = FrameAt(from);
        Score* term = NewTerm(size);
        for (int64_t u = here.begin; u < here.end; ++u) {
          term[u - here.begin] =
              before.Has(u - 1) && u <= before.label_end
                  ? alpha[before.offset + u - 1] + Label(before, u - 1, k) + Penalty(from)
                  : kLogZero;
        }
      }
      LogSumExp(size, alpha + here.offset + here.begin);
      if (!stays_) continue;
      for (int64_t u = here.begin + 1; u < here.end; ++u) {
        Score* cell = alpha + here.offset + u;
        *cell = FastLogAdd(softplus_, *cell, cell[-1] + Label(here, u - 1, 0) + Penalty(t));
      }
    }
  }

  // Posteriors of all arcs.
  void Uses(Score total, const Score* alpha, const Score* beta, const ArcOut& out) {
    const Score label_gain = 1 + options_.fastemit_lambda;
    for (int64_t t = 0; t < frames_; ++t) {
      const Frame here = FrameAt(t);
      const int64_t size = here.end - here.begin;
      for (int k = 0; k < arcs_.num_blank; ++k) {
        num_terms_ = 0;
        const After after = AfterBlank(beta, t, k);
        Score* use = NewTerm(size);
        for (int64_t u = here.begin; u < here.end; ++u) {
          use[u - here.begin] = alpha[here.offset + u] + Blank(here, u, k) + after(u) - total;
        }
        kernels_.posteriors(use, size);
        for (int64_t u = here.begin; u < here.end; ++u) {
          out.use_blank[(here.offset + u) * arcs_.num_blank + k] = use[u - here.begin];
        }
      }
      for (int k = 0; k < arcs_.num_label; ++k) {
        num_terms_ = 0;
        const After after = AfterLabel(beta, t, k);
        Score* use = NewTerm(size);
        for (int64_t u = here.begin; u < here.end; ++u) {
          use[u - here.begin] = u < here.label_end ? alpha[here.offset + u] + Label(here, u, k) +
                                                         Penalty(t) + after(u + 1) - total
                                                   : kLogZero;
        }
        kernels_.posteriors(use, size);
        for (int64_t u = here.begin; u < here.end; ++u) {
          out.use_label[(here.offset + u) * arcs_.num_label + k] = label_gain * use[u - here.begin];
        }
      }
    }
  }

  // Sets the uses of every cell of the utterance.
  void Fill(Score value, const ArcOut& out) const {
    for (int64_t t = 0; t < frames_; ++t) {
      const Frame here = FrameAt(t);
      const int64_t first = here.offset + here.begin, end = here.offset + here.end;
      std::fill(out.use_blank + first * arcs_.num_blank, out.use_blank + end * arcs_.num_blank,
                value);
      std::fill(out.use_label + first * arcs_.num_label, out.use_label + end * arcs_.num_label,
                value);
    }
  }

 private:
  static const SoftplusTable& Softplus() {
    static const SoftplusTable table;
    return table;
  }

  Frame FrameAt(int64_t t) const {
    const int64_t begin = batch_.ColumnBegin(b_, t);
    return {begin, std::max(begin, batch_.ColumnEnd(b_, t)), batch_.Row(b_, t, 0),
            batch_.LabelEnd(b_, t)};
  }

  Score Blank(const Frame& frame, int64_t u, int k) const {
    return blank_[(frame.offset + u) * arcs_.num_blank + k];
  }
  Score Label(const Frame& frame, int64_t u, int k) const {
    return label_[(frame.offset + u) * arcs_.num_label + k];
  }
  Score Penalty(int64_t t) const {
    const Score middle = 0.5 * static_cast<Score>(frames_ - 1 - first_frame_);
    return options_.delay_penalty * (middle - static_cast<Score>(t));
  }

  // beta at the end of an arc: of the cells of one frame, or of the end of the paths.
  struct After {
    const Score* beta;
    Frame frame;
    int64_t end;  // the symbol of the end, or -1
    Score operator()(int64_t u) const {
      if (u == end) return 0;
      return frame.Has(u) ? beta[frame.offset + u] : kLogZero;
    }
  };
  After AfterBlank(const Score* beta, int64_t t, int k) const {
    const int64_t to = t + arcs_.blank_frames[k];
    if (to >= frames_) return {beta, {0, 0, 0, 0}, to == frames_ ? labels_ : -1};
    return {beta, FrameAt(to), -1};
  }
  After AfterLabel(const Score* beta, int64_t t, int k) const {
    const int64_t to = t + arcs_.label_frames[k];
    return {beta, to >= frames_ ? Frame{0, 0, 0, 0} : FrameAt(to), -1};
  }

  // A term of LogSumExp: one value for each cell of the frame.
  Score* NewTerm(int64_t size) { return terms_.data() + size * num_terms_++; }

  // out[i] = log of the sum of exp(term[i]) over all terms, which it overwrites.
  void LogSumExp(int64_t size, Score* out) {
    std::fill(high_.begin(), high_.begin() + size, kLogZero);
    for (int64_t k = 0; k < num_terms_; ++k) {
      const Score* term = terms_.data() + size * k;
      for (int64_t i = 0; i < size; ++i) high_[i] = std::max(high_[i], term[i]);
    }
    for (int64_t k = 0; k < num_terms_; ++k) {
      Score* term = terms_.data() + size * k;
      for (int64_t i = 0; i < size; ++i)
        term[i] = high_[i] == kLogZero ? kLogZero : term[i] - high_[i];
    }
    kernels_.posteriors(terms_.data(), size * num_terms_);
    for (int64_t i = 0; i < size; ++i) {
      Score sum = 0;
      for (int64_t k = 0; k < num_terms_; ++k) sum += terms_[size * k + i];
      out[i] = high_[i] + std::log(sum);
    }
  }

  const LatticeBatch& batch_;
  const LatticeOptions& options_;
  const DurationArcs& arcs_;
  const SoftplusTable& softplus_;
  const RowKernelSet& kernels_;
  const int64_t b_, frames_, labels_, first_frame_;
  const bool stays_;  // a label may stay in its frame
  const Score* blank_;
  const Score* label_;
  std::vector<Score> terms_, high_;
  int64_t num_terms_ = 0;
};

}  // namespace

void DurationLatticeCpu(const LatticeBatch& batch, const LatticeOptions& options,
                        const DurationArcs& arcs, const ArcScores& scores, int num_threads,
                        void* scratch, const ArcOut& out) {
  Score* beta = static_cast<Score*>(scratch);
  ParallelFor(batch.num_utterances, num_threads, [&](int64_t b) {
    if (!batch.IsValid(b)) {
      out.loss[b] = kNaN;  // stage 3 tests IsValid too and needs no uses
      return;
    }
    Utterance utterance(batch, options, arcs, b, scores);
    const Score total = utterance.Backward(beta);
    out.loss[b] = -total;
    if (out.use_blank == nullptr) return;
    if (std::isnan(total)) {
      utterance.Fill(kNaN, out);
    } else if (total == kLogZero) {
      utterance.Fill(0, out);
    } else {
      Score* alpha = beta + batch.num_rows;
      utterance.Forward(alpha);
      utterance.Uses(total, alpha, beta, out);
    }
  });
}

}  // namespace transducer
