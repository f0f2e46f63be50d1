#!/usr/bin/env bash
# Prepares Multi30k English-German the way its published text-only baselines do (Wu et al., ACL 2021): Moses
# tokenisation, lower case, one joint BPE of 10,000 merges, one dictionary for both languages.
#
# usage: bash prepare-multi30k.sh RAW OUT
#   RAW  a folder with {train,valid,test}.{en,de}, one sentence a line
#   OUT  a new folder; gets OUT/bin for fairseq-train and OUT/{train,valid,test}.{en,de} tokenised
set -euo pipefail

if [ $# -ne 2 ]; then
  sed -n '2,8s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi
raw=$1 out=$2 merges=10000

for split in train valid test; do
  for lang in en de; do
    [ -s "$raw/$split.$lang" ] || { echo "prepare-multi30k: $raw/$split.$lang is missing or empty" >&2; exit 1; }
  done
  [ "$(wc -l < "$raw/$split.en")" -eq "$(wc -l < "$raw/$split.de")" ] ||
    { echo "prepare-multi30k: $raw/$split.en and $raw/$split.de differ in their number of lines" >&2; exit 1; }
done
if [ -e "$out/bin" ]; then
  echo "prepare-multi30k: $out/bin exists already; remove it or name another folder" >&2
  exit 1
fi

mkdir -p "$out"
for split in train valid test; do
  for lang in en de; do
    sacremoses -q -l "$lang" tokenize < "$raw/$split.$lang" |
      python3 -c 'import sys; sys.stdout.writelines(line.lower() for line in sys.stdin)' > "$out/$split.$lang"
  done
done
cat "$out"/train.{en,de} | subword-nmt learn-bpe -s "$merges" > "$out/codes"
for split in train valid test; do
  for lang in en de; do
    subword-nmt apply-bpe -c "$out/codes" < "$out/$split.$lang" > "$out/$split.bpe.$lang"
  done
done
fairseq-preprocess --source-lang en --target-lang de --joined-dictionary --workers 2 \
  --trainpref "$out/train.bpe" --validpref "$out/valid.bpe" --testpref "$out/test.bpe" --destdir "$out/bin"
