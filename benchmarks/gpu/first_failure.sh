#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# A stage of all.sh: runs the first test that failed in parity.sh alone, one kernel at a time, under
# memcheck.
source "$(dirname "$0")/common.sh"
[ -s "$WORK/failures" ] || { echo "figures: no test failed"; exit 77; }
read -r test <"$WORK/failures"
checker=()
if command -v compute-sanitizer >/dev/null; then
  checker=(compute-sanitizer --tool memcheck --error-exitcode 9)
fi
status=0
CUDA_LAUNCH_BLOCKING=1 PYTORCH_NO_CUDA_MEMORY_CACHING=1 "${checker[@]}" $PYTHON -m pytest -q \
  -p no:cacheprovider "$test" | tee "$WORK/first_failure" || status=$?
found=$(grep -m 1 -E '^=+ (Invalid|Misaligned|Program hit)|^E  ' "$WORK/first_failure" || true)
echo "figures: $test: ${found:-passes alone}"
exit $status
