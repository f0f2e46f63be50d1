#!/usr/bin/env bash
# Trains AdaTape on ImageNet, with the settings that were published with it: patches of 16, a tape of at most 10 tokens
# from a bank of patches of 8, images of 224 x 224, Adam with weight decay 0.1, learning rate 0.001 with 10,000 warm-up
# updates and a cosine to 0, 4,096 images a batch, 300 epochs (93,750 updates), clipping at 1, mixup 0.5 and
# RandAugment(2, 15).
#
# usage: bash train-imagenet.sh DATA SAVE_DIR [ARCH] [fairseq-train flags]
#   DATA  folder with train/CLASS/*.JPEG and valid/CLASS/*.JPEG
#   ARCH  adatape_vit_{ti,s,b}{16,32}, default adatape_vit_s16; with the flags "--tape-tokens 0" a plain ViT
#   A batch is 256 images x 16, for one GPU; on N GPUs set --update-freq to 16 / N. Needs Pillow (the extra "images").
set -euo pipefail

. "$(dirname -- "${BASH_SOURCE[0]}")/../common.sh"
[ $# -ge 2 ] || usage
data=$1 save_dir=$2 arch=${3:-adatape_vit_s16}
paths data save_dir
shift $(($# < 3 ? $# : 3))

fairseq-train "$data" --user-dir "$user_dir" --task image_classification --image-size 224 --arch "$arch" \
  --random-resized-crop --horizontal-flip --randaugment-layers 2 --randaugment-magnitude 15 --mixup 0.5 \
  --criterion tape_ponder_loss --ponder-penalty 0.01 \
  --optimizer adam --adam-betas '(0.9, 0.999)' --weight-decay 0.1 --clip-norm 1.0 \
  --lr 0.001 --lr-scheduler cosine --warmup-updates 10000 --max-update 93750 \
  --batch-size 256 --update-freq 16 --num-workers 8 --seed 42 --log-interval 100 \
  --keep-last-epochs 3 --best-checkpoint-metric accuracy --maximize-best-checkpoint-metric \
  --save-dir "$save_dir" "$@"
