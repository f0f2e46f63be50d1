#!/usr/bin/env bash
# Pretrains ALBERT-ACT with its published recipe (Simoulin and Crabbe, 2021): 112,500 updates with texts of 128 tokens,
# then 12,500 with texts of 512; 4,096 texts an update. Written for one GPU: --update-freq follows from how many TEXTS
# fit it. An interrupted training goes on with the same command.
#
# usage: [TEXTS=N] bash train.sh DATA SAVE_DIR ARCH [fairseq-train flags]
#   DATA      the OUT folder of prepare.sh
#   SAVE_DIR  folder for the checkpoints: SAVE_DIR/128, then SAVE_DIR/512
#   ARCH      albert_act_tiny, albert_act_small or albert_act_base: up to 6, 12 or 24 applications of the layer
#   TEXTS     of 128 tokens that fit the device at a time, a divisor of 4096 and 4 or more (default 64); a quarter of
#             them, where they have 512
#   flags     override the recipe in both phases: --max-update and --fp16 --fp16-no-flatten-grads, for instance
# For ALBERT of fixed depth add --halting none.
set -euo pipefail

. "$(dirname -- "${BASH_SOURCE[0]}")/../common.sh"
[ $# -ge 3 ] || usage
data=$1 save_dir=$2 arch=$3 texts=${TEXTS:-64}
paths data save_dir
shift 3
if ! [[ $texts =~ ^[1-9][0-9]*$ ]] || [ "$texts" -lt 4 ] || [ $((4096 % texts)) -ne 0 ]; then
  echo "train: TEXTS is a divisor of 4096 and 4 or more, not '$texts'" >&2
  exit 1
fi

# The published penalty tau is for the sum over a text; --time-penalty is for the mean: tau times the length.
case $arch in
  albert_act_tiny) penalty_128=0.128 penalty_512=0.512 ;;   # tau 1e-3
  albert_act_small) penalty_128=0.064 penalty_512=0.256 ;;  # tau 5e-4
  albert_act_base) penalty_128=0.032 penalty_512=0.128 ;;   # tau 2.5e-4
  *) usage ;;
esac

phase() { # LENGTH TEXTS UPDATES WARMUP LR PENALTY [flags]
  local length=$1 texts=$2 updates=$3 warmup=$4 lr=$5 criterion
  criterion=(--criterion ponder_loss --task-criterion masked_lm_sop --time-penalty "$6")
  shift 6
  [[ " $* " != *" --halting none "* ]] || criterion=(--criterion masked_lm_sop)
  fairseq-train "$data/bin" --user-dir "$user_dir" --task masked_lm_sop --tokens-per-sample "$length" \
    --arch "$arch" --max-positions 512 "${criterion[@]}" \
    --optimizer lamb_torch --lamb-betas '(0.9, 0.999)' --lamb-eps 1e-6 --weight-decay 0.01 --clip-norm 1.0 \
    --lr-scheduler polynomial_decay --lr "$lr" --warmup-updates "$warmup" --total-num-update "$updates" \
    --max-update "$updates" --batch-size "$texts" --update-freq $((4096 / texts)) \
    --save-interval-updates 2500 --validate-interval-updates 2500 --keep-interval-updates 2 --no-epoch-checkpoints \
    --seed 1 --num-workers 2 --log-format simple --log-interval 100 --save-dir "$save_dir/$length" "$@"
}

phase 128 "$texts" 112500 3125 1.76e-3 "$penalty_128" "$@"
phase 512 $((texts / 4)) 12500 312 2.75e-4 "$penalty_512" \
  --finetune-from-model "$save_dir/128/checkpoint_last.pt" "$@"
