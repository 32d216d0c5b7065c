#!/usr/bin/env bash
# Makes every table and picture of docs/benchmarks.md for the CPU: about an hour on two quiet cores:
#
#     make bench SUITES=                    # installs the peers, once
#     benchmarks/full_run.sh --peers-dir build/peers --shapes shapes.npy
#
# Arguments are passed to every run; PYTHON is the interpreter. What has not begun after MINUTES is
# skipped and said, and the documents that are there stay as they were.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-.venv/bin/python}
MINUTES=${MINUTES:-60}
RESULTS=benchmarks/results
FRESH=$(mktemp -d)
trap 'rm -rf "$FRESH"' EXIT
COMMON=("$@")
# One that needs a minute for a batch is in one table only.
FAST=(torchaudio fast_rnnt optimized_transducer warp-transducer plain_torch)

# run SUITE OPTION...: one more run of the suite's document
run() {
  local suite=$1
  shift
  if ((SECONDS >= 60 * MINUTES)); then
    echo "== skipped, $((SECONDS / 60)) minutes have passed: $suite $*"
    return
  fi
  echo "== $((SECONDS / 60)):$(printf %02d $((SECONDS % 60))) $suite $*"
  "$PYTHON" -m benchmarks.run --suite "$suite" --rounds 1 --repetitions 2 "${COMMON[@]}" "$@" \
    --json "$FRESH/cpu_$suite.json" --append 2>"$FRESH/progress" ||
    { tail -n 3 "$FRESH/progress"; echo "== failed: $suite $*"; }
}

run step --peers "${FAST[@]}"
run loss --peers all --repetitions 3
run step --peers "${FAST[@]}" --lattice peaky
run step --peers "${FAST[@]}" --lattice trained
run pruned --peers all --rounds 5 --repetitions 7
run pruned --peers all --rounds 5 --repetitions 7 --lattice peaky
run pruned --peers all --rounds 5 --repetitions 7 --lattice trained
run decode --peers all
run tdt --peers transformers plain_torch --clock cpu --flush-denormal
run tdt --peers transformers plain_torch --clock cpu --flush-denormal --vocab-size 8193
run parakeet --peers transformers --clock cpu
run parakeet --peers transformers --clock cpu --vocab-size 8193
run parakeet_tdt --peers transformers --clock cpu --vocab-size 8193 --frames 700
run step --peers "${FAST[@]}" --threads 2
run loss --peers "${FAST[@]}" --threads 2 --repetitions 3
run memory --peers torchaudio optimized_transducer --repetitions 1
run scaling --peers torchaudio fast_rnnt optimized_transducer --frames 200 --repetitions 1 \
  --series V --factors 1 10 64
run step --peers "${FAST[@]}" --flush-denormal
run step --peers "${FAST[@]}" --flush-denormal --lattice peaky
run step --peers "${FAST[@]}" --batch unsorted --frames 5000 --threads 2 --repetitions 1 \
  --memory-limit 4
run scaling --peers torchaudio optimized_transducer --frames 100 --repetitions 1 \
  --series cells D T --factors 1 4 16 64
run accuracy --peers "${FAST[@]}" --timeout 300  # no time is measured: any machine will do

if compgen -G "$FRESH/*.json" >/dev/null; then
  mv "$FRESH"/*.json "$RESULTS"
fi
"$PYTHON" -m benchmarks.report "$RESULTS"/cpu_step.json --step docs/images/step.png
"$PYTHON" -m benchmarks.report "$RESULTS"/cpu_*.json --fill docs/benchmarks.md
echo "== $((SECONDS / 60)) minutes"
