// SPDX-License-Identifier: Apache-2.0
// The CUDA runtime of the build and the CUDA devices of the machine.
#pragma once

#include <cstdint>

namespace transducer {

// CUDART_VERSION of the static runtime in this binary, e.g. 13000; 0 in a build without CUDA.
int CudaRuntimeVersion();

// Number of usable CUDA devices; 0 without a device, a driver, or CUDA in the build.
int CudaDeviceCount();

}  // namespace transducer
