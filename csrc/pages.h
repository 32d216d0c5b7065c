// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

namespace transducer {

// Asks for huge pages behind a large, not yet touched allocation. Logits are made anew each step:
// of a stage's time, the faults of 4 KiB pages are more than half. A hint; nothing happens where
// the system does not know it.
void AdviseHugePages(void* data, int64_t bytes);

}  // namespace transducer
