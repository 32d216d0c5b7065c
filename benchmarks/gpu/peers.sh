#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# A stage of all.sh: builds the peers whose sources are in .gpu_kit/peers, then times them and ours.
# Writes $OUT/gpu_peers.json.
source "$(dirname "$0")/common.sh"
begun=$SECONDS
build=$((STAGE_SECONDS / 2))  # the other half is for the times
timeout -k 5 $build $PYTHON benchmarks/gpu/peers.py build --target build/gpu_peers --jobs 12 ||
  echo "not all of the peers were built"
left=$((STAGE_SECONDS - (SECONDS - begun) - 10))
mkdir -p build/gpu_peers
$PYTHON -m benchmarks.gpu.benchmark --peers-dir build/gpu_peers --batches sorted unsorted \
  --projects all --seconds $left --json "$OUT/gpu_peers.json" $(cat "$WORK/sizes")
