// SPDX-License-Identifier: Apache-2.0
// The one way to start a kernel: on the device, or, with TRANSDUCER_EMULATION, on the host
// (emulation/cuda_emulation.h). Included by *_cuda.cu only.
#pragma once

#include <string>
#include <utility>

#include "check.h"

#ifdef TRANSDUCER_EMULATION
#include "emulation/cuda_emulation.h"
#else
#include <cuda_runtime.h>
#endif

namespace transducer {

// Starts `blocks` blocks of `threads` threads on `stream`, a cudaStream_t of the current device.
// Does not wait. Zero blocks are none: CUDA would call that an error.
template <typename... P, typename... A>
void LaunchKernel(const char* file, int line, void (*kernel)(P...), int64_t blocks, int threads,
                  void* stream, A... arguments) {
  if (blocks == 0) return;
  if (blocks < 0 || blocks > 0x7fffffff) Fail(file, line, "too many blocks for one launch");
#ifdef TRANSDUCER_EMULATION
  (void)stream;
  emulation::RunGrid(static_cast<unsigned>(blocks), static_cast<unsigned>(threads),
                     [&] { kernel(static_cast<P>(arguments)...); });
#else
  kernel<<<static_cast<unsigned>(blocks), static_cast<unsigned>(threads), 0,
           static_cast<cudaStream_t>(stream)> > >(static_cast<P>(arguments)...);
  const cudaError_t status = cudaGetLastError();
  if (status != cudaSuccess) {
    Fail(file, line, std::string("CUDA error: ") + cudaGetErrorString(status));
  }
#endif
}

}  // namespace transducer

// kernel, blocks, threads, stream, arguments...
#define TRANSDUCER_LAUNCH(...) ::transducer::LaunchKernel(__FILE__, __LINE__, __VA_ARGS__)
