// SPDX-License-Identifier: Apache-2.0
// A function with a stack of its own that runs until it suspends. The address sanitizer knows it.
#pragma once

#include <cstddef>

namespace transducer {
namespace emulation {

class Fiber {
 public:
  using Body = void (*)();  // never returns; leaves by Suspend only

  explicit Fiber(Body body);
  ~Fiber();
  Fiber(const Fiber&) = delete;

  void Resume();          // from outside: runs the fiber until it suspends
  static void Suspend();  // from inside: returns to the caller of Resume

 private:
  static void Enter();

  struct Context;
  Context* context_;
};

}  // namespace emulation
}  // namespace transducer
