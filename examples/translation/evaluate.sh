#!/usr/bin/env bash
# Translates test sets with a trained model and scores them the two ways that published figures use: sacreBLEU on
# detokenised text, with its signature, and tokenised BLEU with compounds split at hyphens.
#
# usage: bash evaluate.sh DATA CHECKPOINTS OUT [options] [fairseq-generate flags]
#   DATA             the OUT folder of prepare-wmt14en2de.sh or prepare.sh, or any folder with binarised data in DATA/bin
#   CHECKPOINTS      a --save-dir, whose last epoch checkpoints are averaged, or one checkpoint file
#   OUT              folder for the averaged checkpoint, the translations and the logs of fairseq-generate
#   --last N         number of epoch checkpoints to average (default 10)
#   --testset NAME   newstest2010 ... newstest2016 (default newstest2014), or all: these seven and their average
#   --reference FILE for other data: the untokenised reference of fairseq's subset "test" (default DATA/test.LANG)
#   --bpe KIND       subword-nmt or sentencepiece (default: what DATA was prepared with)
# Beam 4 and length penalty 0.6 for newstest2014, 1.0 for the other newstests (Takase & Kiyono 2021).
set -euo pipefail

. "$(dirname -- "${BASH_SOURCE[0]}")/../common.sh"
die() { echo "evaluate: $*" >&2; exit 1; }

[ $# -ge 3 ] || usage
data=$1 checkpoints=$2 out=$3 last=10 testset='' reference='' bpe=''
paths data checkpoints out
shift 3
flags=()
while [ $# -gt 0 ]; do
  case $1 in
    --last | --testset | --reference | --bpe)
      [ $# -ge 2 ] || usage
      declare "${1#--}=$2"
      shift 2 ;;
    *) flags+=("$1"); shift ;;
  esac
done

[ -d "$data/bin" ] || die "$data/bin is missing; prepare the data first"
[ -e "$checkpoints" ] || die "$checkpoints is neither a folder of checkpoints nor a checkpoint"
language_pair "$data/bin" test
lang=$target

if [ -z "$bpe" ]; then
  bpe=$(sed -n 's/.*bpe=\([a-z-]*\).*/\1/p' "$data/options" 2> /dev/null || true)
fi
case ${bpe:=subword-nmt} in
  subword-nmt) post_process=subword_nmt ;;
  sentencepiece) post_process=sentencepiece ;;
  *) die "--bpe is subword-nmt or sentencepiece, not '$bpe'" ;;
esac

# fairseq's subset, a name for it, sacreBLEU's name or -, the reference
if [ -n "$reference" ] || [ ! -e "$data/testsets" ]; then
  [ -z "$testset" ] || die "--testset needs $data/testsets, which prepare-wmt14en2de.sh writes, and no --reference"
  sets="test test - ${reference:-$data/test.$lang}"
else
  sets=''
  while read -r subset name standard; do
    if [ "${testset:=newstest2014}" = all ] || [ "$name" = "$testset" ]; then
      sets+="$subset $name $standard $data/$name.$lang"$'\n'
    fi
  done < "$data/testsets"
  sets=${sets%$'\n'}
  [ -n "$sets" ] || die "no test set '$testset' in $data; there are: $(cut -d ' ' -f 2 "$data/testsets" | xargs)"
fi
while read -r _ _ _ reference; do
  [ -s "$reference" ] || die "the reference $reference is missing or empty; name it with --reference"
done <<< "$sets"

echo "to do: $source-$target, $(wc -l < <(while read -r _ _ _ file; do cat "$file"; done <<< "$sets")) sentences of" \
  "$(cut -d ' ' -f 2 <<< "$sets" | xargs) with beam 4, into $out" >&2
mkdir -p "$out"
model=$checkpoints
if [ -d "$checkpoints" ]; then
  model=$out/averaged.pt
  python3 "$root/scripts/average_checkpoints.py" \
    --inputs "$checkpoints" --num-epoch-checkpoints "$last" --output "$model" >&2
fi

lines() { grep "^$1-" "$out/$name.log" | cut -c 3- | sort -n -k 1,1 | cut -f "$2-"; } # fairseq's H or T, FIELD
split_compounds() { LC_ALL=C sed -E 's/([^[:space:]])-([^[:space:]])/\1 ##AT##-##AT## \2/g'; }

total=0 count=0
while read -r subset name standard reference; do
  hypothesis=$out/$name.$lang
  lenpen=1.0
  [ "$name" != newstest2014 ] || lenpen=0.6
  fairseq-generate "$data/bin" --user-dir "$user_dir" --path "$model" --gen-subset "$subset" --beam 4 \
    --lenpen "$lenpen" --max-tokens 4096 --post-process "$post_process" ${flags[@]+"${flags[@]}"} \
    > "$out/$name.log" 2> "$out/$name.err" < /dev/null ||
    die "fairseq-generate failed on $name ($out/$name.err): $(tail -n 1 "$out/$name.err")"
  lines H 3 > "$hypothesis.out"
  [ "$(wc -l < "$hypothesis.out")" -eq "$(wc -l < "$reference")" ] ||
    die "$hypothesis.out has $(wc -l < "$hypothesis.out") lines, the reference $reference $(wc -l < "$reference")"
  if [ "$bpe" = subword-nmt ]; then
    sacremoses -q -l "$lang" detokenize < "$hypothesis.out" > "$hypothesis"
    split_compounds < "$hypothesis.out" > "$out/$name.sys"
    lines T 2 | split_compounds > "$out/$name.ref"
  else
    mv "$hypothesis.out" "$hypothesis"
    sacremoses -q -l "$lang" tokenize < "$hypothesis" | split_compounds > "$out/$name.sys"
    sacremoses -q -l "$lang" tokenize < "$reference" | split_compounds > "$out/$name.ref"
  fi

  score='' against=$standard
  if [ "$standard" != - ]; then
    score=$(SACREBLEU=$data/sacrebleu sacrebleu -t "$standard" -l "$source-$lang" -i "$hypothesis" -w 2 -f text) ||
      echo "evaluate: sacreBLEU cannot read its test set $standard; scoring against $reference" >&2
  fi
  if [ -z "$score" ]; then
    against=$reference
    score=$(sacrebleu "$reference" -i "$hypothesis" -w 2 -f text)
  fi
  split=$(fairseq-score --sys "$out/$name.sys" --ref "$out/$name.ref" 2> /dev/null | grep '^BLEU4')
  echo "$name sacreBLEU against $against: $score"
  echo "$name tokenised, compounds split: $split"
  total=$(awk -v total="$total" -v score="$score" 'BEGIN { sub(/^[^=]* = /, "", score); print total + score }')
  count=$((count + 1))
done <<< "$sets"
if [ "$count" -gt 1 ]; then
  awk -v total="$total" -v n="$count" 'BEGIN { printf "average of %d sets, sacreBLEU: %.2f\n", n, total / n }'
fi
