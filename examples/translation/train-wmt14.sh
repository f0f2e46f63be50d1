#!/usr/bin/env bash
# Trains a Transformer with parameters shared across layers, with the recipe that Takase & Kiyono (2021) have for WMT
# English-German: that of train-wmt14-native.sh, with Admin initialisation. Any pair of languages.
#
# usage: bash train-wmt14.sh DATA SAVE_DIR ARCH [fairseq-train flags]
#   DATA      the OUT folder of prepare-wmt14en2de.sh or prepare.sh
#   SAVE_DIR  folder for the checkpoints; an interrupted training goes on from there
#   ARCH      shared_transformer_wmt_en_de     6 unique layers at 12 depths
#             shared_transformer_wmt_en_de_18  6 unique layers at 18 depths
#             shared_transformer_wmt_en_de_big, universal_transformer_wmt_en_de (one layer at 6 depths, width 1024)
#   flags     --layer-sharing sequence|cycle|cycle_rev; any other overrides the recipe (--clip-norm 1.0 if training
#             diverges)
set -euo pipefail

. "$(dirname -- "${BASH_SOURCE[0]}")/../common.sh"
case ${3:-} in
  '' | -*) usage ;;
esac
data=$1 save_dir=$2 arch=$3
paths data save_dir
shift 3
here=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
exec bash "$here/train-wmt14-native.sh" "$data" "$save_dir" --user-dir "$user_dir" \
  --arch "$arch" --init admin "$@"
