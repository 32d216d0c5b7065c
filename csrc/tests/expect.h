// SPDX-License-Identifier: Apache-2.0
// The whole test framework: EXPECT_* report and go on; main returns Finish().
#pragma once

#include <cmath>
#include <cstdio>

namespace expect {

inline int g_checks = 0;
inline int g_failures = 0;

inline void True(bool condition, const char* what, const char* file, int line) {
  ++g_checks;
  if (condition) return;
  ++g_failures;
  if (g_failures <= 20) std::printf("%s:%d: expected %s\n", file, line, what);
}

// |a - b| <= tolerance, or both NaN, or the same infinity.
inline void Near(double a, double b, double tolerance, const char* what, const char* file,
                 int line) {
  const bool near = a == b || (std::isnan(a) && std::isnan(b)) || std::abs(a - b) <= tolerance;
  ++g_checks;
  if (near) return;
  ++g_failures;
  if (g_failures <= 20) std::printf("%s:%d: %s: %.17g vs %.17g\n", file, line, what, a, b);
}

inline int Finish() {
  std::printf("%d checks, %d failures\n", g_checks, g_failures);
  return g_failures == 0 && g_checks > 0 ? 0 : 1;
}

}  // namespace expect

#define EXPECT_TRUE(condition) ::expect::True((condition), #condition, __FILE__, __LINE__)
#define EXPECT_NEAR(a, b, tolerance) \
  ::expect::Near((a), (b), (tolerance), #a " ~ " #b, __FILE__, __LINE__)
