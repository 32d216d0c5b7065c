#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# A stage of all.sh: every CUDA stage and loss against the CPU. Writes $OUT/parity.xml.
source "$(dirname "$0")/common.sh"
tests='cuda and not emulated'
if [ "${DRY:-}" = 1 ]; then tests='emulated and (kept_rows or pruned)'; fi
$PYTHON -m pytest -q -p no:cacheprovider -p xdist -p benchmarks.gpu.pytest_plugin \
  --numprocesses "${WORKERS:-8}" --failures "$WORK/failures" --junitxml "$OUT/parity.xml" \
  tests/test_backends*.py tests/losses/test_cuda*.py -k "$tests"
