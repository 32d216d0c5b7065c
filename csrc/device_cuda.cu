// SPDX-License-Identifier: Apache-2.0
#include <cuda_runtime.h>

#include <string>

#include "check.h"
#include "device.h"

namespace transducer {
namespace {

__global__ void AddConstantKernel(float* data, int64_t size, float value) {
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < size) data[i] += value;
}

}  // namespace

int CudaRuntimeVersion() { return CUDART_VERSION; }

int CudaDeviceCount() {
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess) {
    (void)cudaGetLastError();  // no driver is an answer here, not an error to leave behind
    return 0;
  }
  return count;
}

void CudaAddConstant(float* data, int64_t size, float value, void* stream) {
  if (size == 0) return;
  constexpr int kThreads = 256;
  const int64_t blocks = (size + kThreads - 1) / kThreads;
  TRANSDUCER_CHECK(blocks <= 0x7fffffff, "too many elements for one launch");
  AddConstantKernel<<<static_cast<unsigned>(blocks), kThreads, 0,
                      static_cast<cudaStream_t>(stream)>>>(data, size, value);
  const cudaError_t status = cudaGetLastError();
  TRANSDUCER_CHECK(status == cudaSuccess, std::string("CUDA error: ") + cudaGetErrorString(status));
}

}  // namespace transducer
