#!/usr/bin/env bash
# Trains models of fixed and of adaptive depth on the sheets of prepare.sh, each once through them, and scores every one at all
# nesting depths. What is finished is not done again, and what was interrupted goes on.
#
# usage: bash run.sh DATA OUT [options]
#   DATA         the OUT folder of prepare.sh
#   OUT          folder for checkpoints and logs, and for results.json
#   --only A,B   these models (default: all; --dry-run names them)
#   --seeds 1,2  of the trainings (default: 1,2,3)
#   --width N    of all models, a multiple of 4 (default: 64)
#   --batch-size N  sheets an update (default: 64)
#   --minutes N  begin no further training after so long, and write down what there is (default: no end)
#   --dry-run    print the commands
set -euo pipefail

. "$(dirname -- "${BASH_SOURCE[0]}")/../common.sh"
[ $# -ge 2 ] || usage
data=$1 out=$2
paths data out
here=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
shift 2
exec python3 "$here/depth.py" "$data" "$out" --user-dir "$user_dir" "$@"
