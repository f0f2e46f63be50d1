#!/usr/bin/env bash
# Prepares texts with labels for --task sentence_prediction: word pieces, then fairseq's binary files.
#
# usage: bash prepare.sh TEXTS MODEL TOKENIZER OUT [encode.py flags]
#   TEXTS      folder with train.txt, dev.txt and test.txt: a line is a label, a tab or a space, and a text; with
#              --pairs a label, a tab, a text, a tab and a text. Without dev.txt every 20th line of train.txt is held
#              out for it; test.txt may be missing
#   MODEL      folder with the model's dict.txt, such as scripts/convert_checkpoint.py makes
#   TOKENIZER  folder with the model's vocab.txt, or vocab.json and merges.txt; or its SentencePiece model, a file
#   OUT        new folder: OUT/bin for fairseq-train and scripts/predict.py, and what it was made of
#   flags      --pairs (pairs of texts), --regression (labels are numbers), --cased, --max-length N
set -euo pipefail

. "$(dirname -- "${BASH_SOURCE[0]}")/../common.sh"
[ $# -ge 4 ] || usage
texts=$1 model=$2 tokenizer=$3 out=$4
paths texts model tokenizer out
shift 4
here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
for file in "$texts/train.txt" "$model/dict.txt"; do
  [ -s "$file" ] || { echo "error: $file is missing or empty" >&2; exit 1; }
done
[ ! -e "$out" ] || { echo "error: $out exists and is left as it is: name another folder" >&2; exit 1; }

words=$(realpath "$model/dict.txt")
part=$out.part
rm -rf "$part"
mkdir -p "$part/text"
if [ -f "$texts/dev.txt" ]; then
  cp "$texts/train.txt" "$texts/dev.txt" "$part/text"
else
  awk 'NR % 20 != 0' "$texts/train.txt" > "$part/text/train.txt"
  awk 'NR % 20 == 0' "$texts/train.txt" > "$part/text/dev.txt"
fi
[ ! -f "$texts/test.txt" ] || cp "$texts/test.txt" "$part/text"
for file in "$part"/text/*.txt; do
  [ -s "$file" ] || { echo "error: there are no texts for $(basename "$file")" >&2; exit 1; }
done
python3 "$here/encode.py" "$part"/text/*.txt --tokenizer "$tokenizer" --dictionary "$words" "$@"

binarise() { # KIND [fairseq-preprocess flags]
  local kind=$1 flags=(--trainpref "$part/text/train.$1" --validpref "$part/text/dev.$1")
  [ ! -f "$part/text/test.txt" ] || flags+=(--testpref "$part/text/test.$kind")
  shift
  fairseq-preprocess --only-source "${flags[@]}" --destdir "$part/bin/$kind" --workers 1 "$@"
}

binarise input0 --srcdict "$words"
[ ! -f "$part/text/train.input1" ] || binarise input1 --srcdict "$words"
if [[ " $* " == *" --regression "* ]]; then # the task reads numbers from text
  mkdir "$part/bin/label"
  cp "$part/text/train.label" "$part/bin/label/train.label"
  cp "$part/text/dev.label" "$part/bin/label/valid.label"
  [ ! -f "$part/text/test.label" ] || cp "$part/text/test.label" "$part/bin/label/test.label"
else
  binarise label --padding-factor 1
fi
for file in vocab.txt vocab.json merges.txt; do
  [ ! -f "$tokenizer/$file" ] || cp "$tokenizer/$file" "$part/bin/$file"
done
[ ! -f "$tokenizer" ] || cp "$tokenizer" "$part/bin/spiece.model"
mv "$part" "$out"
