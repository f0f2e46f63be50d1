#!/usr/bin/env bash
# Fine-tunes a converted encoder with skimming, by the recipe of Guan et al. (2022); --skim-factor is their lambda. Or
# steer to a share of the FLOPs with --target-flops; the best checkpoint is then chosen among those that keep to it.
#
# usage: bash train.sh DATA MODEL ARCH TASK SAVE_DIR dense|skim [fairseq-train flags]
#   DATA     the OUT folder of prepare.sh
#   MODEL    checkpoint to start from: a converted one, or the dense one of this script for skim
#   ARCH     transkimmer_base, transkimmer_large, transkimmer_bert_base or transkimmer_minilm_l6
#   TASK     CoLA, SST-2, MRPC, STS-B, QQP, MNLI, QNLI, RTE, WNLI, 20news, yelp or imdb: its labels, metric and recipe,
#            with a learning rate that falls to 0. Or a number of labels: GLUE's recipe with a constant learning rate
#   SAVE_DIR folder for the checkpoints; an interrupted training goes on from there
#   flags    override the recipe; with another --max-epoch set --total-num-update, too
set -euo pipefail

. "$(dirname -- "${BASH_SOURCE[0]}")/../common.sh"
[ $# -ge 6 ] || usage
data=$1 model=$2 arch=$3 task=$4 save_dir=$5 kind=$6
paths data model save_dir
shift 6
classes=2 epochs=3 batch=64 lr=2e-5 factor=0.5 warmup=0 metric=accuracy report=''
case $task in
  SST-2 | QNLI | RTE | imdb) ;;
  CoLA) metric=mcc report=report_mcc ;;
  MRPC) metric=acc_and_f1 report=report_acc_and_f1 epochs=5 ;;
  QQP) metric=acc_and_f1 report=report_acc_and_f1 ;;
  STS-B) metric=pearson_and_spearman report=report_pearson_and_spearman classes=1 ;;
  MNLI) classes=3 ;;
  WNLI) epochs=5 ;;
  20news) classes=20 epochs=5 batch=32 lr=3e-5 factor=0.2 warmup=10 ;;
  yelp) classes=5 epochs=2 batch=32 lr=3e-5 factor=0.2 warmup=10 ;;
  [1-9] | [1-9][0-9] | [1-9][0-9][0-9]) classes=$task ;;
  *) usage ;;
esac
case $kind in
  dense) loss=(--criterion sentence_prediction --no-skimming ${report:+--${report//_/-}}) ;;
  skim)
    loss=(--criterion skim_loss --task-criterion sentence_prediction --skim-factor "$factor"
      ${report:+--task-criterion-args "{\"$report\": true}"}) ;;
  *) usage ;;
esac
[ -f "$model" ] || { echo "error: there is no checkpoint $model" >&2; exit 1; } # fairseq would start from nothing
[[ " $* " != *" --target-flops"[\ =]* ]] || metric=${metric}_on_target
flags=()
[ "$task" != STS-B ] || flags+=(--regression-target)
case $arch in
  *bert* | *minilm*) ;;
  *) flags+=(--separator-token 2) ;; # RoBERTa has a second </s> before the second text
esac
if [[ $task != [1-9] && $task != [1-9][0-9] && $task != [1-9][0-9][0-9] ]]; then
  [ -f "$data/text/train.input0" ] || { echo "error: $data/text/train.input0 is missing: run prepare.sh" >&2; exit 1; }
  updates=$((($(wc -l < "$data/text/train.input0") + batch - 1) / batch * epochs))
  flags+=(--lr-scheduler polynomial_decay --total-num-update "$updates" --warmup-updates $((updates * warmup / 100)))
fi

echo "to do: $kind, ${updates:+$updates updates, }$classes labels, batches of $batch, $epochs epochs unless flags say otherwise, into $save_dir" >&2
start=(--restore-file "$model" --reset-optimizer --reset-dataloader --reset-meters --reset-lr-scheduler)
[ ! -e "$save_dir/checkpoint_last.pt" ] || start=() # an interrupted training goes on from there

fairseq-train "$data/bin" --user-dir "$user_dir" --task sentence_prediction --num-classes "$classes" --init-token 0 \
  --arch "$arch" --pooler-dropout 0.1 ${start[@]+"${start[@]}"} \
  "${loss[@]}" --batch-size "$batch" --required-batch-size-multiple 1 --max-epoch "$epochs" \
  --optimizer adam --adam-betas '(0.9, 0.98)' --adam-eps 1e-6 --weight-decay 0.01 --clip-norm 1.0 --lr "$lr" \
  ${flags[@]+"${flags[@]}"} \
  --best-checkpoint-metric "$metric" --maximize-best-checkpoint-metric --no-epoch-checkpoints \
  --seed 1 --log-format simple --log-interval 50 --save-dir "$save_dir" "$@"
