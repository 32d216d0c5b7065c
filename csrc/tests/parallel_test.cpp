// SPDX-License-Identifier: Apache-2.0
#include "../parallel.h"

#include <atomic>
#include <stdexcept>
#include <thread>
#include <vector>

#include "expect.h"

#if defined(__unix__) || defined(__APPLE__)
#include <sys/wait.h>
#include <unistd.h>
#endif

namespace transducer {
namespace {

bool EveryTaskRunsOnce(int64_t num_tasks, int num_threads) {
  std::vector<std::atomic<int>> runs(num_tasks);
  ParallelFor(num_tasks, num_threads, [&](int64_t i) { ++runs[i]; });
  for (const auto& count : runs) {
    if (count != 1) return false;
  }
  return true;
}

void TestCounts() {
  for (const int64_t num_tasks : {0, 1, 2, 7, 1000}) {
    for (const int num_threads : {1, 2, 3, 8, 2, 1}) {
      EXPECT_TRUE(EveryTaskRunsOnce(num_tasks, num_threads));
    }
  }
  for (int i = 0; i < 2000; ++i) EXPECT_TRUE(EveryTaskRunsOnce(3, 4));
}

void TestException() {
  for (const int num_threads : {1, 4}) {
    bool caught = false;
    try {
      ParallelFor(100, num_threads, [](int64_t i) {
        if (i == 5) throw std::runtime_error("task 5");
      });
    } catch (const std::runtime_error& error) {
      caught = std::string(error.what()) == "task 5";
    }
    EXPECT_TRUE(caught);
    EXPECT_TRUE(EveryTaskRunsOnce(10, 4));  // the pool survives
  }
}

void TestNestedAndConcurrent() {
  std::atomic<int> total{0};
  ParallelFor(4, 2, [&](int64_t) { ParallelFor(5, 2, [&](int64_t) { ++total; }); });
  EXPECT_TRUE(total == 20);
  std::atomic<int> failures{0};
  std::vector<std::thread> callers;
  for (int i = 0; i < 4; ++i) {
    callers.emplace_back([&] {
      for (int k = 0; k < 200; ++k) failures += !EveryTaskRunsOnce(20, 3);
    });
  }
  for (std::thread& caller : callers) caller.join();
  EXPECT_TRUE(failures == 0);
}

void TestFork() {
#if defined(__unix__) || defined(__APPLE__)
  EXPECT_TRUE(EveryTaskRunsOnce(10, 3));  // a pool with threads exists
  const pid_t child = fork();
  if (child == 0) _exit(EveryTaskRunsOnce(10, 3) ? 0 : 1);
  int status = -1;
  waitpid(child, &status, 0);
  EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0);
  EXPECT_TRUE(EveryTaskRunsOnce(10, 3));
#endif
}

void TestSubnormalsAreFlushedInsideOnly() {
  const volatile float tiny = 1e-38f;
  for (const int num_threads : {1, 2}) {
    std::atomic<int> flushed{0};
    ParallelFor(8, num_threads, [&](int64_t) { flushed += tiny * 0.1f == 0.0f; });
#if defined(__x86_64__)
    EXPECT_TRUE(flushed == 8);
#endif
    EXPECT_TRUE(tiny * 0.1f != 0.0f);
  }
}

}  // namespace
}  // namespace transducer

int main() {
  transducer::TestCounts();
  transducer::TestException();
  transducer::TestNestedAndConcurrent();
  transducer::TestFork();
  transducer::TestSubnormalsAreFlushedInsideOnly();
  return expect::Finish();
}
