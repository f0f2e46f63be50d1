#!/usr/bin/env bash
# One layer of width 168 at 3 depths, in encoder and decoder, in bfloat16 where the processor is faster so, with the fused loss.
# usage: bash train.sh DATA SAVE_DIR SEED
bash "$(dirname -- "${BASH_SOURCE[0]}")/../../train-multi30k.sh" "$1" "$2" universal-3 --seed "$3" --cpu --num-workers 0 \
  --bf16 --criterion fused_label_smoothed_cross_entropy \
  --dropout 0.1 --lr 0.004 --max-tokens 1024 --max-update 1800 --total-num-update 1800 --warmup-updates 300 \
  --disable-validation --no-epoch-checkpoints
