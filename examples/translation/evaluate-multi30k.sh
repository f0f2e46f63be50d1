#!/usr/bin/env bash
# Translates the Multi30k test set with the last checkpoint of train-multi30k.sh and scores it.
#
# usage: bash evaluate-multi30k.sh DATA RAW SAVE_DIR [fairseq-generate flags]
#   DATA      the OUT folder of prepare-multi30k.sh
#   RAW       its input, for the reference as it was written
#   SAVE_DIR  that of train-multi30k.sh; gets test.out, test.hyp (tokenised) and test.detok
# Prints BLEU of tokenised lower-cased text, as published for this data, and sacreBLEU of detokenised text without case.
set -euo pipefail

. "$(dirname -- "${BASH_SOURCE[0]}")/../common.sh"
[ $# -ge 3 ] || usage
data=$1 raw=$2 save_dir=$3
paths data raw save_dir
language_pair "$data/bin" test
shift 3

fairseq-generate "$data/bin" --user-dir "$user_dir" --source-lang "$source" --target-lang "$target" --gen-subset test \
  --path "$save_dir/checkpoint_last.pt" --beam 5 --batch-size 64 --post-process subword_nmt "$@" > "$save_dir/test.out"
grep '^H-' "$save_dir/test.out" | cut -c3- | sort -n | cut -f3 > "$save_dir/test.hyp"
sacremoses -q -l "$target" detokenize < "$save_dir/test.hyp" > "$save_dir/test.detok"
echo "tokenised, lower-cased:"
sacrebleu "$data/test.$target" -i "$save_dir/test.hyp" --tokenize none --force --format text --width 2
echo "detokenised, without case:"
sacrebleu "$raw/test.$target" -i "$save_dir/test.detok" --lowercase --format text --width 2
