// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "common.h"

namespace transducer {

// log(exp(a) + exp(b)). -inf is probability zero; NaN in either argument gives NaN.
TRANSDUCER_HD inline Score LogAdd(Score a, Score b) {
  const Score high = a > b ? a : b;
  const Score low = a > b ? b : a;
  if (low == kLogZero) return high;  // also when both are: never compute -inf - -inf
  return high + std::log1p(std::exp(low - high));
}

}  // namespace transducer
