// SPDX-License-Identifier: Apache-2.0
// The grid on which occupancies are binned and thresholds chosen.
#pragma once

#include <cstring>

#include "common.h"

namespace transducer {

// Bin i > 0 begins at EdgeOf(i). There are four bins per power of two, given by the exponent and
// the first two mantissa bits of a number. Bin 0 is everything below 2^-128; the last has no upper
// end.
constexpr int64_t kBinsPerOctave = 4, kLowestExponent = -128, kHighestExponent = 16;
constexpr int64_t kNumBins = (kHighestExponent - kLowestExponent) * kBinsPerOctave;

TRANSDUCER_HD inline Score PowerOfTwo(int64_t exponent) {  // of normal numbers
  const uint64_t bits = static_cast<uint64_t>(1023 + exponent) << 52;
  Score power;
  memcpy(&power, &bits, sizeof(power));
  return power;
}

TRANSDUCER_HD inline int64_t BinOf(Score occupancy) {  // > 0
  uint64_t bits;
  memcpy(&bits, &occupancy, sizeof(bits));
  const int64_t bin = static_cast<int64_t>(bits >> 50) - (1023 + kLowestExponent) * kBinsPerOctave;
  return bin < 0 ? 0 : bin >= kNumBins ? kNumBins - 1 : bin;
}

TRANSDUCER_HD inline Score EdgeOf(int64_t bin) {
  if (bin == 0) return 0;
  const int64_t quarters = bin + (1023 + kLowestExponent) * kBinsPerOctave;
  const uint64_t bits = static_cast<uint64_t>(quarters) << 50;
  Score edge;
  memcpy(&edge, &bits, sizeof(edge));
  return edge;
}

}  // namespace transducer
