#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# On a machine with a GPU, one call of at most ten minutes: builds, builds the peers whose sources
# lie in .peers (peers.py fetch), measures; the table comes last.
source "$(dirname "$0")/build.sh"
timeout 120 $PYTHON benchmarks/gpu/peers.py build --target build/gpu_peers --jobs 8 || true
mkdir -p build/gpu_peers
set -o pipefail
$PYTHON -m benchmarks.gpu.benchmark --peers-dir build/gpu_peers --seconds "${SECONDS_TO_MEASURE:-300}" |
  tee "${OUT:-build}/benchmark.txt"
