#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Builds fuzz_stages.cpp with clang's libFuzzer, address and undefined-behavior sanitizers, and
# runs it:  csrc/tests/fuzz.sh FOLDER [libFuzzer options, default -max_total_time=60]
# FOLDER gets the build, the corpus and, if there is a finding, the input that makes it again.
set -euo pipefail
folder=$(mkdir -p "$1" && cd "$1" && pwd)
shift
cd "$(dirname "$0")/.."
flags=(-std=c++17 -O1 -g -fno-omit-frame-pointer -fno-sanitize-recover=all -DTRANSDUCER_X86_DISPATCH
       -fsanitize=fuzzer-no-link,address,undefined -Wall -Wextra -Werror -Wno-psabi
       -Wno-missing-field-initializers -pthread)
sources=(additive_scores_cpu cell_scores_cpu coarse_to_fine_cpu duration_lattice_cpu lattice_cpu
         logits_grad_cpu joint_tile_cpu normalizer_repair_cpu occupancy_cpu parallel prune_windows_cpu
         row_kernels row_kernels_baseline row_kernels_avx2 row_kernels_avx512 tests/fuzz_stages)
objects=()
for source in "${sources[@]}"; do
  object="$folder/$(basename "$source").o"
  extra=()
  case $source in
    *_avx2) extra=(-mavx2 -mfma -mf16c) ;;
    *_avx512) extra=(-mavx512f -mavx512dq -mavx512bw -mavx512vl -mfma -mf16c) ;;
  esac
  if [ -n "$(find . -name '*.h' -newer "$object" 2>&1)" ] || [ "$source.cpp" -nt "$object" ]; then
    "${CXX:-clang++}" "${flags[@]}" "${extra[@]}" -c "$source.cpp" -o "$object"
  fi
  objects+=("$object")
done
"${CXX:-clang++}" -fsanitize=fuzzer,address,undefined -pthread "${objects[@]}" -o "$folder/fuzz_stages"
mkdir -p "$folder/corpus"
exec "$folder/fuzz_stages" "$folder/corpus" -artifact_prefix="$folder/" -max_len=4096 \
  -timeout=30 -print_final_stats=1 "${@:--max_total_time=60}"
