// SPDX-License-Identifier: Apache-2.0
// What the CUDA half of the build knows about itself and the machine.
#pragma once

#include <cstdint>

namespace transducer {

// CUDART_VERSION of the static runtime in this binary, e.g. 13000; 0 in a build without CUDA.
int CudaRuntimeVersion();

// Number of usable CUDA devices; 0 without a device, a driver, or CUDA in the build.
int CudaDeviceCount();

// Adds `value` to each of `size` floats on the current device, on `stream` (a cudaStream_t): proves
// that this binary holds code for the device at hand. Throws Error with CUDA's words otherwise.
void CudaAddConstant(float* data, int64_t size, float value, void* stream);

}  // namespace transducer
