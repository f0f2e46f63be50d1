#!/usr/bin/env bash
# Writes sheets of nested additions (sheets.py), and fairseq's binary files of them for --task sentence_prediction.
#
# usage: bash prepare.sh OUT [sheets.py flags]
#   OUT    new folder: OUT/text, and OUT/bin for fairseq-train. Subset `test` has sheets of every trained depth, those of valid's
#          kind; `test1`, `test2` ... have the sheets of that nesting depth
#   flags  --train N, --dev N, --test N (sheets), --trained D, --deepest D (nesting depths), --cells N, --seed N
set -euo pipefail

. "$(dirname -- "${BASH_SOURCE[0]}")/../common.sh"
[ $# -ge 1 ] || usage
out=$1
paths out
shift
here=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
[ ! -e "$out" ] || die "$out exists and is left as it is: name another folder"

part=$out.part
rm -rf "$part"
mkdir -p "$part"
python3 "$here/sheets.py" "$part/text" "$@"
for kind in input0 label; do
  tests=$part/text/dev.$kind # fairseq numbers test sets from the second one on
  for ((depth = 1; ; depth++)); do
    [ -e "$part/text/depth-$depth.$kind" ] || break
    tests+=,$part/text/depth-$depth.$kind
  done
  flags=()
  [ $kind = input0 ] || flags=(--padding-factor 1)
  fairseq-preprocess --only-source --trainpref "$part/text/train.$kind" --validpref "$part/text/dev.$kind" --testpref "$tests" \
    --destdir "$part/bin/$kind" --workers 1 ${flags[@]+"${flags[@]}"}
done
mv "$part" "$out"
