#!/usr/bin/env bash
# Trains a small Vision Transformer on small images, for example Fashion-MNIST: pre-LN, width 64, 4 heads, feed-forward
# 128, patches of 7 x 7; 10 epochs of Adam with batches of 256, images moved by up to 2 pixels.
#
# usage: bash train-images.sh DATA SAVE_DIR ROW [fairseq-train flags]
#   DATA  folder with the four files of (Fashion-)MNIST, or with train.npz and valid.npz
#   ROW   adatape-N   N layers and a tape of at most 8 tokens from a bank of patches of 4 x 4
#         vit-N       N layers, no tape
#   Of IDX files, the last 5,000 of a fixed random order of the training images are the validation set. The log goes to
#   SAVE_DIR/train.log. SAVE_DIR must be new or empty.
set -euo pipefail

. "$(dirname -- "${BASH_SOURCE[0]}")/../common.sh"
[ $# -ge 3 ] || usage
data=$1 save_dir=$2 row=$3
paths data save_dir
shift 3
if [ -e "$save_dir/train.log" ]; then
  echo "error: $save_dir/train.log is there already: name another SAVE_DIR" >&2
  exit 1
fi
case $row in
  adatape-[1-9]*) flags=(--encoder-layers "${row#*-}") ;;
  vit-[1-9]*) flags=(--encoder-layers "${row#*-}" --tape-tokens 0) ;;
  *) usage ;;
esac
[ -e "$data/valid.npz" ] || flags+=(--held-out 5000)

mkdir -p "$save_dir"
fairseq-train "$data" --user-dir "$user_dir" --task image_classification --arch adatape_vit_mini "${flags[@]}" \
  --crop-padding 2 --criterion tape_ponder_loss --ponder-penalty 0.01 --label-smoothing 0.1 \
  --optimizer adam --adam-betas '(0.9, 0.999)' --weight-decay 0.05 --clip-norm 1.0 \
  --lr 0.002 --lr-scheduler cosine --warmup-updates 200 --max-update 2140 \
  --batch-size 256 --seed 1 --num-workers 0 --log-format simple --log-interval 50 --no-epoch-checkpoints \
  --best-checkpoint-metric accuracy --maximize-best-checkpoint-metric \
  --save-dir "$save_dir" "$@" 2>&1 | tee "$save_dir/train.log"
