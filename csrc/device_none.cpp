// SPDX-License-Identifier: Apache-2.0
// Replaces device_cuda.cu in a build without CUDA.
#include "device.h"

namespace transducer {

int CudaRuntimeVersion() { return 0; }

int CudaDeviceCount() { return 0; }

}  // namespace transducer
