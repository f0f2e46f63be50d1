#!/usr/bin/env bash
# Trains one row of the Multi30k table: an encoder-decoder of width 128 (feed-forward 256, 4 heads) for 2,000 updates.
# Every row has the same data, order of batches, optimiser and number of updates; only the layers differ. Layers are
# pre-LN: post-LN ones of 6 depths hardly learn within a training this short.
#
# usage: bash train-multi30k.sh DATA SAVE_DIR ROW [fairseq-train flags]
#   DATA  the OUT folder of prepare-multi30k.sh
#   ROW   vanilla-N          N layers, stock fairseq's own model (its counterpart without the plug-in)
#         STRATEGY-M-N       M unique layers run at N depths; STRATEGY is sequence, cycle or cycle_rev
#         universal-N        one layer run at N depths, width 168 and feed-forward 336: the parameters of three layers
#         universal-N-act-D  the same with a depth of its own for each token, up to N and D on average
set -euo pipefail

. "$(dirname -- "${BASH_SOURCE[0]}")/../common.sh"
[ $# -ge 3 ] || usage
data=$1 save_dir=$2 row=$3
paths data save_dir
shift 3

width=128 loss=(--criterion label_smoothed_cross_entropy --label-smoothing 0.1) halting=()
case $row in
  vanilla-[0-9]*) layers=${row#*-}; model=(--arch transformer) ;;
  universal-[0-9]*-act-[0-9]*)
    IFS=- read -r _ layers _ depth <<< "$row"
    strategy=cycle unique=1 width=168 halting=(--halting act)
    loss=(--criterion ponder_loss --task-criterion label_smoothed_cross_entropy
      --task-criterion-args '{"label_smoothing": 0.1}' --target-depth "$depth") ;;
  universal-[0-9]*) layers=${row#*-}; strategy=cycle unique=1 width=168 ;;
  sequence-[0-9]*-[0-9]* | cycle-[0-9]*-[0-9]* | cycle_rev-[0-9]*-[0-9]*) IFS=- read -r strategy unique layers <<< "$row" ;;
  *) usage ;;
esac
if [ -n "${strategy:-}" ]; then
  model=(--user-dir "$user_dir" --arch shared_transformer --layer-sharing "$strategy"
    --encoder-unique-layers "$unique" --decoder-unique-layers "$unique" "${halting[@]}")
fi

language_pair "$data/bin" train
echo "to do: $source-$target, $row, 2000 updates of up to 2048 tokens unless --max-update says otherwise, into $save_dir" >&2
fairseq-train "$data/bin" --task translation --source-lang "$source" --target-lang "$target" \
  "${model[@]}" --encoder-layers "$layers" --decoder-layers "$layers" \
  --encoder-embed-dim "$width" --encoder-ffn-embed-dim "$((2 * width))" --encoder-attention-heads 4 \
  --decoder-embed-dim "$width" --decoder-ffn-embed-dim "$((2 * width))" --decoder-attention-heads 4 \
  --encoder-normalize-before --decoder-normalize-before --share-all-embeddings --dropout 0.3 --max-tokens 2048 --max-update 2000 \
  --optimizer adam --adam-betas '(0.9, 0.98)' --clip-norm 1.0 \
  --lr 0.003 --lr-scheduler polynomial_decay --warmup-updates 400 --total-num-update 2000 \
  "${loss[@]}" \
  --keep-last-epochs 2 --no-save-optimizer-state --seed 1 --log-format simple --log-interval 100 \
  --save-dir "$save_dir" "$@"
