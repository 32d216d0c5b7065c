#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# A stage of all.sh: trains the default recipe on the GPU by transducer-train, in float32 and, for
# some steps, in bfloat16; transcribes a file with the first model, on the GPU and on the CPU.
source "$(dirname "$0")/common.sh"
if ! $PYTHON -c 'import hydra, lightning, soundfile, soxr, jiwer, espeakng_loader' 2>"$WORK/lack"; then
  echo "figures: $(tail -n 1 "$WORK/lack")"
  exit 77
fi
accelerator=gpu device=cuda workers=8 steps=300
options=()
if [ "${DRY:-}" = 1 ]; then
  accelerator=cpu device=cpu workers=1 steps=4
  options=(data.corpus.num_train=20 +data.corpus.num_val=4 +data.corpus.num_test=4)
  options+=(+data.corpus.num_excluded=4 +data.corpus.num_held_out=4 callbacks.checkpoint.save_top_k=1)
fi
options+=("trainer.accelerator=$accelerator" "data.num_workers=$workers")
options+=("data.corpus.cache_dir=$WORK/corpora")
digits=$PWD/.gpu_kit/digits
if [ -d "$digits" ]; then options+=("+data.corpus.asterisk_digits_dir=$digits"); fi
train() { $PYTHON -m transducer_toolkit.cli.train "${options[@]}" "$@"; }
train "trainer.max_epochs=${EPOCHS:-1}" "hydra.run.dir=$WORK/float32"
train trainer.precision=bf16-mixed trainer.max_steps=$steps test=false "hydra.run.dir=$WORK/bfloat16"
for where in $device cpu; do
  $PYTHON -m transducer_toolkit.cli.transcribe --device $where \
    --checkpoint "$WORK/float32/checkpoints/best.ckpt" "$digits/7.wav" | tee "$WORK/said.$where"
done
$PYTHON - "$WORK" <<'PYTHON_END'
import json, sys
from pathlib import Path

work = Path(sys.argv[1])
float32, bfloat16 = (
    json.loads((work / name / "results.json").read_text()) for name in ("float32", "bfloat16")
)
for results in float32, bfloat16:
    print(json.dumps(results, indent=1))
ms = [
    f"{1000 * (results['seconds_per_step'] or float('nan')):.1f}" for results in (float32, bfloat16)
]
errors = ", ".join(f"{name} {100 * wer:.2f}" for name, wer in float32["test_wer"].items())
print(
    f"figures: {float32['optimizer_steps']} steps of {ms[0]} ms; WER in %: {errors}; "
    f"bfloat16: {bfloat16['optimizer_steps']} steps of {ms[1]} ms"
)
PYTHON_END
cmp "$WORK/said.$device" "$WORK/said.cpu"
