// SPDX-License-Identifier: Apache-2.0
// libFuzzer: every CPU stage on a batch made from raw bytes. csrc/tests/fuzz.sh builds and runs it.
//
// Half of the inputs have valid lengths. The other half has lengths, targets, bands and begins of
// any value, with rows laid out as by ops/lattice.py. The sanitizers check memory accesses (every
// array has its exact size). REQUIRE checks the contracts: which losses are NaN, the sums of
// posteriors, that every row of a gradient is written, and that results do not depend on the number
// of threads.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <vector>

#include "../cell_scores.h"
#include "../duration_lattice.h"
#include "../joint_tile.h"
#include "../lattice.h"
#include "../log_add.h"
#include "../logits_grad.h"
#include "../additive_scores.h"
#include "../occupancy.h"
#include "../parallel.h"
#include "../prune_windows.h"
#include "../row_kernels.h"
#include "../visit.h"

namespace transducer {
namespace {

#define REQUIRE(condition)                                                          \
  do {                                                                              \
    if (!(condition)) {                                                             \
      std::fprintf(stderr, "%s:%d: required %s\n", __FILE__, __LINE__, #condition); \
      std::abort();                                                                 \
    }                                                                               \
  } while (false)

// Numbers from the fuzzer's bytes; zeros when they are used up.
class Bytes {
 public:
  Bytes(const uint8_t* data, size_t size) : data_(data), size_(size) {}

  template <typename T>
  T Take() {
    T value{};
    const size_t count = std::min(sizeof(T), size_);
    std::memcpy(&value, data_, count);
    data_ += count;
    size_ -= count;
    return value;
  }
  int64_t Below(int64_t limit) { return Take<uint8_t>() % limit; }
  bool Flip() { return Take<uint8_t>() & 1; }

  // A number near the limits of the legal range, or any number.
  int64_t Wild(int64_t limit) {
    switch (Below(6)) {
      case 0: return Take<int64_t>();
      case 1: return Below(3) - 2;
      case 2: return limit + Below(3) - 1;
      case 3: return std::numeric_limits<int64_t>::max() - Below(2);
      default: return Below(limit + 1);
    }
  }

  // A logit: most are small, some are any bits of a float32.
  double Logit() {
    const uint8_t kind = Take<uint8_t>();
    if (kind < 240) return (kind - 120) / 8.0;
    if (kind < 246) return -std::numeric_limits<double>::infinity();
    return static_cast<double>(Take<float>());
  }

 private:
  const uint8_t* data_;
  size_t size_;
};

struct Problem {
  LatticeBatch batch{};
  std::vector<int64_t> num_frames, num_targets, first_row, targets, band_start, windows,
      first_frame;
  int64_t vocab_size = 0, blank = 0;
  bool from_log_softmax = false;
  LatticeOptions options;
  std::vector<double> logits;
};

int64_t Clamped(int64_t x, int64_t low, int64_t high) { return std::min(std::max(x, low), high); }

Problem MakeProblem(Bytes* bytes) {
  Problem p;
  const bool wild = bytes->Flip(), is_padded = bytes->Flip(), has_band = bytes->Flip();
  const bool has_begins = is_padded && bytes->Flip(), has_windows = bytes->Flip();
  const int64_t size = 1 + bytes->Below(3);
  const int64_t max_frames = 1 + bytes->Below(6), max_targets = bytes->Below(5);
  const int64_t width = has_band ? 1 + bytes->Below(max_targets + 1) : max_targets + 1;
  p.vocab_size = 1 + bytes->Below(20);
  p.blank = bytes->Below(p.vocab_size);
  p.from_log_softmax = bytes->Flip();
  p.options.topology = static_cast<Topology>(bytes->Below(kNumTopologies));
  p.options.delay_penalty = bytes->Below(3) * 0.25;
  p.options.fastemit_lambda = bytes->Below(3) * 0.5;
  int64_t rows = 0;
  for (int64_t b = 0; b < size; ++b) {
    int64_t frames = wild ? bytes->Wild(max_frames) : 1 + bytes->Below(max_frames);
    int64_t labels = wild ? bytes->Wild(max_targets) : bytes->Below(max_targets + 1);
    int64_t begin_frame = 0, begin_label = 0;
    if (has_begins) {
      begin_frame = wild ? bytes->Wild(max_frames) : bytes->Below(max_frames - frames + 1);
      begin_label = wild ? bytes->Wild(max_targets) : bytes->Below(max_targets - labels + 1);
      const bool fits = frames >= 0 && labels >= 0 && begin_frame >= 0 && begin_label >= 0 &&
                        begin_frame <= max_frames - frames && begin_label <= max_targets - labels;
      if (!fits) frames = -1;
    }
    p.num_frames.push_back(frames);
    p.num_targets.push_back(labels);
    p.first_frame.push_back(begin_frame);
    const int64_t stride = is_padded || has_band ? width : Clamped(labels, -1, max_targets) + 1;
    // Products as native.py forms them; unsigned, for two's complement whatever comes.
    const uint64_t shift = static_cast<uint64_t>(begin_frame) * static_cast<uint64_t>(stride) +
                           (has_band ? 0 : static_cast<uint64_t>(begin_label));
    const int64_t room = is_padded ? max_frames * width : Clamped(frames, 0, max_frames) * stride;
    p.first_row.push_back(static_cast<int64_t>(static_cast<uint64_t>(rows) + shift));
    rows += room;
    for (int64_t t = 0; t < max_frames && has_band; ++t) {
      const int64_t highest = std::max<int64_t>(0, max_targets + 1 - width);
      p.band_start.push_back(wild && bytes->Flip() ? bytes->Wild(max_targets)
                                                   : bytes->Below(highest + 1));
    }
    for (int64_t i = 0; i < 2 * max_frames && has_windows; ++i) {
      p.windows.push_back(wild && bytes->Flip() ? bytes->Wild(max_targets)
                                                : bytes->Below(max_targets + 2));
    }
    for (int64_t u = 0; u < max_targets; ++u) {
      const bool is_label = u < labels;
      p.targets.push_back(wild || !is_label ? bytes->Wild(p.vocab_size)
                                            : bytes->Below(p.vocab_size));
    }
  }
  p.batch = {size,
             max_frames,
             max_targets,
             rows,
             is_padded || has_band ? width : 0,
             is_padded ? max_frames * width : 0,
             p.num_frames.data(),
             p.num_targets.data(),
             p.first_row.data(),
             p.targets.data(),
             has_band ? p.band_start.data() : nullptr,
             has_windows ? p.windows.data() : nullptr,
             has_begins ? p.first_frame.data() : nullptr};
  for (int64_t i = 0; i < rows * p.vocab_size; ++i) p.logits.push_back(bytes->Logit());
  return p;
}

// The outputs of the stages for one number of threads.
struct Results {
  std::vector<Score> normalizer, blank, label, loss, use_blank, use_label, dropped;
  std::vector<int64_t> kept, num_kept;
};

template <typename T>
std::vector<T> Converted(const std::vector<double>& values) {
  std::vector<T> converted;
  for (const double value : values) {
    converted.push_back(FromCompute<T>(static_cast<Compute<T>>(value)));
  }
  return converted;
}

// No float32, because the fuzzer would find out that it may pass the number itself as a value.
constexpr Score kUnwritten = -12345.6789;

template <typename T>
Results Forward(const Problem& p, const std::vector<T>& logits, const RowTile& tile, int threads) {
  const size_t rows = static_cast<size_t>(p.batch.num_rows);
  const size_t size = static_cast<size_t>(p.batch.num_utterances);
  Results r;
  r.normalizer.assign(rows, 0);
  r.blank.assign(rows, 0);
  r.label.assign(rows, 0);
  CellScoresCpu<T>(p.batch, tile, {logits.data(), p.vocab_size, p.vocab_size},
                   {p.blank, p.from_log_softmax, 0}, threads,
                   {r.normalizer.data(), r.blank.data(), r.label.data()});
  r.loss.assign(size, kUnwritten);
  r.use_blank.assign(rows, 0);
  r.use_label.assign(rows, 0);
  const LatticeScores scores{r.blank.data(), r.label.data()};
  LatticeCpu(p.batch, p.options, scores, threads, nullptr,
             {r.loss.data(), r.use_blank.data(), r.use_label.data()});
  const int64_t num_bytes = LatticeScratchCpu(p.batch, p.options.topology, false);
  std::vector<char> scratch(static_cast<size_t>(num_bytes));
  std::vector<Score> loss_alone(size, kUnwritten);
  LatticeCpu(p.batch, p.options, scores, threads, scratch.data(),
             {loss_alone.data(), nullptr, nullptr});
  REQUIRE(std::memcmp(loss_alone.data(), r.loss.data(), size * sizeof(Score)) == 0);
  r.kept.assign(rows, 0);
  r.num_kept.assign(size, -1);
  r.dropped.assign(size, -1);
  std::vector<Score> lowest(size);
  int64_t found;
  KeptRowsCpu(p.batch, {r.use_blank.data(), r.use_label.data()}, 1e-3, threads, nullptr,
              {r.kept.data(), r.num_kept.data(), r.dropped.data(), lowest.data(), &found});
  int64_t total = 0;
  for (const int64_t count : r.num_kept) {
    REQUIRE(count >= 0);
    total += count;
  }
  REQUIRE(total <= p.batch.num_rows && found == total);
  r.kept.resize(static_cast<size_t>(total));
  for (size_t i = 0; i < r.kept.size(); ++i) {
    REQUIRE(r.kept[i] >= 0 && r.kept[i] < p.batch.num_rows);
    REQUIRE(i == 0 || r.kept[i - 1] < r.kept[i]);
  }
  return r;
}

template <typename A>
bool SameBits(const std::vector<A>& a, const std::vector<A>& b) {
  return a.size() == b.size() &&
         (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(A)) == 0);
}

bool SameBits(const Results& a, const Results& b) {
  return SameBits(a.normalizer, b.normalizer) && SameBits(a.blank, b.blank) &&
         SameBits(a.label, b.label) && SameBits(a.loss, b.loss) &&
         SameBits(a.use_blank, b.use_blank) && SameBits(a.use_label, b.use_label) &&
         SameBits(a.dropped, b.dropped) && SameBits(a.kept, b.kept) &&
         SameBits(a.num_kept, b.num_kept);
}

// The loss by the definition, from the scores of the stage before; NaN as lattice.h has it.
Score PlainLoss(const Problem& p, const Results& r, int64_t b) {
  const LatticeBatch& batch = p.batch;
  const int64_t frames = batch.num_frames[b], labels = batch.num_targets[b];
  const auto has = [&](int64_t t, int64_t u) {
    return t < frames && u >= batch.ColumnBegin(b, t) && u < batch.ColumnEnd(b, t);
  };
  std::vector<Score> alpha(static_cast<size_t>((frames + 1) * (labels + 2)), kLogZero);
  const auto at = [&](int64_t t, int64_t u) -> Score& { return alpha[t * (labels + 2) + u]; };
  const int64_t first_frame = batch.first_frame != nullptr ? batch.first_frame[b] : 0;
  const Score middle = 0.5 * static_cast<Score>(frames - 1 - first_frame);
  const TopologyTraits& traits = TraitsOf(p.options.topology);
  bool has_nan = false;
  at(0, 0) = has(0, 0) ? 0 : kLogZero;
  for (int64_t t = 0; t < frames; ++t) {
    for (int64_t u = 0; u <= labels; ++u) {
      if (!has(t, u)) continue;
      const int64_t row = batch.Row(b, t, u);
      const bool is_last = t + 1 == frames;
      bool has_label = u < labels;
      if (has_label && !p.windows.empty()) {
        has_label = u + 1 < p.windows[2 * (b * batch.max_frames + t) + 1];
      }
      has_nan |= std::isnan(r.blank[row]) || (has_label && std::isnan(r.label[row]));
      if (is_last ? u == labels : has(t + 1, u)) {
        at(t + 1, u) = LogAdd(at(t + 1, u), at(t, u) + r.blank[row]);
      }
      if (!has_label) continue;
      Score score = r.label[row] + p.options.delay_penalty * (middle - static_cast<Score>(t));
      if (traits.label_frames == 0) {
        if (has(t, u + 1)) at(t, u + 1) = LogAdd(at(t, u + 1), at(t, u) + score);
        continue;
      }
      if (traits.label_takes_blank) {
        score += has(t, u + 1) ? r.blank[batch.Row(b, t, u + 1)] : kLogZero;
      }
      const bool may_end = u + 1 == labels && traits.ends_with_label;
      if (is_last ? may_end : has(t + 1, u + 1)) {
        at(t + 1, u + 1) = LogAdd(at(t + 1, u + 1), at(t, u) + score);
      }
    }
  }
  return has_nan ? kNaN : -at(frames, labels);
}

void CheckLosses(const Problem& p, const Results& r) {
  const LatticeBatch& batch = p.batch;
  for (int64_t b = 0; b < batch.num_utterances; ++b) {
    if (!batch.IsValid(b)) {
      REQUIRE(std::isnan(r.loss[b]));
      continue;
    }
    const Score expected = PlainLoss(p, r, b);
    if (std::isnan(expected)) {
      REQUIRE(std::isnan(r.loss[b]));
      continue;
    }
    const Score size = std::abs(expected);
    Score largest = 0;
    for (const auto& scores : {r.blank, r.label}) {
      for (const Score score : scores) {
        if (std::isfinite(score)) largest = std::max(largest, std::abs(score));
      }
    }
    REQUIRE(expected == r.loss[b] || std::abs(expected - r.loss[b]) <= 1e-9 * (1 + size + largest));
    if (!(size < 1e4 && largest < 1e6)) continue;
    // Every path leaves each frame once; labels are used U times (scaled by fastemit).
    Score labels = 0;
    for (int64_t t = 0; t < batch.num_frames[b]; ++t) {
      for (int64_t u = batch.ColumnBegin(b, t); u < batch.ColumnEnd(b, t); ++u) {
        const int64_t row = batch.Row(b, t, u);
        REQUIRE(r.use_blank[row] >= 0 && r.use_label[row] >= 0);
        labels += r.use_label[row];
      }
    }
    const Score wanted = (1 + p.options.fastemit_lambda) * static_cast<Score>(batch.num_targets[b]);
    REQUIRE(std::abs(labels - wanted) <= 1e-6 * (1 + wanted));
  }
}

template <typename T>
void Backward(const Problem& p, const std::vector<T>& logits, const Results& r, double clamp,
              const std::vector<Score>& loss_grad) {
  const T unwritten = FromCompute<T>(static_cast<Compute<T>>(kUnwritten));
  const LogitsOptions options{p.blank, p.from_log_softmax, clamp, 0, 0};
  const Posteriors posteriors{r.normalizer.data(), r.use_blank.data(), r.use_label.data(),
                              loss_grad.data()};
  std::vector<T> first;
  for (const int threads : {1, 2}) {
    std::vector<T> grad(logits.size(), unwritten);
    LogitsGradCpu<T>(p.batch, {nullptr, 0, p.batch.num_rows},
                     {logits.data(), p.vocab_size, p.vocab_size}, options, posteriors, threads,
                     grad.data());
    for (const T g : grad) REQUIRE(std::memcmp(&g, &unwritten, sizeof(T)) != 0);
    if (threads == 1) first = grad;
    REQUIRE(SameBits(first, grad));
  }
  // A list of rows, in place, gives the same rows.
  const size_t num_kept = r.kept.size(), vocab = static_cast<size_t>(p.vocab_size);
  std::vector<T> some(num_kept * vocab);
  for (size_t i = 0; i < num_kept; ++i) {
    std::memcpy(some.data() + i * vocab, logits.data() + r.kept[i] * p.vocab_size,
                vocab * sizeof(T));
  }
  LogitsGradCpu<T>(p.batch, {r.kept.data(), 0, static_cast<int64_t>(num_kept)},
                   {some.data(), p.vocab_size, p.vocab_size}, options, posteriors, 1, some.data());
  // And so do these rows of logits that stay where they are.
  std::vector<T> of_whole(some.size());
  LogitsGradCpu<T>(p.batch, {r.kept.data(), 0, static_cast<int64_t>(num_kept), true},
                   {logits.data(), p.vocab_size, p.vocab_size}, options, posteriors, 1,
                   of_whole.data());
  REQUIRE(SameBits(some, of_whole));
  for (size_t i = 0; i < num_kept; ++i) {
    REQUIRE(std::memcmp(some.data() + i * vocab, first.data() + r.kept[i] * p.vocab_size,
                        vocab * sizeof(T)) == 0);
  }
}

// Arcs of TDT or multi-blank, their logits in rows with a pitch, and the results of stages 1 and 2.
struct DurationProblem {
  LogitsOptions options;
  DurationArcs arcs;
  int64_t pitch;
  std::vector<double> logits;
};

struct DurationResults {
  std::vector<Score> normalizer, blank, label, extra, loss, by_blank, by_label, use_blank,
      use_label;
};

DurationProblem MakeDurations(const Problem& p, Bytes* bytes) {
  DurationProblem d{{p.blank, p.from_log_softmax, 0, 0, 0}, {0, 0, {}, {}}, 0, {}};
  if (p.vocab_size > 1 && bytes->Flip()) {
    const int64_t most = std::min<int64_t>(p.vocab_size - 1, kMaxBigBlanks);
    d.options.num_big_blanks = 1 + bytes->Below(most);
    d.arcs.num_blank = static_cast<int>(1 + d.options.num_big_blanks);
    d.arcs.num_label = 1;
    d.arcs.blank_frames[0] = 1;
    for (int k = 1; k < d.arcs.num_blank; ++k) {
      d.arcs.blank_frames[k] = static_cast<int>(2 + bytes->Below(6));
    }
  } else {
    int frames = static_cast<int>(bytes->Below(3));
    const int count = static_cast<int>(1 + bytes->Below(5));
    for (int k = 0; k < count || d.arcs.num_blank == 0; ++k) {
      d.arcs.label_frames[d.arcs.num_label++] = frames;
      if (frames > 0) d.arcs.blank_frames[d.arcs.num_blank++] = frames;
      frames += static_cast<int>(1 + bytes->Below(3));
    }
    d.options.num_durations = d.arcs.num_label;
  }
  d.pitch = p.vocab_size + d.options.num_durations + bytes->Below(3);
  for (int64_t i = 0; i < p.batch.num_rows * d.pitch; ++i) d.logits.push_back(bytes->Logit());
  return d;
}

template <typename T>
DurationResults Forward(const Problem& p, const DurationProblem& d, const std::vector<T>& logits,
                        int threads) {
  const LatticeBatch& batch = p.batch;
  const int64_t rows = batch.num_rows, num_extra = d.options.NumExtra();
  DurationResults r;
  for (auto* scores : {&r.normalizer, &r.blank, &r.label}) {
    scores->assign(static_cast<size_t>(rows), 0);
  }
  r.extra.assign(static_cast<size_t>(rows * num_extra), 0);
  CellScoresCpu<T>(batch, {nullptr, 0, rows}, {logits.data(), p.vocab_size, d.pitch}, d.options,
                   threads, {r.normalizer.data(), r.blank.data(), r.label.data(), r.extra.data()});
  const bool is_tdt = d.options.num_durations > 0;
  for (int64_t row = 0; row < rows; ++row) {
    const Score* extra = r.extra.data() + row * num_extra;
    for (int k = 0; k < d.arcs.num_blank; ++k) {
      const Score of_tdt = is_tdt ? r.blank[row] + extra[num_extra - d.arcs.num_blank + k] : 0;
      r.by_blank.push_back(is_tdt ? of_tdt : k > 0 ? extra[k - 1] : r.blank[row]);
    }
    for (int k = 0; k < d.arcs.num_label; ++k) {
      r.by_label.push_back(r.label[row] + (is_tdt ? extra[k] : 0));
    }
  }
  const ArcScores scores{r.by_blank.data(), r.by_label.data()};
  r.use_blank.assign(r.by_blank.size(), 0);
  r.use_label.assign(r.by_label.size(), 0);
  r.loss.assign(static_cast<size_t>(batch.num_utterances), kUnwritten);
  std::vector<Score> loss_alone = r.loss;
  std::vector<char> scratch(static_cast<size_t>(DurationLatticeScratch(batch, true)));
  DurationLatticeCpu(batch, p.options, d.arcs, scores, threads, scratch.data(),
                     {r.loss.data(), r.use_blank.data(), r.use_label.data()});
  scratch.assign(static_cast<size_t>(DurationLatticeScratch(batch, false)), 0);
  scratch.shrink_to_fit();
  DurationLatticeCpu(batch, p.options, d.arcs, scores, threads, scratch.data(),
                     {loss_alone.data(), nullptr, nullptr});
  REQUIRE(SameBits(r.loss, loss_alone));
  return r;
}

// Losses against the definition; every path has U labels and T frames.
void CheckLosses(const Problem& p, const DurationProblem& d, const DurationResults& r) {
  const LatticeBatch& batch = p.batch;
  for (int64_t b = 0; b < batch.num_utterances; ++b) {
    if (!batch.IsValid(b)) {
      REQUIRE(std::isnan(r.loss[b]));
      continue;
    }
    const int64_t frames = batch.num_frames[b], labels = batch.num_targets[b], width = labels + 1;
    const auto has = [&](int64_t t, int64_t u) {
      return t < frames && u >= batch.ColumnBegin(b, t) && u < batch.ColumnEnd(b, t);
    };
    const int64_t first_frame = batch.first_frame != nullptr ? batch.first_frame[b] : 0;
    const Score middle = 0.5 * static_cast<Score>(frames - 1 - first_frame);
    std::vector<Score> alpha(static_cast<size_t>(frames * width), kLogZero);
    if (has(0, 0)) alpha[0] = 0;
    Score end = kLogZero, largest = 0, sum_labels = 0, sum_frames = 0;
    bool has_nan = false;
    for (int64_t t = 0; t < frames; ++t) {
      for (int64_t u = batch.ColumnBegin(b, t); u < batch.ColumnEnd(b, t); ++u) {
        const int64_t row = batch.Row(b, t, u);
        const auto pass = [&](Score score, int64_t to, int64_t next) {
          has_nan |= std::isnan(score);
          if (std::isfinite(score)) largest = std::max(largest, std::abs(score));
          const bool is_end = to == frames && next == u && u == labels;
          if (!is_end && !has(to, next)) return;
          Score& there = is_end ? end : alpha[to * width + next];
          there = LogAdd(there, alpha[t * width + u] + score);
        };
        for (int k = 0; k < d.arcs.num_blank; ++k) {
          const int64_t i = row * d.arcs.num_blank + k;
          pass(r.by_blank[i], t + d.arcs.blank_frames[k], u);
          sum_frames += d.arcs.blank_frames[k] * r.use_blank[i];
        }
        bool has_label = u < labels;
        if (has_label && !p.windows.empty()) {
          has_label = u + 1 < p.windows[2 * (b * batch.max_frames + t) + 1];
        }
        for (int k = 0; k < d.arcs.num_label && has_label; ++k) {
          const int64_t i = row * d.arcs.num_label + k;
          const Score penalty = p.options.delay_penalty * (middle - static_cast<Score>(t));
          pass(r.by_label[i] + penalty, t + d.arcs.label_frames[k], u + 1);
          const Score use = r.use_label[i] / (1 + p.options.fastemit_lambda);
          sum_labels += use;
          sum_frames += d.arcs.label_frames[k] * use;
        }
      }
    }
    if (has_nan) {
      REQUIRE(std::isnan(r.loss[b]));
      continue;
    }
    const Score size = std::abs(end);
    REQUIRE(-end == r.loss[b] || std::abs(end + r.loss[b]) <= 1e-9 * (1 + size + largest));
    if (!(size < 1e4 && largest < 1e6)) continue;
    REQUIRE(std::abs(sum_labels - static_cast<Score>(labels)) <= 1e-6 * (1 + sum_labels));
    REQUIRE(std::abs(sum_frames - static_cast<Score>(frames)) <= 1e-6 * (1 + sum_frames));
  }
}

template <typename T>
void RunDurations(const Problem& p, Bytes* bytes) {
  DurationProblem d = MakeDurations(p, bytes);
  const auto logits = Converted<T>(d.logits);
  const DurationResults r = Forward(p, d, logits, 1), other = Forward(p, d, logits, 2);
  REQUIRE(SameBits(r.normalizer, other.normalizer) && SameBits(r.extra, other.extra));
  REQUIRE(SameBits(r.blank, other.blank) && SameBits(r.label, other.label));
  REQUIRE(SameBits(r.loss, other.loss));
  REQUIRE(SameBits(r.use_blank, other.use_blank) && SameBits(r.use_label, other.use_label));
  CheckLosses(p, d, r);

  const int64_t rows = p.batch.num_rows, num_extra = d.options.NumExtra();
  std::vector<Score> use_blank(static_cast<size_t>(rows)), use_label = use_blank, loss_grad;
  std::vector<Score> use_extra(static_cast<size_t>(rows * num_extra));
  for (int64_t row = 0; row < rows; ++row) {
    for (int k = 0; k < d.arcs.num_blank; ++k) {
      const Score use = r.use_blank[row * d.arcs.num_blank + k];
      const bool is_tdt = d.options.num_durations > 0;
      if (is_tdt || k == 0) use_blank[row] += use;
      const int64_t i = is_tdt ? num_extra - d.arcs.num_blank + k : k - 1;
      if (i >= 0) use_extra[row * num_extra + i] += use;
    }
    for (int k = 0; k < d.arcs.num_label; ++k) {
      const Score use = r.use_label[row * d.arcs.num_label + k];
      use_label[row] += use;
      if (d.options.num_durations > 0) use_extra[row * num_extra + k] += use;
    }
  }
  for (int64_t b = 0; b < p.batch.num_utterances; ++b) {
    loss_grad.push_back(static_cast<Score>(bytes->Below(5)) - 2);
  }
  d.options.clamp = static_cast<double>(bytes->Below(3)) * 0.1;
  const Posteriors posteriors{r.normalizer.data(), use_blank.data(), use_label.data(),
                              loss_grad.data(), use_extra.data()};
  const T unwritten = FromCompute<T>(static_cast<Compute<T>>(kUnwritten));
  std::vector<T> grads[2];
  for (const int threads : {1, 2}) {
    auto& grad = grads[threads - 1];
    grad.assign(logits.size(), unwritten);
    LogitsGradCpu<T>(p.batch, {nullptr, 0, rows}, {logits.data(), p.vocab_size, d.pitch}, d.options,
                     posteriors, threads, grad.data());
  }
  REQUIRE(SameBits(grads[0], grads[1]));
  for (size_t i = 0; i < logits.size(); ++i) {
    const bool is_read = static_cast<int64_t>(i) % d.pitch < p.vocab_size + d.options.num_durations;
    REQUIRE((std::memcmp(&grads[0][i], &unwritten, sizeof(T)) != 0) == is_read);
  }
}

template <typename T>
void Join(const Problem& p, Bytes* bytes) {
  const LatticeBatch& batch = p.batch;
  const int64_t width = 1 + bytes->Below(9);
  const auto activation = static_cast<Activation>(bytes->Below(5));
  std::vector<double> values;
  const int64_t num_enc = batch.num_utterances * batch.max_frames * width;
  const int64_t num_pred = batch.num_utterances * (batch.max_targets + 1) * width;
  for (int64_t i = 0; i < num_enc + num_pred; ++i) values.push_back(bytes->Logit());
  const auto both = Converted<T>(values);
  const std::vector<T> enc(both.begin(), both.begin() + num_enc);
  const std::vector<T> pred(both.begin() + num_enc, both.end());
  const RowTile tile{nullptr, 0, batch.num_rows};
  std::vector<T> hidden(static_cast<size_t>(batch.num_rows * width));
  std::vector<Compute<T>> grads[2][2];
  for (const int threads : {1, 2}) {
    auto& grad_enc = grads[threads - 1][0];
    auto& grad_pred = grads[threads - 1][1];
    grad_enc.assign(enc.size(), 0);
    grad_pred.assign(pred.size(), 0);
    const JoinInputs<T> inputs{enc.data(), pred.data(), width, activation};
    JoinForwardCpu(batch, tile, inputs, threads, hidden.data());
    JoinBackwardCpu<T>(batch, tile, inputs, hidden.data(), hidden.data(), threads, nullptr,
                       {grad_enc.data(), grad_pred.data()});
  }
  REQUIRE(SameBits(grads[0][0], grads[1][0]) && SameBits(grads[0][1], grads[1][1]));
}

template <typename T>
void Run(const Problem& p, Bytes* bytes) {
  const auto logits = Converted<T>(p.logits);
  const RowTile all{nullptr, 0, p.batch.num_rows};
  const Results one = Forward(p, logits, all, 1);
  REQUIRE(SameBits(one, Forward(p, logits, all, 2)));
  CheckLosses(p, one);
  std::vector<Score> loss_grad;
  for (int64_t b = 0; b < p.batch.num_utterances; ++b) {
    loss_grad.push_back(static_cast<Score>(bytes->Below(5)) - 2);
  }
  Backward(p, logits, one, static_cast<double>(bytes->Below(3)) * 0.1, loss_grad);
  Join<T>(p, bytes);
}

// The stages of 8-bit products: any bits in enc, pred, scales and bias, any integers as logits.
void Quantized(const Problem& p, Bytes* bytes) {
  const LatticeBatch& batch = p.batch;
  const int64_t width = 1 + bytes->Below(70), rows = batch.num_rows, vocab = p.vocab_size;
  const auto activation = static_cast<Activation>(bytes->Below(5));
  const auto values = [&](int64_t count) {
    std::vector<double> result;
    for (int64_t i = 0; i < count; ++i) result.push_back(bytes->Logit());
    return Converted<float>(result);
  };
  const auto enc = values(batch.num_utterances * batch.max_frames * width);
  const auto pred = values(batch.num_utterances * (batch.max_targets + 1) * width);
  const JoinInputs<float> inputs{enc.data(), pred.data(), width, activation};
  const RowTile tile{nullptr, 0, rows};
  std::vector<float> exact(static_cast<size_t>(rows * width)), scales[2];
  JoinForwardCpu(batch, tile, inputs, 1, exact.data());
  std::vector<int8_t> hidden[2];
  for (const int i : {0, 1}) {
    hidden[i].assign(exact.size(), 99);
    scales[i].assign(static_cast<size_t>(rows), -1.0f);
    JoinQuantizedCpu(batch, tile, inputs, i + 1, hidden[i].data(), scales[i].data());
  }
  REQUIRE(SameBits(hidden[0], hidden[1]) && SameBits(scales[0], scales[1]));
  for (int64_t row = 0; row < rows; ++row) {
    const float* x = exact.data() + row * width;
    const float scale = scales[0][row];
    REQUIRE(std::all_of(x, x + width, [](float y) { return std::isfinite(y); }) ==
            !std::isnan(scale));
    for (int64_t d = 0; d < width && scale >= 0; ++d) {
      // Rows below 1e-30 are rounded to zero.
      const double y = static_cast<double>(hidden[0][row * width + d]) * scale;
      const double slack = activation == Activation::kTanh ? 3e-4 : 1e-30;
      REQUIRE(std::abs(y - x[d]) <= 0.501 * scale + slack);
    }
    REQUIRE(scale >= 0 || std::isnan(scale));
  }

  std::vector<int32_t> products;
  for (int64_t i = 0; i < rows * vocab; ++i) {
    products.push_back(bytes->Flip() ? bytes->Take<int16_t>() : bytes->Take<int32_t>());
  }
  const auto columns = values(vocab), bias = values(vocab);
  const float* offset = bytes->Flip() ? bias.data() : nullptr;
  const LogitsOptions options{p.blank, false, 0};
  std::vector<Score> scores[3][3];
  for (auto& of_one : scores) {
    for (auto& part : of_one) part.assign(static_cast<size_t>(rows), kUnwritten);
  }
  for (const int i : {0, 1}) {
    QuantizedCellScoresCpu(
        batch, tile, {products.data(), scales[0].data(), columns.data(), offset, vocab, vocab},
        options, i + 1, {scores[i][0].data(), scores[i][1].data(), scores[i][2].data()});
  }
  std::vector<float> logits;
  std::vector<double> room;         // of each row: rounding of its largest logit
  ParallelFor(1, 1, [&](int64_t) {  // takes subnormals for zeros, as the stages do
    for (int64_t row = 0; row < rows; ++row) {
      const QuantizedRow x{products.data() + row * vocab, scales[0][row], columns.data(), offset};
      double largest = 0;
      for (int64_t i = 0; i < vocab; ++i) {
        logits.push_back(x[i]);
        const double added = offset != nullptr ? std::abs(offset[i]) : 0;
        if (std::isfinite(added)) largest = std::max(largest, added);
        if (std::isfinite(x[i]))
          largest = std::max(largest, std::abs(static_cast<double>(x[i])) + added);
      }
      room.push_back(2e-4 + 1e-6 * largest);
    }
  });
  CellScoresCpu<float>(batch, tile, {logits.data(), vocab, vocab}, options, 1,
                       {scores[2][0].data(), scores[2][1].data(), scores[2][2].data()});
  for (int k = 0; k < 3; ++k) {
    REQUIRE(SameBits(scores[0][k], scores[1][k]));
    for (int64_t row = 0; row < rows; ++row) {
      const Score mine = scores[0][k][row], exact = scores[2][k][row];
      const bool is_same = mine == exact || (std::isnan(mine) && std::isnan(exact));
      const bool may_be_nan = room[row] > 10;  // logits above 1e7
      REQUIRE(is_same || (may_be_nan && std::isnan(mine)) || std::abs(mine - exact) <= room[row]);
    }
  }
}

// An additive joiner: any bits in am and lm.
template <typename T>
void Repair(Bytes* bytes) {
  const int64_t size = 1 + bytes->Below(2), frames = 1 + bytes->Below(4);
  const int64_t columns = 1 + bytes->Below(4), vocab = 1 + bytes->Below(40);
  std::vector<T> am, lm, product;
  std::vector<Score> grad;
  for (int64_t i = 0; i < size * frames * vocab; ++i) am.push_back(static_cast<T>(bytes->Logit()));
  for (int64_t i = 0; i < size * columns * vocab; ++i) lm.push_back(static_cast<T>(bytes->Logit()));
  for (int64_t i = 0; i < size * frames * columns; ++i) {
    // A stage takes subnormals for zeros, and a comparison out here does not.
    const T value = static_cast<T>(bytes->Logit());
    product.push_back(std::abs(value) < std::numeric_limits<T>::min() ? T(0) : value);
    grad.push_back(bytes->Logit());
  }
  const AdditiveCells<T> cells{size,      frames,    columns,        vocab,
                               am.data(), lm.data(), product.data(), T(0)};
  std::vector<Score> normalizer[2];
  std::vector<T> grad_am[2], grad_lm[2];
  for (const int threads : {1, 2}) {
    const int i = threads - 1;
    normalizer[i].assign(product.size(), kUnwritten);
    RepairNormalizerCpu(cells, threads, normalizer[i].data());
    grad_am[i].assign(am.size(), 0);
    grad_lm[i].assign(lm.size(), 0);
    RepairNormalizerBackwardCpu(cells, normalizer[i].data(), grad.data(), threads,
                                grad_am[i].data(), grad_lm[i].data());
  }
  for (size_t i = 0; i < product.size(); ++i) {
    REQUIRE((product[i] < 0) == (normalizer[0][i] != kUnwritten));
  }
  REQUIRE(SameBits(normalizer[0], normalizer[1]));
  REQUIRE(SameBits(grad_am[0], grad_am[1]) && SameBits(grad_lm[0], grad_lm[1]));
}

// Its scores and their gradients: any bits, every sum the same on two threads.
template <typename T>
void Additive(Bytes* bytes) {
  const int64_t size = 1 + bytes->Below(3), frames = 1 + bytes->Below(5);
  const int64_t symbols = bytes->Below(5), vocab = 1 + bytes->Below(40);
  const double combined_scale = 0.5 * static_cast<double>(bytes->Below(3));
  const double lm_only_scale = 0.25 * static_cast<double>(bytes->Below(2));
  const double am_only_scale = 0.25 * static_cast<double>(bytes->Below(2));
  const int64_t columns = symbols + 1 + (am_only_scale != 0);
  const auto values = [&](int64_t count) {
    std::vector<double> result;
    for (int64_t i = 0; i < count; ++i) result.push_back(bytes->Logit());
    return result;
  };
  const auto am = Converted<T>(values(size * frames * vocab));
  const auto lm = Converted<T>(values(size * columns * vocab));
  const auto product = Converted<T>(values(size * frames * columns));
  const std::vector<Score> grad_blank = values(size * frames * (symbols + 1));
  const std::vector<Score> grad_label = values(size * frames * (symbols + 1));
  const std::vector<Score> factor = values(size);
  std::vector<int64_t> symbol, boundary;
  for (int64_t i = 0; i < size * symbols; ++i) symbol.push_back(bytes->Below(vocab + 2) - 1);
  for (int64_t i = 0; i < size * 4; ++i) boundary.push_back(bytes->Below(8) - 1);
  const AdditiveCells<T> cells{size,      frames,    columns,        vocab,
                               am.data(), lm.data(), product.data(), T(1e-3)};
  const AdditiveTerms terms{symbols,        symbol.data(), boundary.data(), bytes->Below(vocab),
                            combined_scale, lm_only_scale, am_only_scale};
  std::vector<Score> scores[2][3], grads[2];
  std::vector<T> of_products[2][3];
  std::vector<int64_t> lattices[2];
  for (const int threads : {1, 2}) {
    const int i = threads - 1;
    std::vector<T> am_exp(am.size()), lm_exp(lm.size());
    std::vector<T> am_max(static_cast<size_t>(size * frames));
    std::vector<T> lm_max(static_cast<size_t>(size * columns));
    std::vector<Score> lm_sum(lm_max.size()), of_blank(lm_max.size()), of_label(lm_max.size());
    lattices[i].assign(static_cast<size_t>(4 * size), 0);
    const AdditiveExponentials<T> exps{am_exp.data(), lm_exp.data(), am_max.data(), lm_max.data(),
                                       lm_sum.data()};
    const AdditiveContexts contexts{of_blank.data(), of_label.data(), lattices[i].data()};
    AdditiveExponentialsCpu(cells, terms, threads, exps, contexts);
    for (size_t row = 0; row < am_max.size(); ++row) {
      const auto begin = am_exp.begin() + static_cast<int64_t>(row) * vocab;
      const bool has_nan = std::any_of(begin, begin + vocab, [](T x) { return std::isnan(x); });
      const bool are_at_most_1 =
          std::all_of(begin, begin + vocab, [](T x) { return x >= 0 && x <= 1; });
      REQUIRE(has_nan || are_at_most_1);
    }
    scores[i][0].assign(product.size(), kUnwritten);
    scores[i][1].assign(grad_blank.size(), kUnwritten);
    scores[i][2].assign(grad_label.size(), kUnwritten);
    AdditiveScoresCpu(cells, terms, exps, contexts, threads,
                      {scores[i][0].data(), scores[i][1].data(), scores[i][2].data()});
    grads[i].assign(product.size(), kUnwritten);
    of_products[i][0].assign(product.size(), T(1));
    of_products[i][1].assign(am.size(), T(1));
    of_products[i][2].assign(lm.size(), T(1));
    const AdditiveScoreGrads upstream{grad_blank.data(), grad_label.data(), factor.data()};
    AdditiveWeightsCpu(cells, terms, upstream, threads, grads[i].data(), of_products[i][0].data());
    AdditiveGradientsCpu<T>(cells, terms, exps, upstream, {scores[i][0].data(), grads[i].data()},
                            threads, of_products[i][1].data(), of_products[i][2].data());
  }
  REQUIRE(lattices[0] == lattices[1] && SameBits(grads[0], grads[1]));
  for (const Score value : grads[0]) REQUIRE(value != kUnwritten);
  for (int k = 0; k < 3; ++k) {
    REQUIRE(SameBits(scores[0][k], scores[1][k]));
    REQUIRE(SameBits(of_products[0][k], of_products[1][k]));
    for (const Score value : scores[0][k]) REQUIRE(value != kUnwritten);
  }
}

// Windows for the pruned loss: posteriors of any bits give runs of columns, the same on two threads.
template <typename T>
void Prune(Bytes* bytes) {
  const int64_t size = 1 + bytes->Below(3), frames = 1 + bytes->Below(9);
  const int64_t symbols = bytes->Below(7), px_frames = frames + bytes->Below(2);
  const int64_t width = 1 + bytes->Below(symbols + 1), step = bytes->Below(width + 1);
  std::vector<double> px, py;
  for (int64_t i = 0; i < size * symbols * px_frames; ++i) px.push_back(bytes->Logit());
  for (int64_t i = 0; i < size * (symbols + 1) * frames; ++i) py.push_back(bytes->Logit());
  const auto px_grad = Converted<T>(px), py_grad = Converted<T>(py);
  std::vector<int64_t> boundary;
  for (int64_t b = 0; b < size; ++b) {
    const int64_t s_end = bytes->Below(symbols + 1), t_end = 1 + bytes->Below(frames);
    boundary.insert(boundary.end(), {bytes->Below(s_end + 1), bytes->Below(t_end), s_end, t_end});
  }
  std::vector<int64_t> ranges[2];
  for (const int threads : {1, 2}) {
    ranges[threads - 1].assign(static_cast<size_t>(size * frames * width), -1);
    PruneWindowsCpu<T>({size, symbols, frames, px_frames, px_grad.data(), py_grad.data(),
                        boundary.data()},
                       {width, step}, threads, ranges[threads - 1].data());
  }
  REQUIRE(ranges[0] == ranges[1]);
  for (size_t i = 0; i < ranges[0].size(); ++i) {
    REQUIRE(ranges[0][i] >= 0 && ranges[0][i] <= symbols);
    REQUIRE(i % static_cast<size_t>(width) == 0 || ranges[0][i] == ranges[0][i - 1] + 1);
  }
}

// The results of two sweeps through the blocks of a batch.
struct Visits {
  std::vector<uint8_t> has_scores;
  std::vector<int64_t> num_visited, listed, rows;
  std::vector<Score> alpha, total, left_out, largest, blank, label;

  VisitState State() {
    return {has_scores.data(), num_visited.data(), alpha.data(),  total.data(),
            left_out.data(),   listed.data(),      largest.data()};
  }
};

// The scores of a row are NaN until the row is listed: no others may be read.
Visits RunVisits(const Problem& p, const std::vector<Score>& blank, const std::vector<Score>& label,
                 double below_largest, double threshold, int64_t max_visited, int threads) {
  const int64_t frame_blocks = NumFrameBlocks(p.batch.max_frames);
  const int64_t symbol_blocks = NumSymbolBlocks(p.batch.max_targets);
  const size_t size = p.num_frames.size(), rows = blank.size();
  Visits v;
  v.has_scores.assign(size * static_cast<size_t>(frame_blocks * symbol_blocks), 0);
  v.num_visited.assign(size, 0);
  v.listed.assign(size, 0);
  v.rows.assign(rows, -1);
  v.alpha.assign(rows, kNaN);
  v.total = v.left_out = v.largest = std::vector<Score>(size, kNaN);
  v.blank = v.label = std::vector<Score>(rows, kNaN);
  const std::vector<int64_t> most(size, max_visited);
  const LatticeScores scores{v.blank.data(), v.label.data()};
  for (const bool is_second : {false, true}) {
    std::vector<Score> thresholds(size, is_second ? threshold : kLogZero);
    const VisitLimits limits{thresholds.data(), is_second ? -kLogZero : below_largest, most.data()};
    for (int64_t wave = 0; wave < frame_blocks + symbol_blocks; ++wave) {
      const int64_t found =
          VisitWaveCpu(p.batch, p.options, scores, limits, wave, threads, v.State(), v.rows.data());
      REQUIRE(found >= 0 && found <= p.batch.num_rows);
      for (int64_t i = 0; i < found; ++i) {
        const int64_t row = v.rows[static_cast<size_t>(i)];
        REQUIRE(row >= 0 && row < p.batch.num_rows);
        REQUIRE(i == 0 || v.rows[static_cast<size_t>(i) - 1] < row);
        const size_t at = static_cast<size_t>(row);
        REQUIRE(std::isnan(v.blank[at]));  // listed once
        v.blank[at] = blank[at];
        v.label[at] = label[at];
      }
    }
  }
  return v;
}

void Visit(Bytes* bytes) {
  Problem p;
  const bool wild = bytes->Flip();
  const int64_t size = 1 + bytes->Below(3);
  const int64_t max_frames = 1 + bytes->Below(70), max_targets = bytes->Below(14);
  constexpr Topology kTopologies[] = {Topology::kRegular, Topology::kModified,
                                      Topology::kOneSymPerFrame};
  p.options.topology = kTopologies[bytes->Below(3)];
  int64_t rows = 0;
  for (int64_t b = 0; b < size; ++b) {
    p.num_frames.push_back(wild ? bytes->Wild(max_frames) : 1 + bytes->Below(max_frames));
    p.num_targets.push_back(wild ? bytes->Wild(max_targets) : bytes->Below(max_targets + 1));
    p.first_row.push_back(rows);
    rows += Clamped(p.num_frames.back(), 0, max_frames) *
            (Clamped(p.num_targets.back(), -1, max_targets) + 1);
  }
  p.targets.assign(static_cast<size_t>(size * max_targets), 0);
  p.batch = {size,
             max_frames,
             max_targets,
             rows,
             0,
             0,
             p.num_frames.data(),
             p.num_targets.data(),
             p.first_row.data(),
             p.targets.data()};
  const double below_largest = bytes->Below(60), threshold = -4.0 * bytes->Below(200);
  const int64_t max_visited = bytes->Flip() ? rows : bytes->Below(200);
  // Scores below log(1/2), because the probabilities of a cell's blank and label add up to at most 1.
  // They are repeated, because the fuzzer has few bytes.
  std::vector<Score> some;
  for (int64_t i = 0; i < 61; ++i) some.push_back(-std::fabs(bytes->Logit()) - 0.7);
  std::vector<Score> blank, label;
  for (int64_t row = 0; row < rows; ++row) {
    blank.push_back(some[static_cast<size_t>(row % 61)]);
    label.push_back(some[static_cast<size_t>(row * 7 % 59)]);
  }
  std::vector<Score> loss(static_cast<size_t>(size), kUnwritten), uses(static_cast<size_t>(rows)),
      others(static_cast<size_t>(rows));
  LatticeCpu(p.batch, p.options, {blank.data(), label.data()}, 1, nullptr,
             {loss.data(), uses.data(), others.data()});
  Visits v = RunVisits(p, blank, label, below_largest, threshold, max_visited, 1);
  const Visits again = RunVisits(p, blank, label, below_largest, threshold, max_visited, 3);
  REQUIRE(SameBits(v.has_scores, again.has_scores) && SameBits(v.num_visited, again.num_visited));
  REQUIRE(SameBits(v.total, again.total) && SameBits(v.left_out, again.left_out));
  const std::vector<Score> total = v.total, left_out = v.left_out;
  LeftOutCpu(p.batch, p.options, {v.blank.data(), v.label.data()}, 2, v.State());
  REQUIRE(SameBits(v.total, total) && SameBits(v.left_out, left_out));
  for (size_t b = 0; b < total.size(); ++b) {
    if (!p.batch.IsValid(static_cast<int64_t>(b))) {
      REQUIRE(std::isnan(total[b]) && std::isnan(left_out[b]));
    } else if (std::isfinite(loss[b])) {
      // The probability of all paths is between those of the visited blocks, and with the rest.
      const double slack = 1e-6 * (1 + std::fabs(loss[b]));
      REQUIRE(total[b] <= -loss[b] + slack);
      REQUIRE(LogAdd(total[b], left_out[b]) >= -loss[b] - slack);
    }
  }
}

}  // namespace
}  // namespace transducer

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace transducer;
  Bytes bytes(data, size);
  switch (bytes.Below(15)) {
    case 0: Repair<float>(&bytes); break;
    case 1: Repair<double>(&bytes); break;
    case 2: Run<float>(MakeProblem(&bytes), &bytes); break;
    case 3: Run<double>(MakeProblem(&bytes), &bytes); break;
    case 4: Run<Half>(MakeProblem(&bytes), &bytes); break;
    case 5: Run<BFloat16>(MakeProblem(&bytes), &bytes); break;
    case 6: Additive<float>(&bytes); break;
    case 7: Quantized(MakeProblem(&bytes), &bytes); break;
    case 8: RunDurations<float>(MakeProblem(&bytes), &bytes); break;
    case 9: RunDurations<double>(MakeProblem(&bytes), &bytes); break;
    case 10: RunDurations<BFloat16>(MakeProblem(&bytes), &bytes); break;
    case 11: Prune<float>(&bytes); break;
    case 12: Prune<Half>(&bytes); break;
    case 13: Visit(&bytes); break;
    default: Additive<double>(&bytes);
  }
  return 0;
}
