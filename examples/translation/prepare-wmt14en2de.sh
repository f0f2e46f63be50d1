#!/usr/bin/env bash
# Prepares WMT English-German as published for cross-layer sharing (Takase & Kiyono 2021): train on the WMT16 parallel
# text, validate on newstest2013, test on newstest2014 and on newstest2010-2016; one BPE for both languages.
#
# usage: bash prepare-wmt14en2de.sh RAW OUT [options]
#   RAW                 folder of the archives; those it lacks are downloaded (1.7 GB), and resumed if interrupted
#   OUT                 new folder; gets OUT/bin for fairseq-train, OUT/testsets and OUT/newstest20*.{en,de}; if this
#                       script was interrupted, the same command goes on where it stopped
#   --bpe KIND          subword-nmt after Moses tokenisation (default, as published) or sentencepiece on raw text
#   --merges N          size of the joint BPE (default 32000)
#   --max-length N      drop training pairs with a side longer than N subwords (default 250) ...
#   --max-ratio R       ... or one side more than R times as long as the other (default 1.5)
#   --workers N         processes (default: one per processor)
#   --mirror URL        download from URL/NAME instead of statmt.org
#   --checksums FILE    "CHECKSUM  NAME" lines (SHA-256 or MD5) in place of the published ones, for other archives of
#                       the same layout; the names are those in the table below
set -euo pipefail

# statmt.org publishes no checksums. SHA-256: recorded by TensorFlow Datasets; MD5: recorded by sacreBLEU. The archives
# of the test sets are those sacreBLEU reads, so that it can score against them (last column) without a network.
published='0224c7c710c8a063dfd893b0cc0830202d61f4c75c17eb8e31836103d27d96e7  europarl-v7.tgz
c7a74e2ea01ac6c920123108627e35278d4ccb5701e15428ffa34de86fa3a9e5  commoncrawl.tgz
cfe8ab047e05043476e498ee765c98e939c7b7d6d294e856344c84476b619d6a  nc-v11.tgz
491cb885a355da5a23ea66e7b3024d5c  newstest2010.tgz
b0c9680adf32d394aefc2b24e3a5937e  newstest2011.tgz
608232d34ebc4ba2ff70fead45674e47  newstest2012.tgz
48eca5d02f637af44e85186847141f67  newstest2013.tgz
a8cd784e006feb32ac6f3d9ec7eb389a  newstest2014.tgz
67e3beca15e69fe3d36de149da0a96df  newstest2015.tgz
3d809cd0c2c86adb2c67034d15c4e446  newstest2016.tgz'
archives='europarl-v7.tgz https://www.statmt.org/wmt13/training-parallel-europarl-v7.tgz
commoncrawl.tgz https://www.statmt.org/wmt13/training-parallel-commoncrawl.tgz
nc-v11.tgz https://data.statmt.org/wmt16/translation-task/training-parallel-nc-v11.tgz
newstest2010.tgz https://statmt.org/wmt10/test.tgz
newstest2011.tgz https://statmt.org/wmt11/test.tgz
newstest2012.tgz https://statmt.org/wmt12/test.tgz
newstest2013.tgz https://statmt.org/wmt13/test.tgz
newstest2014.tgz https://statmt.org/wmt14/test-full.tgz
newstest2015.tgz https://statmt.org/wmt15/test.tgz
newstest2016.tgz https://data.statmt.org/wmt16/translation-task/test.tgz'
corpora='europarl-v7.tgz training/europarl-v7.de-en
commoncrawl.tgz commoncrawl.de-en
nc-v11.tgz training-parallel-nc-v11/news-commentary-v11.de-en'
# fairseq's name of the subset, the set, English and German in its archive, sacreBLEU's name
testsets='test newstest2014 test-full/newstest2014-deen-src.en.sgm test-full/newstest2014-deen-ref.de.sgm wmt14/full
valid newstest2013 test/newstest2013-src.en.sgm test/newstest2013-src.de.sgm wmt13
test1 newstest2010 test/newstest2010-src.en.sgm test/newstest2010-src.de.sgm wmt10
test2 newstest2011 newstest2011-src.en.sgm newstest2011-src.de.sgm wmt11
test3 newstest2012 test/newstest2012-src.en.sgm test/newstest2012-src.de.sgm wmt12
test4 newstest2015 test/newstest2015-ende-src.en.sgm test/newstest2015-ende-ref.de.sgm wmt15
test5 newstest2016 test/newstest2016-ende-src.en.sgm test/newstest2016-ende-ref.de.sgm wmt16'

. "$(dirname -- "${BASH_SOURCE[0]}")/../common.sh"
die() { echo "prepare-wmt14en2de: $*" >&2; exit 1; }
. "$(dirname "${BASH_SOURCE[0]}")/../download.sh"
. "$(dirname "${BASH_SOURCE[0]}")/../subwords.sh"

[ $# -ge 2 ] || usage
raw=$1 out=$2 source=en target=de bpe=subword-nmt merges=32000 max_length=250 max_ratio=1.5 workers=$(nproc) mirror='' checksums=''
paths raw out
shift 2
while [ $# -gt 0 ]; do
  [ $# -ge 2 ] || usage
  case $1 in
    --bpe) bpe=$2 ;;
    --merges) merges=$2 ;;
    --max-length) max_length=$2 ;;
    --max-ratio) max_ratio=$2 ;;
    --workers) workers=$2 ;;
    --mirror) mirror=${2%/} ;;
    --checksums) checksums=$2 ;;
    *) usage ;;
  esac
  shift 2
done
case $bpe in subword-nmt | sentencepiece) ;; *) die "--bpe is subword-nmt or sentencepiece, not '$bpe'" ;; esac
for number in "$merges" "$max_length" "$workers"; do
  [[ $number =~ ^[1-9][0-9]*$ ]] || die "--merges, --max-length and --workers take a positive number, not '$number'"
done
[[ $max_ratio =~ ^[0-9]+(\.[0-9]+)?$ ]] || die "--max-ratio takes a number, not '$max_ratio'"
sums=$published
if [ -n "$checksums" ]; then
  [ -r "$checksums" ] || die "cannot read the checksums in $checksums"
  sums=$(< "$checksums")
fi
for tool in curl sacremoses subword-nmt fairseq-preprocess; do
  command -v "$tool" > /dev/null || die "the command $tool is missing; install it first"
done

training_text() { # LANG
  local archive prefix
  while read -r archive prefix; do
    tar -xzOf "$raw/$archive" "$prefix.$1"
  done <<< "$corpora" | without_control_characters
}

test_text() { # ARCHIVE MEMBER
  tar -xzOf "$raw/$1.tgz" "$2" | without_control_characters |
    sed -nE 's/^<seg [^>]*>(.*)<\/seg>.*/\1/p' | sed -E 's/[[:space:]]+/ /g; s/^ //; s/ $//'
}

all_tests() { # LANG: in one file, for one start of each tool
  while read -r subset name english german standard; do cat "$out/$name.$1"; done <<< "$testsets"
}

mkdir -p "$raw" "$out"
trap 'rm -rf "$out"/parts.??????' EXIT
options="bpe=$bpe merges=$merges max_length=$max_length max_ratio=$max_ratio"
options+=" archives=$(sha256sum <<< "$sums" | cut -c -12)"
[ ! -e "$out/bin" ] || die "$out/bin exists already; remove it or name another folder"
if [ -e "$out/options" ] && [ "$(< "$out/options")" != "$options" ]; then
  die "$out was begun with $(< "$out/options"); remove it or name another folder"
fi
while read -r name url; do
  fetch "$name" "$url"
done <<< "$archives"
echo "$options" > "$out/options"

while read -r subset name english german standard; do
  make "$out/$name.en" test_text "$name" "$english"
  make "$out/$name.de" test_text "$name" "$german"
  same_length "$out/$name"
done <<< "$testsets"
for lang in en de; do
  make "$out/train.$lang" training_text "$lang"
  make "$out/newstests.$lang" all_tests "$lang"
done
same_length "$out/train"

if [ "$bpe" = subword-nmt ]; then
  for name in train newstests; do
    for lang in en de; do make "$out/$name.tok.$lang" tokenize "$lang" "$name"; done
    same_length "$out/$name.tok"
  done
fi
make "$out/codes" learn_bpe
for name in train newstests; do
  for lang in en de; do make "$out/$name.bpe.$lang" apply_bpe "$lang" "$name"; done
  same_length "$out/$name.bpe"
done
first=1
while read -r subset name english german standard; do
  lines=$(wc -l < "$out/$name.en")
  for lang in en de; do
    make "$out/$name.bpe.$lang" sed -n "$first,$((first + lines - 1))p" "$out/newstests.bpe.$lang"
  done
  first=$((first + lines))
done <<< "$testsets"
for lang in en de; do make "$out/train.clean.$lang" clean "$lang"; done
same_length "$out/train.clean"
echo "kept $(wc -l < "$out/train.clean.en") of $(wc -l < "$out/train.en") training pairs" >&2

# 32768 words as in fairseq's scaling_nmt; the symbols beyond are rare characters.
tests=''
while read -r subset name _; do [[ $subset != test* ]] || tests+=,$out/$name.bpe; done <<< "$testsets"
rm -rf "$out/bin.part"
fairseq-preprocess --source-lang en --target-lang de --joined-dictionary --nwordssrc 32768 --nwordstgt 32768 \
  --trainpref "$out/train.clean" --validpref "$out/newstest2013.bpe" --testpref "${tests:1}" \
  --destdir "$out/bin.part" --workers "$workers"

# sacreBLEU's own folder layout; only the published archives may go by the standard names.
while read -r subset name english german standard; do
  [ -z "$checksums" ] || standard=-
  echo "$subset $name $standard"
  [ "$standard" != - ] || continue
  url=$(awk -v name="$name.tgz" '$1 == name { print $2 }' <<< "$archives")
  mkdir -p "$out/sacrebleu/$standard/raw"
  tar -xzf "$raw/$name.tgz" -C "$out/sacrebleu/$standard/raw"
  cp "$raw/$name.tgz" "$out/sacrebleu/$standard/raw/${standard/\//_}.$(basename "$url")"
done <<< "$testsets" > "$out/testsets.part"
mv "$out/testsets.part" "$out/testsets"
mv "$out/bin.part" "$out/bin"
