// SPDX-License-Identifier: Apache-2.0
#include "parallel.h"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#define TRANSDUCER_HAS_FORK 1
#endif
#if defined(__x86_64__) || defined(_M_X64)
#include <xmmintrin.h>
#define TRANSDUCER_HAS_MXCSR 1
#endif

namespace transducer {
namespace {

// Flush-to-zero and denormals-are-zero for the lifetime of the object, on this thread.
class FlushSubnormals {
 public:
#ifdef TRANSDUCER_HAS_MXCSR
  FlushSubnormals() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ | 0x8040u); }
  ~FlushSubnormals() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
#endif
};

// One ParallelFor call: lives on the caller's stack until every worker has left it.
struct Job {
  Job(const std::function<void(int64_t)>* task, int64_t num_tasks)
      : task(task), num_tasks(num_tasks) {}

  const std::function<void(int64_t)>* task;
  const int64_t num_tasks;
  std::atomic<int64_t> next{0};
  std::mutex error_mutex;
  std::exception_ptr error;

  void Work() {
    [[maybe_unused]] const FlushSubnormals flush;
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < num_tasks;) {
      try {
        (*task)(i);
      } catch (...) {
        const std::lock_guard<std::mutex> lock(error_mutex);
        if (!error) error = std::current_exception();
        next.store(num_tasks, std::memory_order_relaxed);
      }
    }
  }
};

class Pool {
 public:
  // False if another call is using the pool.
  bool TryRun(Job* job, int num_helpers) {
    const std::unique_lock<std::mutex> owner(owner_mutex_, std::try_to_lock);
    if (!owner.owns_lock()) return false;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      try {
        while (static_cast<int>(threads_.size()) < num_helpers) {
          threads_.emplace_back([this, index = static_cast<int>(threads_.size())] { Loop(index); });
        }
      } catch (const std::system_error&) {
        // The system has no more threads: fewer helpers give the same result.
        num_helpers = static_cast<int>(threads_.size());
      }
      job_ = job;
      num_helpers_ = num_helpers;
      num_busy_ = num_helpers;
      ++generation_;
    }
    wake_.notify_all();
    job->Work();
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [this] { return num_busy_ == 0; });
    return true;
  }

 private:
  void Loop(int index) {
    // The call that creates a worker also waits for it, so the worker starts one generation behind.
    std::unique_lock<std::mutex> lock(mutex_);
    uint64_t seen = generation_ - 1;
    for (;;) {
      wake_.wait(lock, [&] { return generation_ != seen; });
      seen = generation_;
      if (index >= num_helpers_) continue;
      Job* job = job_;
      lock.unlock();
      job->Work();
      lock.lock();
      if (--num_busy_ == 0) done_.notify_one();
    }
  }

  std::mutex owner_mutex_;  // held by the call that uses the pool
  std::mutex mutex_;        // guards everything below
  std::condition_variable wake_, done_;
  std::vector<std::thread> threads_;
  Job* job_ = nullptr;
  int num_helpers_ = 0;
  int num_busy_ = 0;
  uint64_t generation_ = 0;
};

// Never destroyed: workers may be asleep in it at exit. Replaced, not reused, in a forked child,
// where its threads do not exist and its mutexes are in an unknown state.
std::atomic<Pool*> g_pool{nullptr};

Pool* GetPool() {
#ifdef TRANSDUCER_HAS_FORK
  static const int registered = pthread_atfork(nullptr, nullptr, [] { g_pool.store(nullptr); });
  (void)registered;
#endif
  Pool* pool = g_pool.load();
  if (pool == nullptr) {
    Pool* fresh = new Pool;
    if (g_pool.compare_exchange_strong(pool, fresh)) return fresh;
    delete fresh;
  }
  return pool;
}

}  // namespace

void ParallelFor(int64_t num_tasks, int num_threads, const std::function<void(int64_t)>& task) {
  if (num_tasks <= 0) return;
  Job job(&task, num_tasks);
  const int64_t num_helpers = std::min<int64_t>(num_threads, num_tasks) - 1;
  if (num_helpers < 1 || !GetPool()->TryRun(&job, static_cast<int>(num_helpers))) job.Work();
  if (job.error) std::rethrow_exception(job.error);
}

}  // namespace transducer
