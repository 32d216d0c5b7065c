// SPDX-License-Identifier: Apache-2.0
#include "visit.h"

#include <algorithm>

#include "check.h"
#include "fast_log_add.h"
#include "parallel.h"

namespace transducer {
namespace {

const SoftplusTable& Softplus() {
  static const SoftplusTable table;
  return table;
}

// One utterance in one wave.
template <Topology kTopology>
class Wave {
  using Traits = StaticTraits<kTopology>;

 public:
  Wave(const LatticeBatch& batch, const LatticeScores& scores, const VisitState& state, int64_t b,
       int64_t wave)
      : softplus_(Softplus()),
        frames_(batch.num_frames[b]),
        labels_(batch.num_targets[b]),
        stride_(batch.Stride(b)),
        first_row_(batch.first_row[b]),
        wave_(wave),
        blank_(scores.blank + first_row_),
        label_(scores.label + first_row_),
        alpha_(state.alpha + first_row_),
        num_symbol_blocks_(NumSymbolBlocks(batch.max_targets)),
        has_scores_(state.has_scores + b * NumFrameBlocks(batch.max_frames) * num_symbol_blocks_),
        total_(state.total[b]),
        left_out_(state.left_out[b]),
        largest_(state.largest[b]),
        num_visited_(state.num_visited[b]) {}

  // Ends the wave before and decides about the blocks of this one. Returns the end of the list.
  int64_t* Step(Score threshold, double below_largest, int64_t max_visited, int64_t* rows) {
    if (wave_ == 0) {
      Start();
    } else {
      LeaveBlocksBefore();
    }
    return Enter(threshold, below_largest, max_visited, rows);
  }

 private:
  struct Block {
    int64_t first_frame, end_frame, first_symbol, end_symbol;
  };

  void Start() {
    for (int64_t t = 0; t < frames_; ++t) {
      std::fill_n(alpha_ + t * stride_, labels_ + 1, kLogZero);
    }
    alpha_[0] = 0;
    total_ = left_out_ = kLogZero;
  }

  // Computes the forward variables of the visited blocks of the wave before, and adds them to the
  // cells of later waves that arcs lead to.
  void LeaveBlocksBefore() {
    ForEachBlock(wave_ - 1, [&](int64_t i, int64_t j) {
      if (has_scores_[i * num_symbol_blocks_ + j]) Leave(i, j);
    });
  }

  int64_t* Enter(Score threshold, double below_largest, int64_t max_visited, int64_t* rows) {
    largest_ = kLogZero;
    ForEachBlock(wave_, [&](int64_t i, int64_t j) { largest_ = std::max(largest_, Mass(i, j)); });
    threshold = std::max(threshold, largest_ - below_largest);
    ForEachBlock(wave_, [&](int64_t i, int64_t j) {
      uint8_t& has_scores = has_scores_[i * num_symbol_blocks_ + j];
      if (has_scores) return;
      const Score mass = Mass(i, j);
      if (!(mass > kLogZero && mass >= threshold && num_visited_ <= max_visited)) {
        left_out_ = FastLogAdd(softplus_, left_out_, mass);
        return;
      }
      has_scores = 1;
      const Block block = BlockAt(i, j);
      for (int64_t t = block.first_frame; t < block.end_frame; ++t) {
        for (int64_t u = block.first_symbol; u < block.end_symbol; ++u) {
          *rows++ = first_row_ + t * stride_ + u;
        }
      }
      num_visited_ +=
          (block.end_frame - block.first_frame) * (block.end_symbol - block.first_symbol);
    });
    return rows;
  }

  // Calls f(i, j) in the order of the frames.
  template <typename F>
  void ForEachBlock(int64_t wave, F f) const {
    const int64_t last = std::min(NumFrameBlocks(frames_) - 1, wave);
    for (int64_t i = std::max<int64_t>(0, wave - NumSymbolBlocks(labels_) + 1); i <= last; ++i) {
      f(i, wave - i);
    }
  }

  Block BlockAt(int64_t i, int64_t j) const {
    const int64_t t = i * kBlockFrames, u = j * kBlockSymbols;
    return {t, std::min(t + kBlockFrames, frames_), u, std::min(u + kBlockSymbols, labels_ + 1)};
  }

  // Arcs from other blocks lead to the first frame or to the first symbol.
  Score Mass(int64_t i, int64_t j) const {
    const Block block = BlockAt(i, j);
    Score mass = kLogZero;
    const Score* first = alpha_ + block.first_frame * stride_;
    for (int64_t u = block.first_symbol; u < block.end_symbol; ++u) Add(&mass, first[u]);
    for (int64_t t = block.first_frame + 1; t < block.end_frame; ++t) {
      Add(&mass, alpha_[t * stride_ + block.first_symbol]);
    }
    return mass;
  }

  void Leave(int64_t i, int64_t j) {
    const Block block = BlockAt(i, j);
    bool has_nan = false;
    for (int64_t t = block.first_frame; t < block.end_frame; ++t) {
      const bool is_last = t + 1 == frames_;
      for (int64_t u = block.first_symbol; u < block.end_symbol; ++u) {
        const int64_t cell = t * stride_ + u;
        const Score by_blank = alpha_[cell] + blank_[cell];
        has_nan |= std::isnan(by_blank);
        if (!is_last) {
          Add(alpha_ + cell + stride_, by_blank);
        } else if (u == labels_) {
          Add(&total_, by_blank);
        }
        if (u == labels_) continue;
        const Score by_label = alpha_[cell] + label_[cell];
        has_nan |= std::isnan(by_label);
        if constexpr (Traits::kLabelFrames == 0) {
          Add(alpha_ + cell + 1, by_label);
        } else if (!is_last) {
          Add(alpha_ + cell + stride_ + 1, by_label);
        } else if (Traits::kEndsWithLabel && u + 1 == labels_) {
          Add(&total_, by_label);
        }
      }
    }
    if (has_nan) total_ = kNaN;
  }

  void Add(Score* sum, Score term) const { *sum = FastLogAdd(softplus_, *sum, term); }

  const SoftplusTable& softplus_;
  const int64_t frames_, labels_, stride_, first_row_, wave_;
  const Score* blank_;
  const Score* label_;
  Score* alpha_;
  const int64_t num_symbol_blocks_;
  uint8_t* has_scores_;
  Score& total_;
  Score& left_out_;
  Score& largest_;
  int64_t& num_visited_;
};

// Calls f(Wave type, b) for the utterances; those of invalid lengths get NaN.
template <typename F>
void ForEachUtterance(const LatticeBatch& batch, const LatticeOptions& options, int num_threads,
                      const VisitState& state, F f) {
  const bool is_full =
      batch.band_start == nullptr && batch.windows == nullptr && batch.first_frame == nullptr;
  TRANSDUCER_CHECK(is_full, "only full lattices have blocks");
  TRANSDUCER_CHECK(!TraitsOf(options.topology).label_takes_blank, "no label may take a blank");
  CallWithTopology(options.topology, [&](auto topology) {
    ParallelFor(batch.num_utterances, num_threads, [&](int64_t b) {
      if (batch.IsValid(b)) {
        f(topology, b);
      } else {
        state.total[b] = state.left_out[b] = state.largest[b] = kNaN;
      }
    });
  });
}

}  // namespace

int64_t VisitWaveCpu(const LatticeBatch& batch, const LatticeOptions& options,
                     const LatticeScores& scores, const VisitLimits& limits, int64_t wave,
                     int num_threads, const VisitState& state, int64_t* rows) {
  // Each utterance lists its rows where its own rows are, as in KeptRowsCpu.
  int64_t* num_rows = state.num_listed;
  std::fill_n(num_rows, batch.num_utterances, int64_t{0});
  ForEachUtterance(batch, options, num_threads, state, [&](auto topology, int64_t b) {
    Wave<decltype(topology)::value> utterance(batch, scores, state, b, wave);
    int64_t* begin = rows + batch.first_row[b];
    num_rows[b] =
        utterance.Step(limits.threshold[b], limits.below_largest, limits.max_visited[b], begin) -
        begin;
  });
  int64_t sum = 0;
  for (int64_t b = 0; b < batch.num_utterances; ++b) {
    if (num_rows[b] == 0) continue;
    const int64_t* begin = rows + batch.first_row[b];
    std::copy(begin, begin + num_rows[b], rows + sum);
    sum += num_rows[b];
  }
  return sum;
}

void LeftOutCpu(const LatticeBatch& batch, const LatticeOptions& options,
                const LatticeScores& scores, int num_threads, const VisitState& state) {
  ForEachUtterance(batch, options, num_threads, state, [&](auto topology, int64_t b) {
    const int64_t num_waves =
        NumFrameBlocks(batch.num_frames[b]) + NumSymbolBlocks(batch.num_targets[b]) - 1;
    constexpr Score kNever = -kLogZero;
    for (int64_t wave = 0; wave <= num_waves; ++wave) {
      Wave<decltype(topology)::value>(batch, scores, state, b, wave)
          .Step(kNever, kNever, -1, nullptr);
    }
  });
}

}  // namespace transducer
