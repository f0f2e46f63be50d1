#!/usr/bin/env bash
# Trains every mechanism of the gallery at equal updates and, where it saves compute, at equal multiply-adds; scores each on
# test, and times all of them in turn. What is finished is not done again, and what was interrupted goes on.
#
# usage: bash run.sh DATA OUT [options]
#   DATA         the OUT folder of examples/language_model/prepare.sh (perplexity per word), or of
#                examples/translation/prepare.sh (BLEU and chrF)
#   OUT          folder for checkpoints and logs, and for results.json
#   --only A,B   these cells (default: all; --dry-run names them)
#   --seeds 1,2  of the trainings (default: 1,2,3)
#   --updates N  of each training (default: 240)
#   --width N    of all models, a multiple of 4 (default: 64)
#   --rounds N   how often all are timed in turn (default: 5)
#   --minutes N  begin no further training after so long, and score and time what there is (default: no end)
#   --dry-run    print the commands
set -euo pipefail

. "$(dirname -- "${BASH_SOURCE[0]}")/../common.sh"
[ $# -ge 2 ] || usage
data=$1 out=$2
paths data out
here=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
shift 2
exec python3 "$here/gallery.py" gallery "$data" "$out" --user-dir "$user_dir" "$@"
