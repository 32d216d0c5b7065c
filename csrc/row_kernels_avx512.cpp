// SPDX-License-Identifier: Apache-2.0
#define TRANSDUCER_ISA avx512
#define TRANSDUCER_VECTOR_BYTES 64
#include "row_kernels.inl"
