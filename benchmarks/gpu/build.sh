#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Puts transducer_toolkit._C into place: the module from .gpu_kit if it was made from these sources
# (prepare.sh), else a new one for the GPU of this machine. With DRY=1 a module that is already in
# place will do. Installs the wheels of .gpu_kit.
#
# Building needs nvcc, cmake, ninja and pybind11; PYTHON names the interpreter.
source "$(dirname "$0")/common.sh"
ln -sfn ../conf transducer_toolkit/conf  # as in an installed package
if compgen -G '.gpu_kit/wheels/*.whl' >/dev/null; then
  rm -rf "$GPU_SITE"
  $PYTHON -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir \
    --disable-pip-version-check --root-user-action ignore --target "$GPU_SITE" .gpu_kit/wheels/*.whl
fi
suffix=$($PYTHON -c 'import sysconfig; print(sysconfig.get_config_var("EXT_SUFFIX"))')
module=transducer_toolkit/_C$suffix

check() {  # prints what the module is; fails without a device, unless DRY=1
  $PYTHON - <<'PYTHON_END'
import os, sys
import transducer_toolkit.__main__ as report
report.main()
devices = report.build_info()["cuda_devices"]
sys.exit(0 if devices or os.environ.get("DRY") == "1" else "the module finds no CUDA device")
PYTHON_END
}

if [ "$(cat .gpu_kit/sources.sha256 2>/dev/null)" = "$(sources_checksum)" ] &&
  [ -f ".gpu_kit/_C$suffix" ]; then
  cp ".gpu_kit/_C$suffix" "$module"
  if check; then echo "figures: brought along"; exit 0; fi
  echo "the module that was brought along does not work here: building another"
fi
if [ "${DRY:-}" = 1 ] && [ -f "$module" ] && check; then
  echo "figures: already in place"
  exit 0
fi
architecture=$($PYTHON -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())')
cmake -S . -B build/gpu -G Ninja -DTRANSDUCER_PYTHON=ON -DTRANSDUCER_CUDA=ON \
  -DCMAKE_BUILD_TYPE=Release "-DCMAKE_CUDA_ARCHITECTURES=$architecture" \
  -DCMAKE_CUDA_FLAGS=-lineinfo \
  "-DPython_EXECUTABLE=$($PYTHON -c 'import sys; print(sys.executable)')" \
  "-Dpybind11_DIR=$($PYTHON -m pybind11 --cmakedir)"
cmake --build build/gpu
cp "build/gpu/_C$suffix" "$module"
check
echo "figures: built for $architecture"
