#!/usr/bin/env bash
# Prepares questions and answers for --task question_answering: a folder with the model's dictionary and vocabulary, and
# both parts of the data, which are checked and stay JSON: the task cuts them into windows itself.
#
# usage: bash prepare.sh MODEL TOKENIZER OUT TRAIN [VALID] [--cased]
#   MODEL      folder that scripts/convert_checkpoint.py made: checkpoint.pt and dict.txt
#   TOKENIZER  folder with the model's vocab.txt, or vocab.json and merges.txt
#   OUT        new folder
#   TRAIN      JSON in the format of SQuAD v1.1 or v2.0
#   VALID      likewise; without it a tenth of TRAIN's questions is held out, by article
#   --cased    vocab.txt distinguishes upper and lower case
set -euo pipefail

. "$(dirname -- "${BASH_SOURCE[0]}")/../common.sh"
cased=()
if [ "${!#}" = --cased ]; then
  cased=(--cased)
  set -- "${@:1:$#-1}"
fi
[ $# -eq 4 ] || [ $# -eq 5 ] || usage
model=$1 tokenizer=$2 out=$3 train=$4 valid=${5-}
paths model tokenizer out train ${valid:+valid}
here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
for file in "$model/dict.txt" "$train" ${valid:+"$valid"}; do
  [ -s "$file" ] || { echo "error: $file is missing or empty" >&2; exit 1; }
done
[ ! -e "$out" ] || { echo "error: $out exists and is left as it is: name another folder" >&2; exit 1; }

part=$out.part
rm -rf "$part"
trap 'rm -rf "$part"' EXIT
mkdir -p "$part"
cp "$model/dict.txt" "$part"
for file in vocab.txt vocab.json merges.txt; do
  [ ! -f "$tokenizer/$file" ] || cp "$tokenizer/$file" "$part"
done
if [ -n "$valid" ]; then
  cp "$train" "$part/train.json"
  cp "$valid" "$part/valid.json"
else
  python3 "$here/split.py" "$train" "$part/train.json" "$part/valid.json"
fi
python3 "$here/count_windows.py" "$part" ${cased[@]+"${cased[@]}"} > "$part/windows" || exit 1
echo "$(< "$part/windows") windows to train on"
mv "$part" "$out"
