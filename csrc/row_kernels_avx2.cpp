// SPDX-License-Identifier: Apache-2.0
#define TRANSDUCER_ISA avx2
#define TRANSDUCER_VECTOR_BYTES 32
#include "row_kernels.inl"
