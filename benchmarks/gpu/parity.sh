#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# On a machine with a GPU, one call: builds, then every stage against the CPU, three times for the
# same bits, streams, graph capture, more than 2^31 logits (skipped where they do not fit).
source "$(dirname "$0")/build.sh"
status=0  # the second says something whatever the first has found
timeout 240 $PYTHON -m pytest -q -p no:cacheprovider tests/test_backends*.py -k cuda || status=$?
timeout 240 $PYTHON -m pytest -q -p no:cacheprovider tests/losses/test_cuda.py tests/test_native.py ||
  status=$?
exit $status
