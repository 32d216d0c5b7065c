// SPDX-License-Identifier: Apache-2.0
// Blocks one after the other; in a block, warps; in a warp, lanes; each until it waits.
#include <algorithm>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "../check.h"
#include "cuda_emulation.h"
#include "fiber.h"

namespace transducer {
namespace emulation {

Index thread_index, block_index, block_size;

namespace {

constexpr int kWarpSize = 32;

enum class State { kReady, kAtBlock, kAtWarp, kDone };

struct Thread {
  State state;
  Site site;  // where it waits
  bool vote;
  uint64_t waits_for_warp;  // so far
  std::unique_ptr<Fiber> fiber;
};

struct Warp {
  // Two alternate: a lane may write for the next exchange before another has read this one.
  uint64_t exchange[2][kWarpSize];
};

struct Machine {
  Order order = Order::kForward;
  std::mt19937 random;
  std::mutex mutex;
  const std::function<void()>* body = nullptr;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  std::vector<std::unique_ptr<Fiber>> idle;  // between two threads' lives
  bool block_vote = false;
  int64_t num_grids = 0;
  std::string error;
};
Machine machine;

std::string Describe(const Site& site) {
  return std::string(site.file) + ":" + std::to_string(site.line);
}

std::string Describe(const Thread& thread) {
  switch (thread.state) {
    case State::kAtBlock: return "waits for its block at " + Describe(thread.site);
    case State::kAtWarp: return "waits for its warp at " + Describe(thread.site);
    case State::kDone: return "has ended";
    default: return "runs";
  }
}

bool IsSameSite(const Site& a, const Site& b) {
  return a.line == b.line && std::string(a.file) == b.file;
}

// Drops the fibers that still wait, with their stacks.
[[noreturn]] void Abandon(const std::string& message) {
  machine.threads.clear();
  throw Error(message);
}

[[noreturn]] void Diverged(const char* what, const Thread& a, const Thread& b) {
  const auto index = [](const Thread& thread) { return &thread - machine.threads.data(); };
  Abandon("CUDA emulation: " + std::string(what) + " of block " + std::to_string(block_index.x) +
          " diverged: thread " + std::to_string(index(a)) + " " + Describe(a) + ", thread " +
          std::to_string(index(b)) + " " + Describe(b));
}

void RunThreads() {  // a fiber's body: one thread after another
  while (true) {
    (*machine.body)();
    machine.threads[thread_index.x].state = State::kDone;
    Fiber::Suspend();
  }
}

void Wait(State state, Site site) {
  const unsigned index = thread_index.x;
  Thread& thread = machine.threads[index];
  thread.state = state;
  thread.site = site;
  Fiber::Suspend();
  thread_index.x = index;
}

void RunThread(unsigned index) {
  Thread& thread = machine.threads[index];
  if (!thread.fiber) {
    if (machine.idle.empty()) {
      thread.fiber = std::make_unique<Fiber>(RunThreads);
    } else {
      thread.fiber = std::move(machine.idle.back());
      machine.idle.pop_back();
    }
  }
  thread_index.x = index;
  thread.fiber->Resume();
  if (!machine.error.empty()) Abandon(machine.error);
  if (thread.state == State::kDone) machine.idle.push_back(std::move(thread.fiber));
}

template <typename T>
void Arrange(std::vector<T>& items) {
  if (machine.order == Order::kReverse) std::reverse(items.begin(), items.end());
  if (machine.order == Order::kRandom) {
    std::shuffle(items.begin(), items.end(), machine.random);
  }
}

// Runs each lane until it waits. Returns whether all lanes wait for the warp, so that it can go on.
bool RunWarp(int warp) {
  static std::vector<int> lanes(kWarpSize);
  std::iota(lanes.begin(), lanes.end(), 0);
  Arrange(lanes);
  Thread* threads = &machine.threads[static_cast<size_t>(warp) * kWarpSize];
  for (const int lane : lanes) {
    if (threads[lane].state == State::kReady) {
      RunThread(static_cast<unsigned>(warp * kWarpSize + lane));
    }
  }
  const Thread* waiting = std::find_if(threads, threads + kWarpSize, [](const Thread& thread) {
    return thread.state == State::kAtWarp;
  });
  if (waiting == threads + kWarpSize) return false;
  for (int lane = 0; lane < kWarpSize; ++lane) {
    Thread& thread = threads[lane];
    if (thread.state != State::kAtWarp || !IsSameSite(thread.site, waiting->site) ||
        thread.waits_for_warp != waiting->waits_for_warp) {
      Diverged("a warp", *waiting, thread);
    }
  }
  for (int lane = 0; lane < kWarpSize; ++lane) threads[lane].state = State::kReady;
  return true;
}

// Called when all threads wait for the block or have ended. Returns whether the block goes on.
bool ReleaseBlock() {
  Thread& first = machine.threads.front();
  machine.block_vote = false;
  for (Thread& thread : machine.threads) {
    if (thread.state != first.state ||
        (thread.state == State::kAtBlock && !IsSameSite(thread.site, first.site))) {
      Diverged("a block", first, thread);
    }
    machine.block_vote |= thread.vote;
  }
  if (first.state == State::kDone) return false;
  for (Thread& thread : machine.threads) thread.state = State::kReady;
  return true;
}

void RunBlock() {
  for (Thread& thread : machine.threads) {
    thread.state = State::kReady;
    thread.vote = false;
    thread.waits_for_warp = 0;
  }
  static std::vector<int> warps;
  do {
    warps.resize(machine.warps.size());
    std::iota(warps.begin(), warps.end(), 0);
    Arrange(warps);
    std::reverse(warps.begin(), warps.end());  // they leave from the end
    while (!warps.empty()) {
      // One warp until it waits for the block; in random order any warp's next step.
      const size_t pick =
          machine.order == Order::kRandom ? machine.random() % warps.size() : warps.size() - 1;
      std::swap(warps[pick], warps.back());
      if (!RunWarp(warps.back())) warps.pop_back();
    }
  } while (ReleaseBlock());
}

}  // namespace

void SetOrder(Order order, unsigned seed) {
  const std::lock_guard<std::mutex> lock(machine.mutex);
  machine.order = order;
  machine.random.seed(seed);
}

int64_t NumGrids() { return machine.num_grids; }

void RunGrid(unsigned num_blocks, unsigned num_threads, const std::function<void()>& body) {
  TRANSDUCER_CHECK(num_threads % kWarpSize == 0 && num_threads <= 1024,
                   "CUDA emulation: blocks of whole warps only, up to 1024 threads");
  const std::lock_guard<std::mutex> lock(machine.mutex);
  ++machine.num_grids;
  machine.body = &body;
  machine.error.clear();
  machine.threads.clear();
  machine.threads.resize(num_threads);
  machine.warps.resize(num_threads / kWarpSize);
  block_size.x = num_threads;
  std::vector<unsigned> blocks(num_blocks);
  std::iota(blocks.begin(), blocks.end(), 0u);
  Arrange(blocks);
  for (const unsigned block : blocks) {
    block_index.x = block;
    RunBlock();
  }
}

bool WaitForBlock(Site site, bool vote) {
  machine.threads[thread_index.x].vote = vote;
  Wait(State::kAtBlock, site);
  return machine.block_vote;
}

void WaitForWarp(Site site, unsigned mask) {
  if (mask != 0xffffffffu) {
    machine.error = "CUDA emulation: a mask other than the full warp at " + Describe(site);
    Fiber::Suspend();  // for ever
  }
  ++machine.threads[thread_index.x].waits_for_warp;
  Wait(State::kAtWarp, site);
}

const uint64_t* ExchangeInWarp(Site site, unsigned mask, uint64_t bits) {
  const unsigned index = thread_index.x;
  uint64_t* slots =
      machine.warps[index / kWarpSize].exchange[machine.threads[index].waits_for_warp % 2];
  slots[index % kWarpSize] = bits;
  WaitForWarp(site, mask);
  return slots;
}

}  // namespace emulation
}  // namespace transducer
