#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Prepares .gpu_kit, which is to be copied with the project to a machine with a GPU and no network:
# the compiled module for that machine's Python and GPU, the packages and speech that the stages
# models and train need, and the peers' sources. Prints the size.
#
#   bash benchmarks/gpu/prepare.sh                       # Python 3.12, compute capability 9.0
#   TARGET_PYTHON=python3.11 ARCHITECTURE=80 bash benchmarks/gpu/prepare.sh
#
# Needs nvcc, a TARGET_PYTHON with headers, and cmake, ninja, pybind11 and pip in PYTHON's
# environment. Needs no GPU and no torch.
cd "$(dirname "$0")/../.."
if [ -x .venv/bin/python ]; then PYTHON=${PYTHON:-.venv/bin/python} PATH="$PWD/.venv/bin:$PATH"; fi
source benchmarks/gpu/common.sh
TARGET_PYTHON=${TARGET_PYTHON:-python3.12} ARCHITECTURE=${ARCHITECTURE:-90}
LIMIT_MIB=64  # of everything that travels
target=$("$TARGET_PYTHON" -c 'import sys; print(sys.executable)')
suffix=$("$target" -c 'import sysconfig; print(sysconfig.get_config_var("EXT_SUFFIX"))')
mkdir -p .gpu_kit

checksum=$(sources_checksum)
if [ "$(cat .gpu_kit/sources.sha256 2>/dev/null)" != "$checksum" ] ||
  [ ! -f ".gpu_kit/_C$suffix" ]; then
  build=build/gpu_kit
  cmake -S . -B $build -G Ninja -DTRANSDUCER_PYTHON=ON -DTRANSDUCER_CUDA=ON \
    -DCMAKE_BUILD_TYPE=Release "-DCMAKE_CUDA_ARCHITECTURES=$ARCHITECTURE" \
    -DCMAKE_CUDA_FLAGS=-lineinfo "-DPython_EXECUTABLE=$target" \
    "-Dpybind11_DIR=$($PYTHON -m pybind11 --cmakedir)" >/dev/null
  cmake --build $build
  cp "$build/_C$suffix" .gpu_kit/
  echo "$checksum" >.gpu_kit/sources.sha256
fi
# The module needs neither torch nor a driver to load.
(cd .gpu_kit && "$target" -c 'import _C; print("module:", _C.build_info())')

# What the machine of ../../docs/cuda.md lacks. The wheels of one TARGET_PYTHON, and no others.
rm -rf .gpu_kit/wheels
"$target" -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir .gpu_kit/wheels \
  'transformers>=5.24,<6' 'hydra-core>=1.3,<1.4' 'omegaconf>=2.2,<2.4' 'antlr4-python3-runtime==4.9.*' \
  'soundfile>=0.12' cffi pycparser 'soxr>=0.5' 'jiwer>=4' rapidfuzz 'espeakng-loader==0.2.4'
ls .gpu_kit/wheels
digits=/usr/share/asterisk/sounds/en_US_f_Allison/digits  # Debian: asterisk-core-sounds-en-wav
rm -rf .gpu_kit/digits
if [ -d $digits ]; then mkdir .gpu_kit/digits && cp $digits/[0-9].wav .gpu_kit/digits/; fi

[ "${PEERS:-1}" = 0 ] || $PYTHON benchmarks/gpu/peers.py fetch

kit=$(du -sb .gpu_kit | cut -f 1)
tree=$(git ls-files -z --cached --others --exclude-standard | xargs -0 du -cb | tail -n 1 | cut -f 1)
awk -v kit="$kit" -v tree="$tree" -v limit=$LIMIT_MIB 'BEGIN {
  printf "%.1f MiB in .gpu_kit and %.1f MiB of files that git does not ignore: %.1f MiB in all\n",
    kit / 2^20, tree / 2^20, (kit + tree) / 2^20
  if (kit + tree > limit * 2^20) { printf "error: more than %d MiB\n", limit; exit 1 }
}'
