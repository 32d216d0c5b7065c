// SPDX-License-Identifier: Apache-2.0
#include "row_kernels.h"

namespace transducer {
namespace {

enum class Isa { kBaseline, kAvx2, kAvx512 };

Isa DetectIsa() {
#ifdef TRANSDUCER_X86_DISPATCH
  // Asks the operating system too: AVX registers must be saved on a context switch.
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl")) {
    return Isa::kAvx512;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::kAvx2;
#endif
  return Isa::kBaseline;
}

const Isa kIsa = DetectIsa();

}  // namespace

#ifdef TRANSDUCER_X86_DISPATCH
template <>
const RowKernels<float>& GetRowKernels<float>() {
  if (kIsa == Isa::kAvx512) return avx512::Float();
  return kIsa == Isa::kAvx2 ? avx2::Float() : baseline::Float();
}
template <>
const RowKernels<double>& GetRowKernels<double>() {
  if (kIsa == Isa::kAvx512) return avx512::Double();
  return kIsa == Isa::kAvx2 ? avx2::Double() : baseline::Double();
}
#else
template <>
const RowKernels<float>& GetRowKernels<float>() {
  return baseline::Float();
}
template <>
const RowKernels<double>& GetRowKernels<double>() {
  return baseline::Double();
}
#endif

const char* RowKernelsName() {
  switch (kIsa) {
    case Isa::kAvx512: return "avx512";
    case Isa::kAvx2: return "avx2";
    case Isa::kBaseline: break;
  }
  return "baseline";
}

}  // namespace transducer
