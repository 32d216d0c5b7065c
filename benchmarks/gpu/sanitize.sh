#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# On a machine with a GPU, one call: compute-sanitizer's four tools over the stages; then one line
# each.
source "$(dirname "$0")/build.sh"
export PYTORCH_NO_CUDA_MEMORY_CACHING=1  # every tensor an allocation: its end is seen
declare -A verdict
for tool in memcheck racecheck initcheck synccheck; do
  tests='cuda and not (square or any_shape or transcendentals or vocabulary)'
  # initcheck would blame torch for copying padding that nobody wrote.
  only=$([ $tool = initcheck ] && echo "--kernel-regex kns=transducer" || true)
  status=0
  timeout 140 compute-sanitizer --tool $tool $only --error-exitcode 9 --target-processes all \
    $PYTHON -m pytest -q -x -p no:cacheprovider tests/test_backends*.py -k "$tests" \
    >"sanitize_$tool.log" 2>&1 || status=$?
  verdict[$tool]="exit $status: $(grep -E 'ERROR SUMMARY|RACECHECK SUMMARY|passed|failed' \
    "sanitize_$tool.log" | tail -n 2 | tr '\n' ' ')"
  if [ -n "${OUT:-}" ]; then cp "sanitize_$tool.log" "$OUT/"; fi
  rm -f "sanitize_$tool.log"
done
for tool in "${!verdict[@]}"; do echo "$tool: ${verdict[$tool]}"; done
