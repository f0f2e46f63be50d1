#!/usr/bin/env bash
# Prepares texts of one sentence with labels for --task sentence_prediction: word pieces, then fairseq's binary files.
#
# usage: bash prepare.sh TEXTS MODEL TOKENIZER OUT [encode.py flags]
#   TEXTS      folder with train.txt and dev.txt (and test.txt, if there is one): a line is a label, a tab or a space,
#              and a text
#   MODEL      folder that scripts/convert_checkpoint.py made: checkpoint.pt and dict.txt
#   TOKENIZER  folder with the model's vocab.txt, or vocab.json and merges.txt
#   OUT        new folder
set -euo pipefail

usage() { sed -n '2,9s/^# \{0,1\}//p' "$0" >&2; exit 2; }
[ $# -ge 4 ] || usage
texts=$1 model=$2 tokenizer=$3 out=$4
shift 4
here=$(cd "$(dirname "$0")" && pwd)
for file in "$texts/train.txt" "$texts/dev.txt" "$model/dict.txt"; do
  [ -f "$file" ] || { echo "error: there is no $file" >&2; exit 1; }
done
[ ! -e "$out" ] || { echo "error: $out exists and is left as it is: name another folder" >&2; exit 1; }

words=$(realpath "$model/dict.txt")
mkdir -p "$out/text"
splits=(--trainpref train --validpref dev)
for split in train dev test; do
  [ -f "$texts/$split.txt" ] || continue
  python "$here/encode.py" "$texts/$split.txt" --tokenizer "$tokenizer" --output "$out/text/$split" "$@"
  [ "$split" != test ] || splits+=(--testpref test)
done
cd "$out/text"
for part in input0 label; do
  pairs=()
  for ((i = 0; i < ${#splits[@]}; i += 2)); do pairs+=("${splits[i]}" "${splits[i + 1]}.$part"); done
  dictionary=()
  [ "$part" = label ] || dictionary=(--srcdict "$words")
  fairseq-preprocess --only-source "${pairs[@]}" "${dictionary[@]}" --destdir "../bin/$part" --workers 1
done
