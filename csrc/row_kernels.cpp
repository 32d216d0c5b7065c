// SPDX-License-Identifier: Apache-2.0
#include "row_kernels.h"

namespace transducer {

std::vector<const RowKernelSet*> RunnableRowKernelSets() {
  std::vector<const RowKernelSet*> sets = {&baseline::Kernels()};
#ifdef TRANSDUCER_X86_DISPATCH
  // __builtin_cpu_supports also checks that the operating system saves the wider registers. Every
  // processor with AVX2 has F16C, which older compilers cannot test.
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    sets.push_back(&avx2::Kernels());
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl")) {
      sets.push_back(&avx512::Kernels());
    }
  }
#endif
  return sets;
}

const RowKernelSet& GetRowKernelSet() {
  static const RowKernelSet& best = *RunnableRowKernelSets().back();
  return best;
}

}  // namespace transducer
