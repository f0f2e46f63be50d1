#!/usr/bin/env bash
# From nothing to the parity curve and the heat map of a tape, by stock fairseq-train: AdaTape on sequences of 8, 16 and
# 32 elements, a Transformer and a Universal Transformer on 32, and a small Vision Transformer with a tape on
# handwritten digits. At most 15 minutes on 2 CPU cores. A second call goes on with the runs that are not finished.
#
# usage: bash examples/adatape/demo.sh [OUT]
#   OUT  where everything goes (default outputs/adatape)
set -euo pipefail

. "$(dirname -- "${BASH_SOURCE[0]}")/../common.sh"
[ $# -le 1 ] && [ "${1:-}" != --help ] || { usage; }
here=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
out=${1:-outputs/adatape}
paths out
mkdir -p "$out"
step() { printf '\n== %s  [%d min %02d s]\n' "$1" $((SECONDS / 60)) $((SECONDS % 60)); }
show() {
  grep --line-buffered -o "epoch [0-9]* | valid on 'valid' subset .*accuracy [0-9.]*" |
    sed -u "s/valid on 'valid' subset | //" || true
}

# runs a script with its save-dir OUT/NAME unless that run is finished; what was cut off starts again
once() {
  local name=$1
  shift
  if ! grep -qs 'done training' "$out/$name/train.log"; then
    rm -rf "${out:?}/$name"
    "$@" | show || true
    grep -q 'done training' "$out/$name/train.log" || { tail -n 15 "$out/$name/train.log" >&2; exit 1; }
  fi
}

for run in adatape-8-1 adatape-16-1 adatape-32-1 transformer-32-1 universal-32-1; do
  IFS=- read -r model length seed <<< "$run"
  step "parity of $length elements: $model"
  once "parity/$run" bash "$here/train-parity.sh" "$model" "$length" "$seed" "$out/parity/$run"
done
rm -f "$out/parity.png"
python "$here/plot_parity.py" "$out/parity" --output "$out/parity.png"

step "digits: adatape_vit"
[ -e "$out/digits" ] || python "$here/prepare_digits.py" "$out/digits"
once images bash "$here/train-images.sh" "$out/digits" "$out/images" adatape-2 --patch-size 4 --tape-bank-patch-size 1 \
  --tape-tokens 10 --crop-padding 1 --batch-size 64 --max-update 660
rm -f "$out/tape.png"
python "$here/../../scripts/plot_tape.py" "$out/digits" --path "$out/images/checkpoint_best.pt" --output "$out/tape.png"
step "done: $out/parity.png and $out/tape.png"
