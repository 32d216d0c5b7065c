// SPDX-License-Identifier: Apache-2.0
// Stands in for device_cuda.cu in a build without CUDA.
#include "check.h"
#include "device.h"

namespace transducer {

int CudaRuntimeVersion() { return 0; }

int CudaDeviceCount() { return 0; }

void CudaAddConstant(float*, int64_t, float, void*) {
  TRANSDUCER_CHECK(false, "this build of transducer_toolkit has no CUDA in it");
}

}  // namespace transducer
