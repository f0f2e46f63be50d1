#!/usr/bin/env bash
# Texts of your own to a model that skims them, in one command: looks at the texts, converts a published encoder, prepares the
# data, fine-tunes the dense model and then one that skims, which learns from it, and scores both. Says first what it will do,
# and refuses what would fail later. A second call goes on where the first one stopped.
#
# usage: bash own.sh TEXTS ENCODER OUT [options] [fairseq-train flags]
#   TEXTS             folder with train.txt: a line is a label, a tab or a space, and a text; and dev.txt and test.txt if there
#                     are any (without dev.txt every 20th line of train.txt is held out for it)
#   ENCODER           folder of a published BERT or RoBERTa: config.json, weights and vocabulary
#   OUT               new folder for everything: OUT/skim/checkpoint_best.pt is what fairseq-adaptive predict takes
#   --pairs           a line has two texts: a label, a tab, a text, a tab and a text
#   --cased           vocab.txt distinguishes upper and lower case
#   --epochs N        of each of the two trainings (default 3)
#   --batch-size N    texts an update (default 32)
#   --target-flops X  share of the dense model's FLOPs to skim down to (default 0.5)
#   --arch ARCH       of the encoder, where it is not one that has a preset
#   flags             of both trainings: --cpu --bf16 on a CPU, --lr X (default 2e-5, MiniLM 1e-4), --seed N
set -euo pipefail

. "$(dirname -- "${BASH_SOURCE[0]}")/../common.sh"
[ $# -ge 3 ] || usage
texts=$1 encoder=$2 out=$3 epochs=3 batch=32 flops=0.5
paths texts encoder out
shift 3
look=() encode=() flags=()
while [ $# -gt 0 ]; do
  case $1 in
    --pairs) look+=("$1"); encode+=("$1"); shift; continue ;;
    --cased) encode+=("$1"); shift; continue ;;
    --epochs | --batch-size | --target-flops | --arch) [ $# -ge 2 ] || usage ;;
    *) flags+=("$1"); shift; continue ;;
  esac
  case $1 in
    --epochs) epochs=$2; look+=("$1" "$2") ;;
    --batch-size) batch=$2; look+=("$1" "$2") ;;
    --target-flops) flops=$2 ;;
    --arch) look+=("$1" "$2") ;;
  esac
  shift 2
done
[[ $flops =~ ^(0?\.[0-9]*[1-9][0-9]*|1(\.0*)?)$ ]] || die "--target-flops is a share of 1, not '$flops'"
here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
found=$(python3 "$here/describe.py" "$texts" "$encoder" ${look[@]+"${look[@]}"})
read -r classes format arch updates <<< "$found"
settings="text=$(cat "$texts"/*.txt | cksum) arch=$arch epochs=$epochs batch=$batch flops=$flops encode=${encode[*]-} flags=${flags[*]-}"
if [ -e "$out/settings" ] && [ "$(< "$out/settings")" != "$settings" ]; then
  die "$out was begun with other texts or options ($(< "$out/settings")): name another folder"
fi
if [ ! -e "$out/settings" ] && [ -e "$out" ]; then die "$out exists and is left as it is: name another folder"; fi
mkdir -p "$out"
echo "$settings" > "$out/settings"

step() { printf '\n== %s  [%d min %02d s]\n' "$1" $((SECONDS / 60)) $((SECONDS % 60)); }
logged() { # NAME COMMAND...: with its output in OUT/NAME.log, whose end is shown where it fails
  local log=$out/$1.log
  shift
  "$@" >> "$log" 2>&1 || { tail -n 15 "$log" >&2; die "${2##*/} failed; all it said is in $log"; }
}
lr=2e-5
[ "$arch" != transkimmer_minilm_l6 ] || lr=1e-4
fine_tune() { # NAME FROM dense|skim [flags]
  local name=$1 from=$2 kind=$3
  shift 3
  if [ ! -e "$out/$name/finished" ]; then
    logged "$name" bash "$here/train.sh" "$out/data" "$from" "$arch" "$classes" "$out/$name" "$kind" \
      --batch-size "$batch" --max-epoch "$epochs" --lr "$lr" --lr-scheduler polynomial_decay \
      --total-num-update "$updates" --warmup-updates $((updates / 10)) "$@" ${flags[@]+"${flags[@]}"}
    touch "$out/$name/finished"
  fi
  grep 'valid on' "$out/$name.log" | tail -n 1 || true
}

step "1/5 encoder"
[ -e "$out/encoder" ] ||
  logged encoder python3 "$root/scripts/convert_checkpoint.py" --format "$format" --input "$encoder" --output "$out/encoder"
step "2/5 word pieces and binary files"
[ -e "$out/data" ] ||
  logged data bash "$here/prepare.sh" "$texts" "$out/encoder" "$encoder" "$out/data" ${encode[@]+"${encode[@]}"}
step "3/5 dense model"
fine_tune dense "$out/encoder/checkpoint.pt" dense
step "4/5 skimming model, $flops of its FLOPs"
fine_tune skim "$out/dense/checkpoint_best.pt" skim --distill-from "$out/dense/checkpoint_best.pt" --target-flops "$flops"
step "5/5 scores"
task=SST-2 # whose metric is accuracy, as RTE's of pairs
[[ " ${encode[*]-} " != *" --pairs "* ]] || task=RTE
cased=()
[[ " ${encode[*]-} " != *" --cased "* ]] || cased=(--cased)
for name in dense skim; do
  echo "$name:"
  python3 "$here/evaluate.py" "$task" "$out/data/text" --path "$out/$name/checkpoint_best.pt" --data "$out/data/bin" \
    ${cased[@]+"${cased[@]}"}
done
step "done: fairseq-adaptive predict $out/skim/checkpoint_best.pt"
