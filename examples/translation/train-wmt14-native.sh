#!/usr/bin/env bash
# Trains stock fairseq's Transformer base with the recipe that Takase & Kiyono (2021) have for WMT English-German, on any
# pair of languages: batches of 3,584 tokens x 128 whatever the number of GPUs, 50,000 updates. The counterpart of
# train-wmt14.sh without the plug-in.
#
# usage: bash train-wmt14-native.sh DATA SAVE_DIR [fairseq-train flags]
#   DATA      the OUT folder of prepare-wmt14en2de.sh or prepare.sh
#   SAVE_DIR  folder for the checkpoints; an interrupted training goes on from there
#   flags     override the recipe: --clip-norm 1.0 if training diverges (a post-LN Transformer without Admin
#             initialisation may, at this learning rate); --user-dir fairseq_adaptive to resume with torch 2.6 or newer
set -euo pipefail

. "$(dirname -- "${BASH_SOURCE[0]}")/../common.sh"
[ $# -ge 2 ] || usage
data=$1 save_dir=$2
paths data save_dir
shift 2
die() { echo "train-wmt14: $*" >&2; exit 1; }
language_pair "$data/bin" train

gpus=$(python3 -c 'import torch; print(torch.cuda.device_count())')
workers=$((gpus > 0 ? gpus : 1))
update_freq=$(((128 + workers / 2) / workers))
precision=()
[ "$gpus" -eq 0 ] || precision=(--fp16)
echo "train-wmt14: $source-$target on $gpus GPUs, batches of 3584 tokens x $workers x $update_freq an update" >&2

fairseq-train "$data/bin" --task translation --source-lang "$source" --target-lang "$target" \
  --arch transformer_wmt_en_de --share-all-embeddings --dropout 0.3 --weight-decay 0.0 \
  --criterion label_smoothed_cross_entropy --label-smoothing 0.1 \
  --optimizer adam --adam-betas '(0.9, 0.98)' --clip-norm 0.0 \
  --lr 0.002 --lr-scheduler inverse_sqrt --warmup-updates 8000 --warmup-init-lr 1e-07 --stop-min-lr 1e-09 \
  --max-tokens 3584 --update-freq "$update_freq" --max-update 50000 \
  --keep-last-epochs 20 --seed 1 --log-format simple --log-interval 100 \
  ${precision[@]+"${precision[@]}"} --save-dir "$save_dir" "$@"
