#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Checks and measures everything on a machine with a GPU, the most valuable results first.
#
#   BUDGET=330 OUT=results bash benchmarks/gpu/all.sh             # every stage that fits
#   bash benchmarks/gpu/all.sh parity memcheck build_peers peers  # these stages, in this order
#
# Each stage appends its output to $OUT/log.txt and, when it ends, one line to $OUT/summary.txt:
# name, status, seconds and its most important figures. The summary is also printed at the end, and
# when the script gets SIGTERM. A stage that no longer fits is skipped. docs/cuda.md lists the
# stages and their files.
#
# Environment:
#   BUDGET       seconds for everything, counted from the start (570)
#   OUT          folder of the results (build/gpu_out)
#   PYTHON       the interpreter (python3)
#   WORKERS      pytest processes of the parity stage (8)
#   REPETITIONS  runs of each test under a sanitizer, which must agree to the bit (1)
#   TESTS        tests under each sanitizer (40)
#   EPOCHS       epochs of the stage train (1; the recipe has 3)
#   DRY          1: no GPU; emulated stages, the CPU and small sizes test the scripts
source "$(dirname "$0")/common.sh"
set +e  # a failed stage does not keep the others from running
BUDGET=${BUDGET:-570}
OUT=${OUT:-build/gpu_out}
mkdir -p "$OUT"
OUT=$(cd "$OUT" && pwd)
WORK=$(mktemp -d)
export OUT WORK
rm -f "$OUT"/{summary.txt,log.txt,parity.xml,sanitize.txt,gpu_{profile,benchmark,models,peers}.json}
: >"$OUT/summary.txt"
if [ "${DRY:-}" = 1 ]; then
  echo "--device cpu --frames 60 --shorten 12 --vocab-size 12 --joiner-dim 8" >"$WORK/sizes"
else
  : >"$WORK/sizes"
fi
read -ra sizes <"$WORK/sizes"
here=benchmarks/gpu
all_stages="environment module parity first_failure profile table models train ncu memcheck racecheck \
synccheck initcheck build_peers peers"

describe() {  # of a stage: the least and the most seconds it gets, and its command
  case $1 in
    environment) stage 1 20 "$PYTHON" -m benchmarks.gpu.environment ;;
    module) stage 5 60 bash $here/build.sh ;;
    parity) stage 20 90 bash $here/parity.sh ;;
    first_failure) stage 10 30 bash $here/first_failure.sh ;;
    profile) stage 15 40 "$PYTHON" -m benchmarks.gpu.kernel_times --json "$OUT/gpu_profile.json" \
      "${sizes[@]}" ;;
    table) stage 20 100 "$PYTHON" -m benchmarks.gpu.benchmark --batches sorted peaky \
      --projects ours torchaudio --json "$OUT/gpu_benchmark.json" "${sizes[@]}" ;;
    models) stage 30 90 "$PYTHON" -m benchmarks.gpu.benchmark --batches parakeet_8k parakeet \
      --projects ours transformers --json "$OUT/gpu_models.json" "${sizes[@]}" ;;
    train) stage 40 120 bash $here/train.sh ;;
    ncu) stage 15 35 bash $here/ncu.sh ;;
    memcheck | racecheck | synccheck | initcheck) stage 15 40 bash $here/sanitize.sh "$1" ;;
    build_peers) stage 20 180 "$PYTHON" $here/peers.py build --target build/gpu_peers --jobs 12 ;;
    peers) stage 20 "$BUDGET" "$PYTHON" -m benchmarks.gpu.benchmark --batches sorted peaky unsorted \
      --projects all --peers-dir build/gpu_peers --json "$OUT/gpu_peers.json" "${sizes[@]}" ;;
    *) return 1 ;;
  esac
}

stage() { least=$1 most=$2 command=("${@:3}"); }

note() {  # name, status, seconds, figures
  printf '%-14s %-10s %4d s  %s\n' "$1" "$2" "$3" "$4" >>"$OUT/summary.txt"
}

child='' current='' word='' failed=0

run_stage() {
  current=$1
  describe "$1"
  local left=$((BUDGET - SECONDS)) begun=$SECONDS offset status figures
  if [ $left -lt "$least" ]; then
    word=skipped
    note "$1" skipped 0 "$left s left"
    return
  fi
  export STAGE_SECONDS=$((most < left ? most : left))
  echo "== $1" >>"$OUT/log.txt"
  offset=$(stat -c %s "$OUT/log.txt")
  # In the background, so that this shell hears a signal at once.
  timeout -k 5 "$STAGE_SECONDS" "${command[@]}" >>"$OUT/log.txt" 2>&1 &
  child=$!
  wait $child
  status=$?
  child=
  figures=$(tail -c "+$((offset + 1))" "$OUT/log.txt" | tr -d '\r' |
    awk 'NF { last = $0 } /^figures: / { found = substr($0, 10) } END { print found ? found : last }')
  case $status in
    0) word=ok ;;
    77) word=absent ;;
    124 | 137) word="timed out" ;;
    *) word="failed $status" ;;
  esac
  if [ "$word" != ok ] && [ "$word" != absent ]; then failed=1; fi
  note "$1" "$word" $((SECONDS - begun)) "${figures:0:400}"
}

finish() {
  trap '' TERM INT
  if [ -n "$child" ]; then  # timeout leads a process group of its own
    kill -TERM "$child"
    for _ in 1 2 3 4 5; do kill -0 "$child" 2>/dev/null && sleep 0.2; done
    kill -KILL -- "-$child" 2>/dev/null
    note "$current" killed $((SECONDS)) "at second $SECONDS of $BUDGET"
  fi
  cat "$OUT/summary.txt"
  rm -rf "$WORK"
}
trap 'finish; exit 143' TERM INT

stages=("$@")
if [ $# = 0 ]; then read -ra stages <<<"$all_stages"; fi
for name in "${stages[@]}"; do
  describe "$name" || { echo "stages: expected some of: $all_stages; got $name" >&2; exit 2; }
done
# Nothing runs without these two.
for name in module environment; do
  [[ " ${stages[*]} " = *" $name "* ]] || stages=("$name" "${stages[@]}")
done
for name in "${stages[@]}"; do
  run_stage "$name"
  if [ "$name" = module ] && [ "$word" != ok ]; then
    note "all others" skipped 0 "there is no module"
    break
  fi
done
finish
exit $failed
