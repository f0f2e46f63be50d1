#!/usr/bin/env bash
# Trains a model with its published recipe. Written for GPUs; on one that is too small, divide --batch-size and multiply
# --update-freq. The number of streams is --batch-size times the number of workers.
#
# usage: bash train-published.sh DATA SAVE_DIR ARCH [fairseq-train flags]
#   DATA      the OUT folder of prepare.sh: wikitext-103 (words), or enwik8 for the architectures that are named so
#   SAVE_DIR  folder for the checkpoints; an interrupted training goes on from there
#   ARCH      transformer_xl_wt103_base, transformer_xl_wt103_large, transformer_xl_enwik8 (Dai et al., 2019)
#             par_transformer_xl_base, _large, _enwik8, _sandwich (Mandava et al., 2020)
#   flags     override the recipe, --fp16 and --update-freq for instance
# The published runs had 60 streams on 4 GPUs (wt103 base), 128 on 64 TPU cores (large), 22 on 4 GPUs (enwik8), and for
# PAR 256 on 8 GPUs with LAMB; fairseq has LAMB with NVIDIA's apex only, so that Adam is the default here: with apex add
# --optimizer lamb --lr 0.01.
set -euo pipefail

. "$(dirname -- "${BASH_SOURCE[0]}")/../common.sh"
case ${3:-} in
  '' | -*) usage ;;
esac
data=$1 save_dir=$2 arch=$3
paths data save_dir
shift 3

lr=0.00025 warmup=1000 criterion=adaptive_cross_entropy
case $arch in
  transformer_xl_wt103_base) length=150 batch=60 updates=200000 warmup=1 ;;
  transformer_xl_wt103_large) length=384 batch=128 updates=4000000 warmup=16000 ;;
  transformer_xl_enwik8 | par_transformer_xl_enwik8)
    length=512 batch=22 updates=400000 warmup=1 criterion=cross_entropy ;;
  par_transformer_xl_base | par_transformer_xl_sandwich) length=192 batch=256 updates=40000 ;;
  par_transformer_xl_large) length=384 batch=128 updates=100000 warmup=16000 ;;
  *) usage ;;
esac

fairseq-train "$data/bin" --user-dir "$user_dir" --task segmented_language_modeling --arch "$arch" \
  --tokens-per-sample "$length" --batch-size "$batch" --batch-size-valid 10 --criterion "$criterion" \
  --optimizer adam --lr "$lr" --lr-scheduler cosine --warmup-updates "$warmup" --max-update "$updates" --clip-norm 0.25 \
  --save-interval-updates 4000 --validate-interval-updates 4000 --keep-interval-updates 5 --no-epoch-checkpoints \
  --seed 1111 --log-format simple --log-interval 200 --save-dir "$save_dir" "$@"
