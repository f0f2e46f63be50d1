#!/usr/bin/env bash
# Stock fairseq: its own Transformer of 3 + 3 layers of width 128, criterion and optimiser, without the plug-in.
# usage: bash train.sh DATA SAVE_DIR SEED
bash "$(dirname -- "${BASH_SOURCE[0]}")/../../train-multi30k.sh" "$1" "$2" vanilla-3 --seed "$3" --cpu --num-workers 0 \
  --dropout 0.1 --lr 0.004 --max-tokens 1024 --max-update 1800 --total-num-update 1800 --warmup-updates 300 \
  --disable-validation --no-epoch-checkpoints
