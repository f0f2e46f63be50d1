#!/usr/bin/env bash
# Trains one row of the table in README.md: a language model of width 128 (4 heads) that reads 1,024 tokens an update,
# 2,500 times. Every row has the same data, optimiser and number of updates, and about as many parameters: the fewer
# attention blocks, the wider the feed-forward ones have to be.
#
# usage: bash train.sh DATA SAVE_DIR ROW [fairseq-train flags]
#   DATA  the OUT folder of prepare.sh
#   ROW   stock           fairseq's transformer_lm, 8 layers (16 blocks), in windows of 128 tokens
#         transformer-xl  8 attention and 8 feed-forward blocks in turn, segments of 64 tokens, memory of 64
#         par-rule        attention in the first two thirds of the blocks, one in five (the rule of the PAR paper)
#         search          the supernet: 16 stochastic blocks, 1,000 updates; derive_architecture.py reads SAVE_DIR
#         LAYOUT          what was found, afff*3,f*4 for instance
set -euo pipefail

. "$(dirname -- "${BASH_SOURCE[0]}")/../common.sh"
[ $# -ge 3 ] || usage
data=$1 save_dir=$2 row=$3
paths data save_dir
shift 3

updates=2500 optimizer=adam criterion=adaptive_cross_entropy
segments=(--task segmented_language_modeling --tokens-per-sample 64 --batch-size 16 --memory-length 64
  --share-decoder-input-output-embed)
case $row in
  stock)
    segments=(--task language_modeling --tokens-per-sample 128 --batch-size 8)
    model=(--arch transformer_lm --decoder-layers 8 --decoder-ffn-embed-dim 576 --adaptive-input
      --adaptive-input-cutoff "${CUTOFFS:-522,3929}" --adaptive-input-factor 1 --adaptive-softmax-factor 1
      --tie-adaptive-weights --tie-adaptive-proj --decoder-output-dim 128 --decoder-input-dim 128) ;;
  transformer-xl) model=(--arch par_transformer_xl --layout 'af*8' --decoder-ffn-embed-dim 512) ;;
  par-rule) model=(--arch par_transformer_xl --layout 'afff*3,f*4' --decoder-ffn-embed-dim 440) ;;
  search)
    updates=1000 optimizer=architecture_adam criterion=architecture_entropy_loss
    model=(--arch par_supernet --blocks 16 --decoder-ffn-embed-dim 512 --temperature-end 0.2
      --architecture-lr 0.01 --architecture-warmup-updates 200 --entropy-weight 0.05 --entropy-warmup-updates 600
      --target-compute 0.7) ;;
  *[!af*,0-9]* | "") usage ;;
  *)
    # 8 attention blocks of 81,920 weights and 8 feed-forward blocks of 257 x 512 + 128, shared out anew
    ffn=$(PYTHONPATH=$user_dir/.. python -c "
import sys
from fairseq_adaptive.modules.transformer_xl.layout import parse_layout
blocks = parse_layout(sys.argv[1])
left = 8 * (81920 + 257 * 512 + 128) - 81920 * blocks.count('a')
print(max(4, 4 * round((left / max(1, blocks.count('f')) - 128) / 257 / 4)))" "$row" 2> /dev/null) || ffn=440
    model=(--arch par_transformer_xl --layout "$row" --decoder-ffn-embed-dim "$ffn") ;;
esac

fairseq-train "$data/bin" --user-dir "$user_dir" "${segments[@]}" "${model[@]}" \
  --decoder-embed-dim 128 --decoder-attention-heads 4 --decoder-normalize-before --dropout 0.0 \
  --adaptive-softmax-cutoff "${CUTOFFS:-522,3929}" --criterion "$criterion" \
  --optimizer "$optimizer" --adam-betas '(0.9, 0.98)' --clip-norm 0.25 --max-update "$updates" \
  --lr 0.002 --lr-scheduler cosine --warmup-updates 100 \
  --batch-size-valid 16 --no-epoch-checkpoints --seed 1 --num-workers 0 --log-format simple --log-interval 50 \
  --save-dir "$save_dir" "$@"
