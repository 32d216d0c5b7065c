#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Sourced by the scripts beside it: builds transducer_toolkit._C for the GPU at hand, in place.
# Needs nvcc, cmake, ninja, pybind11 and a torch that sees the GPU; PYTHON names the interpreter.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
PYTHON=${PYTHON:-python3}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
ln -sfn ../conf transducer_toolkit/conf  # what an installed package has there
architecture=$($PYTHON -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())')
cmake -S . -B build/gpu -G Ninja -DTRANSDUCER_PYTHON=ON -DTRANSDUCER_CUDA=ON \
  "-DCMAKE_CUDA_ARCHITECTURES=$architecture" "-DCMAKE_CUDA_FLAGS=-lineinfo" \
  "-DPython_EXECUTABLE=$($PYTHON -c 'import sys; print(sys.executable)')" \
  "-Dpybind11_DIR=$($PYTHON -m pybind11 --cmakedir)" >build_gpu.log
cmake --build build/gpu >>build_gpu.log || { tail -n 40 build_gpu.log; exit 1; }
rm -f build_gpu.log transducer_toolkit/_C.*.so
cp build/gpu/_C.*.so transducer_toolkit/
$PYTHON -m transducer_toolkit
