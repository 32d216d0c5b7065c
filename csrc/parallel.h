// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>

namespace transducer {

// Runs task(0) ... task(num_tasks - 1), each once, on at most num_threads threads including the
// caller's; returns when all are done. Threads take the tasks in order from one counter, so uneven
// tasks balance. A stage's result must not depend on which thread runs which task. Subnormal
// numbers are flushed to zero while tasks run; the caller's setting is restored.
//
// The pool is std::thread, not OpenMP: a second OpenMP runtime beside the one inside torch hangs
// after fork(). A forked child starts a pool of its own. A call made while the pool is busy (from
// another thread or from inside a task) runs on the calling thread alone. The first exception
// thrown by a task is rethrown here.
void ParallelFor(int64_t num_tasks, int num_threads, const std::function<void(int64_t)>& task);

// Runs task(begin, end) over runs of rows. A run is long enough to hide the cost of starting a task
// and short enough to balance.
template <typename Task>
void ParallelForRows(int64_t num_rows, int num_threads, const Task& task) {
  constexpr int64_t kRowsPerTask = 64;
  ParallelFor((num_rows + kRowsPerTask - 1) / kRowsPerTask, num_threads, [&](int64_t index) {
    const int64_t begin = index * kRowsPerTask;
    task(begin, std::min(begin + kRowsPerTask, num_rows));
  });
}

}  // namespace transducer
