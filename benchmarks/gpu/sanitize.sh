#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# A stage of all.sh: one of compute-sanitizer's tools over 40 tests of the stages. Appends the
# tool's findings to $OUT/sanitize.txt.
#
#   bash benchmarks/gpu/sanitize.sh memcheck    # or racecheck, synccheck, initcheck
source "$(dirname "$0")/common.sh"
require_tool compute-sanitizer
tool=$1
# Every tensor is an allocation of its own, so that memcheck sees its end.
export PYTORCH_NO_CUDA_MEMORY_CACHING=1
export CUDA_REPETITIONS=${REPETITIONS:-1}
tests='cuda and not (square or any_shape or transcendentals)'
if [ "${DRY:-}" = 1 ]; then tests='emulated and kept_rows and not extreme'; fi
# initcheck has to see torch's kernels write; its findings in other kernels than ours do not count.
filter=(--kernel-name kns=transducer)
if [ "$tool" = initcheck ]; then filter=(--print-limit 10000); fi
log=$WORK/sanitize.txt
status=0
compute-sanitizer --tool "$tool" "${filter[@]}" --error-exitcode 9 --target-processes all \
  $PYTHON -m pytest -q -p no:cacheprovider -p benchmarks.gpu.pytest_plugin \
  --at-most "${TESTS:-40}" tests/test_backends*.py -k "$tests" >"$log" 2>&1 || status=$?
{ echo "== $tool"; tail -c 3000000 "$log"; } >>"$OUT/sanitize.txt"
tail -n 30 "$log"
ours=$(grep -E '^=+ .*\bat .*transducer' "$log" | grep -vc 'Host Frame' || true)
summary=$(grep -E 'ERROR SUMMARY|RACECHECK SUMMARY' "$log" | tail -n 1 | sed 's/^=* *//')
counts=$(grep -m 1 '^figures: ' "$log" | sed 's/^figures: //' || true)
echo "figures: $ours findings in our kernels; ${summary:-no summary}; $counts"
if [ "$tool" = initcheck ] && [ "$status" = 9 ]; then status=$((ours > 0 ? 9 : 0)); fi
exit $status
