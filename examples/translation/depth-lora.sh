#!/usr/bin/env bash
# How much of the BLEU that sharing layers costs do low-rank differences win back? A plain Transformer is trained, gets shared
# layers (fairseq-adaptive convert --format fairseq), with differences of rank R and without, and trains on for a tenth of its
# updates. Every step is scored on the test set. What is finished is not done again.
#
# usage: bash depth-lora.sh DATA RAW OUT [options]
#   DATA          the OUT folder of prepare-multi30k.sh
#   RAW           its input
#   OUT           folder for models and scores; gets scores.tsv
#   --seeds A,B   of the trainings (default: 1,2,3)
#   --updates N   of the plain model, at least 10 (default: 2000)
#   --layers N    of it, in encoder and decoder (default: 6)
#   --share M     layers after sharing, in encoder and decoder (default: 3)
#   --rank R      of the differences (default: 8)
#   --lr X        of the trainings that go on (default: 0.001)
set -euo pipefail

. "$(dirname -- "${BASH_SOURCE[0]}")/../common.sh"
here=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
[ $# -ge 3 ] || usage
data=$1 raw=$2 out=$3 seeds=1,2,3 updates=2000 layers=6 share=3 rank=8 lr=0.001
paths data raw out
shift 3
while [ $# -gt 0 ]; do
  [ $# -ge 2 ] || usage
  case $1 in
    --seeds) seeds=$2 ;;
    --updates) updates=$2 ;;
    --layers) layers=$2 ;;
    --share) share=$2 ;;
    --rank) rank=$2 ;;
    --lr) lr=$2 ;;
    *) usage ;;
  esac
  shift 2
done
for number in "$updates" "$layers" "$share" "$rank" ${seeds//,/ }; do
  [[ $number =~ ^[1-9][0-9]*$ ]] || die "'$number' is not a number above 0"
done
[ "$updates" -ge 10 ] || die "--updates $updates: a tenth of them is none, take at least 10"
[ "$share" -lt "$layers" ] || die "--share $share shares nothing: the model has $layers layers"
language_pair "$data/bin" test

bleu() { # NAME: tokenised BLEU of a model on the test set
  make "$out/$1/bleu" bash "$here/evaluate-multi30k.sh" "$data" "$raw" "$out/$1"
  sed -n 's/^BLEU[^=]* = \([0-9.]*\) .*/\1/p' "$out/$1/bleu" | head -n 1
}
train() { # NAME ROW SEED UPDATES flags
  local name=$1 row=$2 seed=$3 count=$4
  shift 4
  [ ! -e "$out/$name/trained" ] || return 0
  bash "$here/train-multi30k.sh" "$data" "$out/$name" "$row" --seed "$seed" --max-update "$count" --total-num-update "$count" \
    --warmup-updates $(((count + 9) / 10)) --no-epoch-checkpoints "$@" >> "$out/$name.log" 2>&1 || die "see $out/$name.log"
  touch "$out/$name/trained"
}
convert() { # NAME FROM RANK
  [ ! -e "$out/$1" ] || return 0
  rm -rf "$out/$1.part"
  fairseq-adaptive convert --format fairseq --input "$out/$2/checkpoint_last.pt" --share "$share" --schedule cycle \
    --depth-lora-rank "$3" --output "$out/$1.part"
  mv "$out/$1.part/checkpoint.pt" "$out/$1.part/checkpoint_last.pt"
  mv "$out/$1.part" "$out/$1"
}

mkdir -p "$out"
scores=$out/scores.tsv
columns="seed\tplain\tshared\tshared, trained on\trank $rank\trank $rank, trained on\twon back"
printf '%b\n' "$columns" > "$scores.part"
for seed in ${seeds//,/ }; do
  train "plain-$seed" "vanilla-$layers" "$seed" "$updates"
  line=$seed$'\t'$(bleu "plain-$seed")
  for r in 0 "$rank"; do
    convert "converted-$r-$seed" "plain-$seed" "$r"
    train "tuned-$r-$seed" "cycle-$share-$layers" "$seed" $((updates / 10)) --lr "$lr" --depth-lora-rank "$r" \
      --finetune-from-model "$out/converted-$r-$seed/checkpoint_last.pt"
    line+=$'\t'$(bleu "converted-$r-$seed")$'\t'$(bleu "tuned-$r-$seed")
  done
  awk -F '\t' '{ lost = $2 - $3; won = lost ? ($6 - $3) / lost : 1; printf "%s\t%.1f%%\n", $0, 100 * won }' <<< "$line" |
    tee -a "$scores.part"
done
mv "$scores.part" "$scores"
echo "wrote $scores"
