#!/usr/bin/env bash
# Fine-tunes a pretrained ALBERT-ACT on classification, by stock fairseq's --task sentence_prediction: batches of 32, 3
# epochs, learning rate 2e-4 falling to 0 after 6% of warm-up. Tokens keep choosing their depth, at no price.
#
# usage: bash finetune.sh DATA MODEL ARCH CLASSES SAVE_DIR [fairseq-train flags]
#   DATA     the OUT folder of examples/classification/prepare.sh
#   MODEL    checkpoint of the pretraining
#   ARCH     its architecture; flags of the pretraining that change sizes are to be given again
#   CLASSES  how many labels there are
#   SAVE_DIR folder for the checkpoints; an interrupted training goes on from there
#   flags    --halting none for ALBERT of fixed depth; for a price of depth --criterion ponder_loss --task-criterion
#            sentence_prediction --target-depth D
set -euo pipefail

. "$(dirname -- "${BASH_SOURCE[0]}")/../common.sh"
[ $# -ge 5 ] || usage
data=$1 model=$2 arch=$3 classes=$4 save_dir=$5
paths data model save_dir
shift 5
for file in "$model" "$data/text/train.input0"; do
  [ -f "$file" ] || { echo "error: there is no $file" >&2; exit 1; }
done
updates=$((($(wc -l < "$data/text/train.input0") + 31) / 32 * 3))

start=(--restore-file "$model" --reset-optimizer --reset-dataloader --reset-meters --reset-lr-scheduler)
[ ! -e "$save_dir/checkpoint_last.pt" ] || start=() # an interrupted training goes on from there

fairseq-train "$data/bin" --user-dir "$user_dir" --task sentence_prediction --num-classes "$classes" --init-token 0 \
  --arch "$arch" --pooler-dropout 0.1 ${start[@]+"${start[@]}"} \
  --criterion sentence_prediction --batch-size 32 --required-batch-size-multiple 1 --max-epoch 3 \
  --optimizer adam --adam-betas '(0.9, 0.98)' --adam-eps 1e-6 --weight-decay 0.01 --clip-norm 1.0 \
  --lr-scheduler polynomial_decay --lr 2e-4 --warmup-updates $((updates * 6 / 100)) --total-num-update "$updates" \
  --best-checkpoint-metric accuracy --maximize-best-checkpoint-metric --no-epoch-checkpoints \
  --seed 1 --log-format simple --log-interval 50 --save-dir "$save_dir" "$@"
