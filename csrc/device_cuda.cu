// SPDX-License-Identifier: Apache-2.0
#include <cuda_runtime.h>

#include "device.h"

namespace transducer {

int CudaRuntimeVersion() { return CUDART_VERSION; }

int CudaDeviceCount() {
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess) {
    (void)cudaGetLastError();  // clears the error: without a driver the count is 0
    return 0;
  }
  return count;
}

}  // namespace transducer
