#!/usr/bin/env bash
# Trains a Transformer with shared layers on text of your own that prepare.sh has prepared, of any pair of languages: the
# size and the recipe that fairseq has for IWSLT (some 100,000 pairs). Says first what it will do. For millions of pairs
# see train-wmt14.sh.
#
# usage: bash train.sh DATA SAVE_DIR [fairseq-train flags]
#   DATA      the OUT folder of prepare.sh
#   SAVE_DIR  folder for the checkpoints; an interrupted training goes on from there
#   flags     override the recipe: --max-update N (default 20000), --arch, --layer-sharing, --encoder-unique-layers,
#             --halting act, --max-tokens, ...
set -euo pipefail

. "$(dirname -- "${BASH_SOURCE[0]}")/../common.sh"
[ $# -ge 2 ] || usage
data=$1 save_dir=$2
paths data save_dir
shift 2
die() { echo "train: $*" >&2; exit 1; }
language_pair "$data/bin" train
for split in train valid; do
  for lang in "$source" "$target"; do
    file=$data/bin/$split.$source-$target.$lang.bin
    [ -s "$file" ] || die "$file is missing or empty: run prepare.sh"
  done
done
gpus=$(python3 -c 'import torch; print(torch.cuda.device_count())')
precision=()
[ "$gpus" -eq 0 ] || precision=(--fp16)
pairs=''
[ ! -e "$data/train.clean.$source" ] || pairs="$(wc -l < "$data/train.clean.$source") pairs, "
echo "to do: $source-$target, $pairs$(wc -l < "$data/bin/dict.$source.txt") subwords," \
  "20000 updates of up to 4096 tokens unless --max-update says otherwise, on $gpus GPUs, into $save_dir" >&2
[ ! -e "$save_dir/checkpoint_last.pt" ] || echo "train: going on from $save_dir/checkpoint_last.pt" >&2

fairseq-train "$data/bin" --user-dir "$user_dir" --task translation --source-lang "$source" --target-lang "$target" \
  --arch shared_transformer_iwslt_de_en --layer-sharing cycle_rev --share-all-embeddings --dropout 0.3 \
  --encoder-normalize-before --decoder-normalize-before \
  --optimizer adam --adam-betas '(0.9, 0.98)' --weight-decay 0.0001 --clip-norm 1.0 \
  --lr 0.0005 --lr-scheduler inverse_sqrt --warmup-updates 4000 --max-update 20000 --max-tokens 4096 \
  --criterion label_smoothed_cross_entropy --label-smoothing 0.1 \
  --save-interval-updates 1000 --keep-interval-updates 1 --keep-last-epochs 10 --patience 10 \
  --seed 1 --log-format simple --log-interval 100 ${precision[@]+"${precision[@]}"} --save-dir "$save_dir" "$@"
