#!/usr/bin/env bash
# Fine-tunes a converted encoder with skimming, by the recipe that Guan et al. (2022) have for GLUE: batch 64, 3 epochs,
# learning rate 2e-5; their price is --skim-factor 0.5. Or steer to a share of the FLOPs with --target-flops.
#
# usage: bash train.sh DATA MODEL ARCH CLASSES SAVE_DIR dense|skim [fairseq-train flags]
#   DATA     the OUT folder of prepare.sh
#   MODEL    checkpoint to start from: a converted one, or the dense one of this script for skim
#   ARCH     transkimmer_base, transkimmer_large, transkimmer_bert_base or transkimmer_minilm_l6
#   CLASSES  how many labels there are
set -euo pipefail

usage() { sed -n '2,9s/^# \{0,1\}//p' "$0" >&2; exit 2; }
[ $# -ge 6 ] || usage
data=$1 model=$2 arch=$3 classes=$4 save_dir=$5 kind=$6
shift 6
case $kind in
  dense) loss=(--criterion sentence_prediction --no-skimming) ;;
  skim) loss=(--criterion skim_loss --task-criterion sentence_prediction) ;;
  *) usage ;;
esac
user_dir=$(cd "$(dirname "$0")/../../fairseq_adaptive" && pwd)

fairseq-train "$data/bin" --user-dir "$user_dir" --task sentence_prediction --num-classes "$classes" --init-token 0 \
  --arch "$arch" --pooler-dropout 0.1 --restore-file "$model" \
  --reset-optimizer --reset-dataloader --reset-meters --reset-lr-scheduler \
  "${loss[@]}" --batch-size 64 --required-batch-size-multiple 1 --max-epoch 3 \
  --optimizer adam --adam-betas '(0.9, 0.98)' --adam-eps 1e-6 --weight-decay 0.01 --clip-norm 1.0 --lr 2e-5 \
  --best-checkpoint-metric accuracy --maximize-best-checkpoint-metric --no-epoch-checkpoints \
  --seed 1 --log-format simple --log-interval 50 --save-dir "$save_dir" "$@"
