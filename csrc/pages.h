// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

namespace transducer {

// Advises the system to use huge pages for a large allocation that has not been written yet. Logits
// are allocated in each step, and page faults of 4 KiB pages take more than half of a stage's time.
// Does nothing on systems without such advice.
void AdviseHugePages(void* data, int64_t bytes);

}  // namespace transducer
