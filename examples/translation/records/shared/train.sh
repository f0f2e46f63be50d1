#!/usr/bin/env bash
# One layer at 4 depths, of width 168, in bfloat16, with the fused loss.
# usage: bash train.sh DATA SAVE_DIR SEED
bash "$(dirname -- "${BASH_SOURCE[0]}")/../../train-multi30k.sh" "$1" "$2" universal-4 --seed "$3" --cpu --num-workers 0 --bf16 \
  --criterion fused_label_smoothed_cross_entropy --label-smoothing 0.1 \
  --dropout 0.1 --max-update 1000 --total-num-update 1000 --warmup-updates 200 --disable-validation --no-epoch-checkpoints
