#!/usr/bin/env bash
# Trains one model on the parity of sequences over {1, 0, -1}, 64,000 new ones in each of 5 epochs (10 for length 64),
# and tests it on 6,400 others after each. All models are pre-LN, of width 128 with 4 heads and a feed-forward of 512,
# and get the sequence as one token.
#
# usage: bash train-parity.sh MODEL LENGTH SEED SAVE_DIR [fairseq-train flags]
#   MODEL   adatape       one layer, and a tape of LENGTH/2 tokens, at most 16
#           transformer   four layers, no tape
#           universal     one layer run at four depths, no tape
#   LENGTH  of the sequences, 8, 16, 32 or 64
#   The log goes to SAVE_DIR/train.log; its lines with "valid on" have the accuracy. SAVE_DIR must be new or empty.
set -euo pipefail

. "$(dirname -- "${BASH_SOURCE[0]}")/../common.sh"
[ $# -ge 4 ] || usage
model=$1 length=$2 seed=$3 save_dir=$4
paths save_dir
shift 4
[[ $length =~ ^(8|16|32|64)$ ]] || usage
epochs=$((length > 32 ? 10 : 5))
if [ -e "$save_dir/train.log" ]; then
  echo "error: $save_dir/train.log is there already: name another SAVE_DIR" >&2
  exit 1
fi

case $model in
  adatape)
    # the reading ends where LENGTH elements are read without any preference: tokens x elements of each = LENGTH
    tokens=$((length > 32 ? 16 : length / 2))
    flags=(--encoder-layers 1 --tape-tokens "$tokens" --tape-threshold $((tokens * tokens / length))) ;;
  transformer) flags=(--encoder-layers 4 --tape-tokens 0) ;;
  universal) flags=(--encoder-layers 4 --encoder-unique-layers 1 --tape-tokens 0) ;;
  *) usage ;;
esac

mkdir -p "$save_dir"
fairseq-train --user-dir "$user_dir" --task parity --sequence-length "$length" \
  --arch adatape_parity "${flags[@]}" --criterion tape_ponder_loss --ponder-penalty 0.01 \
  --optimizer adam --adam-betas '(0.9, 0.98)' --clip-norm 1.0 \
  --lr 0.001 --lr-scheduler polynomial_decay --warmup-updates 200 --total-num-update $((250 * epochs)) \
  --batch-size 256 --max-epoch $epochs --seed "$seed" --num-workers 0 --log-format simple --log-interval 50 \
  --no-epoch-checkpoints --save-dir "$save_dir" "$@" 2>&1 | tee "$save_dir/train.log"
