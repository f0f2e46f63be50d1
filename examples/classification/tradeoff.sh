#!/usr/bin/env bash
# Accuracy against measured time: a dense model, then models that skim more and more, each fine-tuned from the one before,
# and all of them timed in turn. On a CPU, in bfloat16; what is there already is left as it is.
#
# usage: bash tradeoff.sh TASK DATA MODEL OUT SUBSET [seed...]
#   TASK     SST-2 or 20news
#   DATA     the OUT folder of prepare.sh
#   MODEL    checkpoint of MiniLM that scripts/convert_checkpoint.py made
#   OUT      folder for the checkpoints and logs, and for results.json
#   SUBSET   the texts that are scored and timed: valid or test
#   seed     of the trainings (default: 1)
set -euo pipefail

. "$(dirname -- "${BASH_SOURCE[0]}")/../common.sh"
[ $# -ge 5 ] || usage
task=$1 data=$2 model=$3 out=$4 subset=$5
paths data model out
shift 5
[ $# -gt 0 ] || set -- 1
# epochs of the dense model and of every stage, and what the stages steer to
case $task in
  SST-2) epochs=3 stage_epochs=3 batch=64 targets=(0.6 0.45) texts=256 ;;
  20news) epochs=3 stage_epochs=1 batch=32 targets=(0.35 0.22) texts=64 ;; # texts that are timed
  *) usage ;;
esac
here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
[ -f "$data/text/train.input0" ] || { echo "error: $data/text/train.input0 is missing: run prepare.sh" >&2; exit 1; }
[ ! -e "$out/results.json" ] || { echo "error: $out/results.json exists and is left as it is" >&2; exit 1; }
updates=$((($(wc -l < "$data/text/train.input0") + batch - 1) / batch))
mkdir -p "$out"

fine_tune() { # NAME FROM EPOCHS dense|skim [flags]
  local name=$1 from=$2 epochs=$3 kind=$4
  shift 4
  if [ ! -f "$out/$name/finished" ]; then
    bash "$here/train.sh" "$data" "$from" transkimmer_minilm_l6 "$task" "$out/$name" "$kind" \
      --cpu --bf16 --num-workers 0 --lr 1e-4 --attention-dropout 0 --max-epoch "$epochs" \
      --total-num-update $((updates * epochs)) --warmup-updates $((updates * epochs / 10)) "$@" &> "$out/$name.log"
    touch "$out/$name/finished"
  fi
  grep 'valid on' "$out/$name.log" | tail -n 1
}

dense=() names=()
for seed in "$@"; do
  fine_tune "dense-$seed" "$model" "$epochs" dense --seed "$seed"
  dense+=("$out/dense-$seed/checkpoint_best.pt")
  from=$out/dense-$seed/checkpoint_best.pt warmup=$((updates * stage_epochs / 2))
  for target in "${targets[@]}"; do
    fine_tune "flops-$target-$seed" "$from" "$stage_epochs" skim --seed "$seed" --distill-from "${dense[-1]}" \
      --target-flops "$target" --target-flops-gain 2 --target-flops-rate 0.03 --skim-warmup-updates "$warmup" \
      --skim-bias 1.5 --skim-noise 0
    from=$out/flops-$target-$seed/checkpoint_last.pt warmup=0
  done
done
for target in "${targets[@]}"; do
  checkpoints=''
  for seed in "$@"; do checkpoints+=,$out/flops-$target-$seed/checkpoint_last.pt; done
  names+=("$target=${checkpoints:1}")
done
dense=$(IFS=,; echo "${dense[*]}")
python3 "$here/../../scripts/benchmark/classification.py" "$data/bin" "dense=$dense" "${names[@]}" --subset "$subset" \
  --batch-sizes 1 8 32 --timed-texts "$texts" --rounds 3 --output "$out/results.json"
