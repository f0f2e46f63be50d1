#!/usr/bin/env bash
# Does a uniform or a geometric prior halt better at equal depth? Trains loop_gate and pondernet, and turns each to a mean of
# 2, 3 and 4 of 6 depths.
#
# usage: bash priors.sh DATA OUT [options]
#   DATA     the OUT folder of examples/language_model/prepare.sh
#   OUT      folder for checkpoints and logs, and for priors.json; that of run.sh has some of these trainings
#   options  as of run.sh
set -euo pipefail

. "$(dirname -- "${BASH_SOURCE[0]}")/../common.sh"
[ $# -ge 2 ] || usage
data=$1 out=$2
paths data out
here=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
shift 2
exec python3 "$here/gallery.py" priors "$data" "$out" --user-dir "$user_dir" "$@"
