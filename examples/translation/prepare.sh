#!/usr/bin/env bash
# Prepares parallel text of your own, of any pair of languages, for train.sh (or train-wmt14.sh) and evaluate.sh: one
# BPE and one dictionary for both languages. Says first what it will do, and refuses text that is not parallel.
#
# usage: bash prepare.sh RAW OUT SOURCE TARGET [options]
#   RAW              folder with train.SOURCE and train.TARGET: UTF-8, one sentence a line, line n of one the translation
#                    of line n of the other; and the same of valid and test. Where those are missing, sentences of train
#                    are held out for them, evenly over the text: every 20th, at most 2,000
#   OUT              new folder; gets OUT/bin for fairseq-train and OUT/{train,valid,test}.{SOURCE,TARGET}; if this script
#                    was interrupted, the same command goes on where it stopped
#   SOURCE, TARGET   languages, by the endings of the files; Moses has rules for them by these names (en, de, fr, ...)
#   --bpe KIND       subword-nmt after Moses tokenisation (default), or sentencepiece on raw text, for languages without
#                    spaces between words, too
#   --merges N       size of the joint BPE (default 10000)
#   --max-length N   drop training pairs with a side longer than N subwords (default 250) ...
#   --max-ratio R    ... or one side more than R times as long as the other (default 2.5)
#   --workers N      processes (default: one per processor)
set -euo pipefail

. "$(dirname -- "${BASH_SOURCE[0]}")/../common.sh"
die() { echo "prepare: $*" >&2; exit 1; }
. "$(dirname "${BASH_SOURCE[0]}")/../subwords.sh"

[ $# -ge 4 ] || usage
raw=$1 out=$2 source=$3 target=$4 bpe=subword-nmt merges=10000 max_length=250 max_ratio=2.5 workers=$(nproc)
paths raw out
shift 4
while [ $# -gt 0 ]; do
  [ $# -ge 2 ] || usage
  case $1 in
    --bpe) bpe=$2 ;;
    --merges) merges=$2 ;;
    --max-length) max_length=$2 ;;
    --max-ratio) max_ratio=$2 ;;
    --workers) workers=$2 ;;
    *) usage ;;
  esac
  shift 2
done
for lang in "$source" "$target"; do
  [[ $lang =~ ^[A-Za-z_]+$ ]] || die "a language is letters and underscores, not '$lang'"
done
[ "$source" != "$target" ] || die "SOURCE and TARGET are both $source"
tools=(fairseq-preprocess sacremoses)
case $bpe in
  subword-nmt) tools+=(subword-nmt) ;;
  sentencepiece) ;;
  *) die "--bpe is subword-nmt or sentencepiece, not '$bpe'" ;;
esac
for number in "$merges" "$max_length" "$workers"; do
  [[ $number =~ ^[1-9][0-9]*$ ]] || die "--merges, --max-length and --workers take a positive number, not '$number'"
done
[[ $max_ratio =~ ^[0-9]+(\.[0-9]+)?$ ]] || die "--max-ratio takes a number, not '$max_ratio'"
for tool in "${tools[@]}"; do
  command -v "$tool" > /dev/null || die "the command $tool is missing: pip install 'fairseq_adaptive[translation]'"
done

held_out=() given=(train)
for split in train valid test; do
  files=("$raw/$split.$source" "$raw/$split.$target")
  if [ "$split" != train ] && [ ! -e "${files[0]}" ] && [ ! -e "${files[1]}" ]; then
    held_out+=("$split")
    continue
  fi
  [ "$split" = train ] || given+=("$split")
  for file in "${files[@]}"; do
    [ -s "$file" ] || die "$file is missing or empty"
    iconv -f UTF-8 -t UTF-8 "$file" > /dev/null 2>&1 || die "$file is not UTF-8 text"
  done
  same_length "$raw/$split"
done
lines=$(wc -l < "$raw/train.$source")
every=$((lines / 2000 > 20 ? (lines + 1999) / 2000 : 20))
[ ${#held_out[@]} -eq 0 ] || [ "$lines" -ge $((2 * every)) ] ||
  die "$raw/train.$source has $lines lines, too few to hold some out: give valid.$source and test.$source, too"
[ ! -e "$out/bin" ] || die "$out/bin exists already; remove it or name another folder"
text=$(for split in "${given[@]}"; do cat "$raw/$split".{"$source","$target"}; done | cksum)
options="bpe=$bpe merges=$merges max_length=$max_length max_ratio=$max_ratio pair=$source-$target text=$text"
if [ -e "$out/options" ] && [ "$(< "$out/options")" != "$options" ]; then
  die "$out was begun with $(< "$out/options"); remove it or name another folder"
fi
echo "to do: $source-$target, $lines pairs of $(du -Lch "$raw"/train.{"$source","$target"} | tail -n 1 | cut -f 1), a joint BPE of $merges by $bpe" \
  "with $workers processes, into $out$([ ${#held_out[@]} -eq 0 ] || echo "; every ${every}th pair is held out for ${held_out[*]}")" >&2

mkdir -p "$out"
trap 'rm -rf "$out"/parts.??????' EXIT
echo "$options" > "$out/options"

text() { # LANG SPLIT: of the folder, or every so manieth line of train; train is the rest
  local from=$2 wanted='1'
  case " ${held_out[*]-} " in
    *" $2 "*) from=train wanted="NR % $every == $([ "$2" = test ] && echo 0 || echo $((every / 2)))" ;;
    *" valid test "*) [ "$2" != train ] || wanted="NR % $every != 0 && NR % $every != $((every / 2))" ;;
    *" valid "*) [ "$2" != train ] || wanted="NR % $every != $((every / 2))" ;;
    *" test "*) [ "$2" != train ] || wanted="NR % $every != 0" ;;
  esac
  without_control_characters < "$raw/$from.$1" | awk "$wanted"
}
for split in train valid test; do
  for lang in "$source" "$target"; do make "$out/$split.$lang" text "$lang" "$split"; done
  same_length "$out/$split"
  [ "$bpe" = subword-nmt ] || continue
  for lang in "$source" "$target"; do make "$out/$split.tok.$lang" tokenize "$lang" "$split"; done
  same_length "$out/$split.tok"
done
make "$out/codes" learn_bpe
for split in train valid test; do
  for lang in "$source" "$target"; do make "$out/$split.bpe.$lang" apply_bpe "$lang" "$split"; done
  same_length "$out/$split.bpe"
done
for lang in "$source" "$target"; do make "$out/train.clean.$lang" clean "$lang"; done
same_length "$out/train.clean"
echo "kept $(wc -l < "$out/train.clean.$source") of $(wc -l < "$out/train.$source") training pairs" >&2
rm -rf "$out/bin.part"
fairseq-preprocess --source-lang "$source" --target-lang "$target" --joined-dictionary --workers "$workers" \
  --trainpref "$out/train.clean" --validpref "$out/valid.bpe" --testpref "$out/test.bpe" --destdir "$out/bin.part"
mv "$out/bin.part" "$out/bin"
