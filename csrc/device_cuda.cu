// SPDX-License-Identifier: Apache-2.0
#include <cuda_runtime.h>

#include "device.h"

namespace transducer {

int CudaRuntimeVersion() { return CUDART_VERSION; }

int CudaDeviceCount() {
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess) {
    (void)cudaGetLastError();  // no driver is an answer here, not an error to leave behind
    return 0;
  }
  return count;
}

}  // namespace transducer
