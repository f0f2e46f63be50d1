#!/usr/bin/env bash
# Fine-tunes a converted encoder for extractive question answering, by the recipe that Guan et al. (2022) have for
# SQuAD v2.0: windows of 384 tokens that begin 128 apart, batch 64, 5 epochs, learning rate 3e-5 that falls to 0,
# lambda 0.3 (--skim-factor). Or steer to a share of the FLOPs with --target-flops.
#
# usage: bash train.sh DATA MODEL ARCH SAVE_DIR dense|skim [fairseq-train flags]
#   DATA   the OUT folder of prepare.sh
#   MODEL  checkpoint to start from: a converted one, or the dense one of this script for skim
#   ARCH   transkimmer_base, transkimmer_large, transkimmer_bert_base or transkimmer_minilm_l6
#   SAVE_DIR  folder for the checkpoints; an interrupted training goes on from there
#   flags  override the recipe; with another --max-epoch, --batch-size or --max-positions set --total-num-update, too
set -euo pipefail

. "$(dirname -- "${BASH_SOURCE[0]}")/../common.sh"
[ $# -ge 5 ] || usage
data=$1 model=$2 arch=$3 save_dir=$4 kind=$5
paths data model save_dir
shift 5
case $kind in
  dense) loss=(--criterion span_prediction --no-skimming) ;;
  skim) loss=(--criterion skim_loss --task-criterion span_prediction --skim-factor 0.3) ;;
  *) usage ;;
esac
metric=f1
[[ " $* " != *" --target-flops"[\ =]* ]] || metric=f1_on_target # the best of those that keep to it
[ -f "$model" ] || { echo "error: there is no checkpoint $model" >&2; exit 1; } # fairseq would start from nothing
[ -s "$data/windows" ] || { echo "error: $data/windows is missing: run prepare.sh" >&2; exit 1; }
updates=$((($(< "$data/windows") + 63) / 64 * 5))

start=(--restore-file "$model" --reset-optimizer --reset-dataloader --reset-meters --reset-lr-scheduler)
[ ! -e "$save_dir/checkpoint_last.pt" ] || start=() # an interrupted training goes on from there

fairseq-train "$data" --user-dir "$user_dir" --task question_answering --max-positions 384 --doc-stride 128 \
  --arch "$arch" ${start[@]+"${start[@]}"} \
  "${loss[@]}" --batch-size 64 --required-batch-size-multiple 1 --max-epoch 5 \
  --optimizer adam --adam-betas '(0.9, 0.98)' --adam-eps 1e-6 --weight-decay 0.01 --clip-norm 1.0 --lr 3e-5 \
  --lr-scheduler polynomial_decay --total-num-update "$updates" \
  --best-checkpoint-metric "$metric" --maximize-best-checkpoint-metric --no-epoch-checkpoints \
  --seed 1 --log-format simple --log-interval 50 --save-dir "$save_dir" "$@"
