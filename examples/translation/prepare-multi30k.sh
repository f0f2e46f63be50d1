#!/usr/bin/env bash
# Prepares Multi30k English-German the way its published text-only baselines do (Wu et al., ACL 2021): Moses
# tokenisation, lower case, one joint BPE of 10,000 merges, one dictionary for both languages.
#
# usage: bash prepare-multi30k.sh RAW OUT [SOURCE TARGET]
#   RAW             a folder with {train,valid,test}.{SOURCE,TARGET}, one sentence a line
#   OUT             a new folder; gets OUT/bin for fairseq-train and OUT/{train,valid,test}.{SOURCE,TARGET} tokenised; if
#                   this script was interrupted, the same command goes on where it stopped
#   SOURCE, TARGET  languages, by the names that Moses has for them (default: en de)
set -euo pipefail

. "$(dirname -- "${BASH_SOURCE[0]}")/../common.sh"
[ $# -eq 2 ] || [ $# -eq 4 ] || usage
raw=$1 out=$2 source=${3:-en} target=${4:-de} merges=10000
paths raw out
die() { echo "prepare-multi30k: $*" >&2; exit 1; }
for lang in "$source" "$target"; do
  [[ $lang =~ ^[A-Za-z_]+$ ]] || die "a language is letters, not '$lang'"
done
[ "$source" != "$target" ] || die "SOURCE and TARGET are both $source"
for split in train valid test; do
  for lang in "$source" "$target"; do
    [ -s "$raw/$split.$lang" ] || die "$raw/$split.$lang is missing or empty"
  done
  [ "$(wc -l < "$raw/$split.$source")" -eq "$(wc -l < "$raw/$split.$target")" ] ||
    die "$raw/$split.$source and $raw/$split.$target differ in their number of lines"
done
[ ! -e "$out/bin" ] || die "$out/bin exists already; remove it or name another folder"

tokenize() { # LANG FILE
  sacremoses -q -l "$1" tokenize < "$2" |
    python3 -c 'import sys; sys.stdout.writelines(line.lower() for line in sys.stdin)'
}
learn_bpe() { cat "$out/train.$source" "$out/train.$target" | subword-nmt learn-bpe -s "$merges"; }
apply_bpe() { subword-nmt apply-bpe -c "$out/codes" < "$1"; } # FILE

options="pair=$source-$target text=$(cat "$raw"/{train,valid,test}.{"$source","$target"} | cksum)"
if [ -e "$out/options" ] && [ "$(< "$out/options")" != "$options" ]; then
  die "$out was begun with $(< "$out/options"); remove it or name another folder"
fi
echo "to do: $source-$target, $(wc -l < "$raw/train.$source") pairs, lower case, a joint BPE of $merges, into $out" >&2
mkdir -p "$out"
echo "$options" > "$out/options"
for split in train valid test; do
  for lang in "$source" "$target"; do make "$out/$split.$lang" tokenize "$lang" "$raw/$split.$lang"; done
done
make "$out/codes" learn_bpe
for split in train valid test; do
  for lang in "$source" "$target"; do make "$out/$split.bpe.$lang" apply_bpe "$out/$split.$lang"; done
done
rm -rf "$out/bin.part"
fairseq-preprocess --source-lang "$source" --target-lang "$target" --joined-dictionary --workers 2 \
  --trainpref "$out/train.bpe" --validpref "$out/valid.bpe" --testpref "$out/test.bpe" --destdir "$out/bin.part"
mv "$out/bin.part" "$out/bin"
