// SPDX-License-Identifier: Apache-2.0
#define TRANSDUCER_ISA baseline
#define TRANSDUCER_VECTOR_BYTES 16
#include "row_kernels.inl"
