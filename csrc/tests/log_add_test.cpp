// SPDX-License-Identifier: Apache-2.0
// The table of the recursion against the C library.
#include "../fast_log_add.h"

#include <limits>

#include "../log_add.h"
#include "expect.h"

namespace transducer {
namespace {

void TestTable() {
  const SoftplusTable softplus;
  for (double x = 0; x < 50; x += 0.00037) {
    EXPECT_NEAR(softplus(x), std::log1p(std::exp(-x)), 4e-15);
  }
  for (const double x : {0.0, 39.999999999, 40.0, 1e300, std::numeric_limits<double>::infinity()}) {
    EXPECT_NEAR(softplus(x), std::log1p(std::exp(-x)), 4e-15);
  }
  EXPECT_TRUE(std::isnan(softplus(kNaN)));
}

void TestLogAdd() {
  const SoftplusTable softplus;
  const Score values[] = {kLogZero, -1e300, -745.0, -3.5, -1e-12, 0.0, 0.25, 700.0, -kLogZero};
  for (const Score a : values) {
    for (const Score b : values) {
      const Score fast = FastLogAdd(softplus, a, b), slow = LogAdd(a, b);
      EXPECT_TRUE(fast == slow || std::isnan(slow) == std::isnan(fast));
      if (std::isfinite(slow)) EXPECT_NEAR(fast, slow, 1e-14 + 1e-15 * std::abs(slow));
    }
    EXPECT_TRUE(std::isnan(FastLogAdd(softplus, a, kNaN)) == std::isnan(LogAdd(a, kNaN)));
    EXPECT_TRUE(std::isnan(FastLogAdd(softplus, kNaN, a)) == std::isnan(LogAdd(kNaN, a)));
  }
}

}  // namespace
}  // namespace transducer

int main() {
  transducer::TestTable();
  transducer::TestLogAdd();
  return expect::Finish();
}
