#!/usr/bin/env bash
# Do repeats of a layer read keys and values of their own, those of its first repeat, or those of its last? Trains
# Mixture-of-Recursions with --router-kv active and first, and models of shared layers whose keys and values are exchanged
# after training (repeats.py).
#
# usage: bash keys.sh DATA OUT [options]
#   DATA     the OUT folder of examples/language_model/prepare.sh
#   OUT      folder for checkpoints and logs, and for keys.json; that of run.sh has some of these trainings
#   options  as of run.sh
set -euo pipefail

. "$(dirname -- "${BASH_SOURCE[0]}")/../common.sh"
[ $# -ge 2 ] || usage
data=$1 out=$2
paths data out
here=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
shift 2
exec python3 "$here/gallery.py" keys "$data" "$out" --user-dir "$user_dir" "$@"
