#!/usr/bin/env bash
# Prepares a text for language modelling: WikiText-2, WikiText-103, enwik8, or text of your own.
#
# usage: bash prepare.sh DATASET RAW OUT [options]
#   DATASET            wikitext-2, wikitext-103, enwik8 or text
#   RAW                folder of the archive, which is downloaded if it is not there (4 MB, 180 MB, 35 MB), and resumed
#                      if interrupted; for text, of your own train.txt, valid.txt and test.txt (UTF-8, tokens between
#                      spaces for a word-level model)
#   OUT                new folder; gets OUT/bin for fairseq-train and OUT/{train,valid,test}.txt, the raw text; if this
#                      script was interrupted, the same command goes on where it stopped
#   --sentencepiece N  N pieces instead of words; WikiText is then the raw one, without <unk>. Learned from train.txt
#   --threshold N      words that train.txt has less than N times become <unk> (default 0)
#   --workers N        processes (default: one per processor)
#   --mirror URL       download from URL/NAME
#   --checksums FILE   "CHECKSUM  NAME" lines (SHA-256 or MD5) in place of the published ones, for other archives of the
#                      same layout
# Each line ends with one token </s>, blank lines, too. enwik8 is read as bytes, 90%, 5% and 5% of it.
set -euo pipefail

# The first home of WikiText (research.metamind.io) is closed; its first author serves the same archives. SHA-256: as
# public data loaders record them.
published='92675f1d63015c1c8b51f1656a52d5bdbc33aafa60cc47a218a66e7ee817488c  wikitext-2-v1.zip
ef7edb566e3e2b2d31b29c1fdb0c89a4cc683597484c3dc2517919c615435a11  wikitext-2-raw-v1.zip
242ba0f20b329cfdf1ccc61e9e9e5b59becf189db7f7a81cd2a0e2fc31539590  wikitext-103-v1.zip
91c00ae287f0d699e18605c84afc9e45c192bc6b7797ff8837e5474655a33794  wikitext-103-raw-v1.zip
547994d9980ebed1288380d652999f38a14fe291a6247c157c3d33d4932534bc  enwik8.zip'

. "$(dirname -- "${BASH_SOURCE[0]}")/../common.sh"
die() { echo "prepare: $*" >&2; exit 1; }
. "$(dirname "${BASH_SOURCE[0]}")/../download.sh"

[ $# -ge 3 ] || usage
dataset=$1 raw=$2 out=$3 sentencepiece=0 threshold=0 workers=$(nproc) mirror='' checksums=''
paths raw out
shift 3
while [ $# -gt 0 ]; do
  [ $# -ge 2 ] || usage
  case $1 in
    --sentencepiece) sentencepiece=$2 ;;
    --threshold) threshold=$2 ;;
    --workers) workers=$2 ;;
    --mirror) mirror=${2%/} ;;
    --checksums) checksums=$2 ;;
    *) usage ;;
  esac
  shift 2
done
for number in "$sentencepiece" "$threshold"; do
  [[ $number =~ ^[0-9]+$ ]] || die "--sentencepiece and --threshold take a number, not '$number'"
done
[[ $workers =~ ^[1-9][0-9]*$ ]] || die "--workers takes a positive number, not '$workers'"
suffix=tokens
[ "$sentencepiece" -eq 0 ] || suffix=raw
case $dataset in
  wikitext-2 | wikitext-103)
    folder=$dataset
    [ "$suffix" = tokens ] || folder=$dataset-raw
    archive=$folder-v1.zip url=https://wikitext.smerity.com/$archive ;;
  enwik8)
    [ "$sentencepiece" -eq 0 ] || die "the tokens of enwik8 are its bytes: no --sentencepiece"
    archive=enwik8.zip url=http://mattmahoney.net/dc/enwik8.zip ;;
  text) archive='' ;;
  *) die "DATASET is wikitext-2, wikitext-103, enwik8 or text, not '$dataset'" ;;
esac
sums=$published
if [ -n "$checksums" ]; then
  [ -r "$checksums" ] || die "cannot read the checksums in $checksums"
  sums=$(< "$checksums")
fi
command -v fairseq-preprocess > /dev/null || die "the command fairseq-preprocess is missing; install it first"
[ -z "$archive" ] || command -v curl > /dev/null || die "the command curl is missing; install it first"
if [ "$dataset" = text ]; then
  for split in train valid test; do
    [ -s "$raw/$split.txt" ] || die "$raw/$split.txt is missing or empty"
    iconv -f UTF-8 -t UTF-8 "$raw/$split.txt" > /dev/null 2>&1 || die "$raw/$split.txt is not UTF-8 text"
  done
fi

member() { # NAME
  python3 -c 'import shutil, sys, zipfile
try:
    shutil.copyfileobj(zipfile.ZipFile(sys.argv[1]).open(sys.argv[2]), sys.stdout.buffer)
except (KeyError, zipfile.BadZipFile) as error:
    sys.exit(f"prepare: {sys.argv[1]}: {error}")' "$raw/$archive" "$1"
}

text() { # SPLIT
  case $dataset in
    text) cat "$raw/$1.txt" ;;
    enwik8) part "$1" ;;
    *) member "$folder/wiki.$1.$suffix" | sed -E 's/^ +//; s/ +$//' ;;
  esac
}

part() { # SPLIT
  local size from to
  size=$(wc -c < "$out/enwik8")
  case $1 in train) from=0 to=90 ;; valid) from=90 to=95 ;; test) from=95 to=100 ;; esac
  head -c "$((size * to / 100))" "$out/enwik8" | tail -c "$((size * to / 100 - size * from / 100))"
}

learn_pieces() {
  python3 -c 'import sys, sentencepiece
sentencepiece.SentencePieceTrainer.train(
    input=sys.argv[2], vocab_size=int(sys.argv[1]), hard_vocab_limit=False, character_coverage=0.9999,
    byte_fallback=True, input_sentence_size=1_000_000, shuffle_input_sentence=True, max_sentence_length=100_000,
    minloglevel=2, model_writer=sys.stdout.buffer)' "$sentencepiece" "$out/train.txt"
}

tokens() { # SPLIT
  if [ "$dataset" = enwik8 ]; then
    python3 -c 'import sys
for line in sys.stdin.buffer:
    print(*line.rstrip(b"\n"))' < "$out/$1.txt"
  else
    python3 -c 'import itertools, sys, sentencepiece
model = sentencepiece.SentencePieceProcessor(model_file=sys.argv[1])
with open(sys.argv[2], encoding="utf-8") as text:
    while lines := [line.strip() for line in itertools.islice(text, 10_000)]:
        for pieces in model.encode(lines, out_type=str, num_threads=int(sys.argv[3])):
            print(*pieces)' "$out/sentencepiece.model" "$out/$1.txt" "$workers"
  fi
}

options="dataset=$dataset sentencepiece=$sentencepiece threshold=$threshold"
[ -z "$archive" ] || options+=" archive=$(sha256sum <<< "$sums" | cut -c -12)"
[ ! -e "$out/bin" ] || die "$out/bin exists already; remove it or name another folder"
if [ -e "$out/options" ] && [ "$(< "$out/options")" != "$options" ]; then
  die "$out was begun with $(< "$out/options"); remove it or name another folder"
fi
mkdir -p "$raw" "$out"
if [ -n "$archive" ]; then fetch "$archive" "$url"; fi
echo "$options" > "$out/options"
if [ "$dataset" = enwik8 ]; then make "$out/enwik8" member enwik8; fi
ending=txt
for split in train valid test; do make "$out/$split.txt" text "$split"; done
if [ "$sentencepiece" -gt 0 ]; then make "$out/sentencepiece.model" learn_pieces; fi
if [ "$sentencepiece" -gt 0 ] || [ "$dataset" = enwik8 ]; then
  ending=tok
  for split in train valid test; do make "$out/$split.tok" tokens "$split"; done
fi

rm -rf "$out/bin.part"
fairseq-preprocess --only-source --workers "$workers" --thresholdsrc "$threshold" --destdir "$out/bin.part" \
  --trainpref "$out/train.$ending" --validpref "$out/valid.$ending" --testpref "$out/test.$ending"
mv "$out/bin.part" "$out/bin"
rm -f "$out/enwik8"
