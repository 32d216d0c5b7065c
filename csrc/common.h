// SPDX-License-Identifier: Apache-2.0
// Names shared by every stage, on the host and on the device.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#ifdef __CUDACC__
#define TRANSDUCER_HD __host__ __device__
#else
#define TRANSDUCER_HD
#endif

namespace transducer {

// Element type of logits, encoder and predictor rows and of their gradients.
enum class DType : int { kFloat32 = 0, kFloat64 = 1, kFloat16 = 2, kBFloat16 = 3 };

enum class Activation : int { kIdentity = 0, kTanh = 1, kRelu = 2, kGelu = 3, kSilu = 4 };

// Scores, posteriors and the recursion are float64 for logits of any dtype: they are 1/V of the
// work, and in float32 the recursion loses three digits.
using Score = double;

constexpr Score kLogZero = -std::numeric_limits<Score>::infinity();
constexpr Score kNaN = std::numeric_limits<Score>::quiet_NaN();

}  // namespace transducer
