// SPDX-License-Identifier: Apache-2.0
// The gradient of a row's logits, measured from its scores and uses alone.
#pragma once

#include "coarse_to_fine.h"

namespace transducer {

struct RowGradient {
  Score size;       // L1 norm
  Score spread;     // size + spread is the sensitivity
  Score occupancy;  // uses of all symbols
};

// `blank`, `label` and extra(k) are probabilities, use_extra(k) uses. Entries of one sign count as
// one; a NaN stays.
template <typename Extra, typename UseExtra>
TRANSDUCER_HD inline RowGradient GradientOfRow(const LogitsOptions& options, Score blank,
                                               Score label, Score use_blank, Score use_label,
                                               Extra extra, UseExtra use_extra) {
  constexpr Score kTiny = 2.2250738585072014e-308;
  const Score limit = options.clamp;
  const auto magnitude = [limit](Score entry) {
    const Score size = entry < 0 ? -entry : entry;
    return limit > 0 && size > limit ? limit : size;
  };
  RowGradient row{0, 0, use_blank + use_label};
  if (options.is_hat) {
    // The labels share what blank leaves, and have a gradient only where a label is used.
    const Score rest = 1 - blank;
    const Score share = label / (rest < kTiny ? kTiny : rest);
    const Score of_labels = (1 - (share > 1 ? 1 : share)) * use_label;
    row.size = magnitude(blank * row.occupancy - use_blank) + 2 * magnitude(of_labels);
    row.spread = (blank < rest ? blank : rest) * row.occupancy + of_labels;
  } else {
    Score largest = label > blank ? label : blank, rest = (1 - blank) - label;
    for (int64_t k = 0; k < options.num_big_blanks; ++k) {
      const Score probability = extra(k);
      row.occupancy += use_extra(k);
      rest -= probability;
      largest = probability > largest ? probability : largest;
    }
    row.size = magnitude(blank * row.occupancy - use_blank) +
               magnitude(label * row.occupancy - use_label) +
               magnitude((rest < 0 ? 0 : rest) * row.occupancy);
    row.spread = (1 - largest) * row.occupancy;
  }
  Score largest = 0;
  for (int64_t k = 0; k < options.NumExtra(); ++k) {
    const Score probability = extra(k);
    row.size += magnitude(probability * row.occupancy - use_extra(k));
    largest = probability > largest ? probability : largest;
  }
  // Durations are another softmax.
  if (options.num_durations > 0) row.spread += (1 - largest) * row.occupancy;
  return row;
}

// Difference of two scores, both of which may be -inf; +inf for NaN.
TRANSDUCER_HD inline Score ErrorOfScore(Score fine, Score coarse) {
  if (fine == coarse) return 0;
  const Score difference = fine < coarse ? coarse - fine : fine - coarse;
  return difference == difference ? difference : -kLogZero;
}

// The factor of the weights of utterance b, whose gradients' L1 norm is `gradient`.
TRANSDUCER_HD inline Score WeightScale(const LatticeBatch& batch, int64_t b, const RowWeightsIn& in,
                                       const RowWeightsOptions& options, Score gradient) {
  if (in.loss != nullptr && !(in.loss[b] > kLogZero && in.loss[b] < -kLogZero)) return kNaN;
  Score error = in.error[b] == 0 ? options.unknown_error : in.error[b] * options.error_scale;
  if (error < options.least_error) error = options.least_error;
  Score size = gradient / static_cast<Score>(batch.num_frames[b] + batch.num_targets[b]);
  if (size < options.least_gradient) size = options.least_gradient;
  return error * exp(options.exponent * error) / size;
}

// The rows of utterance b are first_row[b] + 0, 1, ..., NumRowsOf - 1.
TRANSDUCER_HD inline int64_t NumRowsOf(const LatticeBatch& batch, int64_t b) {
  const int64_t size = batch.num_frames[b] * batch.Stride(b);
  const int64_t room = batch.num_rows - batch.first_row[b];  // the last ones may not exist
  return size < room ? size : room;
}

}  // namespace transducer
