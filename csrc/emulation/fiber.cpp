// SPDX-License-Identifier: Apache-2.0
#include "fiber.h"

#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <cstdint>

#include "../check.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

// swapcontext makes a system call for the signal mask each time. Saving only the registers that a
// call preserves and the stack pointer is 50 times faster.
#if defined(__x86_64__)
extern "C" void TransducerSwitchStack(void** save_stack_pointer, void* stack_pointer);
asm(R"(
.text
.globl TransducerSwitchStack
.hidden TransducerSwitchStack
.type TransducerSwitchStack, @function
TransducerSwitchStack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size TransducerSwitchStack, .-TransducerSwitchStack
)");
#endif

namespace transducer {
namespace emulation {
namespace {

constexpr size_t kStackBytes = 256 * 1024;

}  // namespace

struct Fiber::Context {
  Body body;
  char* stack;  // with a page at its low end that faults
#if defined(__x86_64__)
  void *inside, *outside;  // stack pointers
#else
  ucontext_t inside, outside;
#endif
  // For the address sanitizer: both sides' fake stacks, and where the resumer's real one is.
  void *fake_inside = nullptr, *fake_outside = nullptr;
  const void* outer_stack = nullptr;
  size_t outer_size = 0;

  void Switch(bool inwards) {
#if defined(__SANITIZE_ADDRESS__)
    if (inwards) {
      __sanitizer_start_switch_fiber(&fake_outside, stack, kStackBytes);
    } else {
      __sanitizer_start_switch_fiber(&fake_inside, outer_stack, outer_size);
    }
#endif
#if defined(__x86_64__)
    TransducerSwitchStack(inwards ? &outside : &inside, inwards ? inside : outside);
#else
    swapcontext(inwards ? &outside : &inside, inwards ? &inside : &outside);
#endif
    Arrive(!inwards);
  }

  // After a switch, on the side where it led (the same call as before it, much later).
  void Arrive(bool is_inside) {
#if defined(__SANITIZE_ADDRESS__)
    if (is_inside) {
      __sanitizer_finish_switch_fiber(fake_inside, &outer_stack, &outer_size);
    } else {
      __sanitizer_finish_switch_fiber(fake_outside, nullptr, nullptr);
    }
#else
    (void)is_inside;
#endif
  }
};

namespace {

Fiber* running = nullptr;

}  // namespace

void Fiber::Enter() {
  Context* context = running->context_;
  context->Arrive(true);
  context->body();
  Fail(__FILE__, __LINE__, "a fiber's body returned");
}

Fiber::Fiber(Body body) : context_(new Context{}) {
  void* stack = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  TRANSDUCER_CHECK(stack != MAP_FAILED, "no memory for the stack of an emulated thread");
  mprotect(stack, static_cast<size_t>(sysconf(_SC_PAGESIZE)), PROT_NONE);
  context_->body = body;
  context_->stack = static_cast<char*>(stack);
#if defined(__x86_64__)
  // As TransducerSwitchStack leaves a stack: six registers, then where to return to. The ABI wants
  // the stack pointer 8 past a multiple of 16 on entry.
  void** top = reinterpret_cast<void**>(context_->stack + kStackBytes) - 10;
  for (int i = 0; i < 10; ++i) top[i] = nullptr;
  top[6] = reinterpret_cast<void*>(&Fiber::Enter);
  context_->inside = top;
#else
  getcontext(&context_->inside);
  context_->inside.uc_stack.ss_sp = stack;
  context_->inside.uc_stack.ss_size = kStackBytes;
  makecontext(&context_->inside, &Fiber::Enter, 0);
#endif
}

Fiber::~Fiber() {
#if defined(__SANITIZE_ADDRESS__)
  ASAN_UNPOISON_MEMORY_REGION(context_->stack, kStackBytes);
#endif
  munmap(context_->stack, kStackBytes);
  delete context_;
}

void Fiber::Resume() {
  running = this;
  context_->Switch(true);
}

void Fiber::Suspend() { running->context_->Switch(false); }

}  // namespace emulation
}  // namespace transducer
