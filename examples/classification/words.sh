#!/usr/bin/env bash
# Prepares texts with labels for --task sentence_prediction by words as they are, for models that start from random weights:
# no published encoder, no pieces.
#
# usage: bash words.sh TEXTS OUT [options]
#   TEXTS          folder with train.txt, dev.txt and test.txt: a line is a label, a tab or a space, and a text. Without dev.txt
#                  every 20th line of train.txt is held out for it; test.txt may be missing
#   OUT            new folder: OUT/bin for fairseq-train, and what it was made of
#   --words N      at most N words in the dictionary, the most frequent ones (default: all); the others are <unk>
#   --threshold N  words that train.txt has less than N times are <unk> (default 0)
#   --first N      the first N words of each text (default: all)
#   --lower        make texts lower-case
set -euo pipefail

. "$(dirname -- "${BASH_SOURCE[0]}")/../common.sh"
[ $# -ge 2 ] || usage
texts=$1 out=$2 words=-1 threshold=0 first=0 lower=''
paths texts out
shift 2
while [ $# -gt 0 ]; do
  case $1 in
    --lower) lower=yes; shift; continue ;;
    --words | --threshold | --first) [ $# -ge 2 ] || usage ;;
    *) usage ;;
  esac
  [[ $2 =~ ^[1-9][0-9]*$ ]] || die "$1 takes a positive number, not '$2'"
  declare "${1#--}=$2"
  shift 2
done
here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
[ -s "$texts/train.txt" ] || die "$texts/train.txt is missing or empty"
[ ! -e "$out" ] || die "$out exists and is left as it is: name another folder"

part=$out.part
rm -rf "$part"
mkdir -p "$part/text"
python3 -c 'import pathlib, sys
sys.path.insert(0, sys.argv[1])
from texts import read_texts
from fairseq_adaptive.command import run
from fairseq_adaptive.errors import UsageError
source, target, first, lower = pathlib.Path(sys.argv[2]), pathlib.Path(sys.argv[3]), int(sys.argv[4]), sys.argv[5]
def write(name, rows):
    rows = list(rows)
    if not rows:
        raise UsageError(f"there are no texts for {name}")
    cut = [(text.lower() if lower else text).split()[: first or None] for _, text in rows]
    (target / f"{name}.label").write_text("".join(f"{label}\n" for label, _ in rows), encoding="utf-8")
    (target / f"{name}.input0").write_text("".join(" ".join(text) + "\n" for text in cut), encoding="utf-8")
def main():
    train, dev = list(read_texts(source / "train.txt")), source / "dev.txt"
    write("train", train if dev.is_file() else (row for number, row in enumerate(train, 1) if number % 20))
    write("dev", read_texts(dev) if dev.is_file() else train[19::20])
    if (source / "test.txt").is_file():
        write("test", read_texts(source / "test.txt"))
run(main)' "$here" "$texts" "$part/text" "$first" "$lower"

for kind in input0 label; do
  flags=(--trainpref "$part/text/train.$kind" --validpref "$part/text/dev.$kind")
  [ ! -f "$part/text/test.$kind" ] || flags+=(--testpref "$part/text/test.$kind")
  if [ $kind = label ]; then flags+=(--padding-factor 1); else flags+=(--nwordssrc "$words" --thresholdsrc "$threshold"); fi
  fairseq-preprocess --only-source "${flags[@]}" --destdir "$part/bin/$kind" --workers 1
done
mv "$part" "$out"
