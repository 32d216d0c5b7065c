#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# A stage of all.sh: hardware counters of one launch of each kernel of a step.
source "$(dirname "$0")/common.sh"
require_tool ncu
status=0
# --clock-control none: the machine's clocks are not ours to change.
ncu --clock-control none --profile-from-start off --kernel-name 'regex:.*Kernel$' \
  --launch-count "${KERNELS:-12}" --csv --page details \
  --section SpeedOfLight --section LaunchStats --section Occupancy --section MemoryWorkloadAnalysis \
  $PYTHON -m benchmarks.gpu.kernel_times --each-stage-once $(cat "$WORK/sizes") >"$WORK/ncu.txt" ||
  status=$?
cat "$WORK/ncu.txt"
$PYTHON -m benchmarks.gpu.tables --ncu "$WORK/ncu.txt"
exit $status
